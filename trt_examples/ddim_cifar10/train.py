#!/usr/bin/env python3
"""Train a full-precision reference on CIFAR-10: any diffusers denoiser that its config describes. Resumable.

python train.py --config dit --data cifar10.npz --out my_dit --minutes 60
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import diffusers
import torch
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from modelopt_tdq.lab.bench.cifar10 import load_cifar10
from modelopt_tdq.lab.denoising import class_count, noise_loss, noisy_batch

HERE = Path(__file__).resolve().parent


def build(config: Path) -> torch.nn.Module:
    description = json.loads((config / "config.json").read_text())
    model = getattr(diffusers, description["_class_name"]).from_config(description)
    for name, layer in model.named_modules():
        # adaLN-Zero (Peebles and Xie 2023, section 3.2): every block starts as the identity
        if name.endswith((".norm1.linear", "proj_out_1", "proj_out_2")):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "model", help="folder with config.json and scheduler/")
    parser.add_argument("--data", type=Path, help="cifar10.npz; left out, it is downloaded")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0, help="of training, over all resumed runs")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()

    images, labels = load_cifar10(a.data)
    scheduler = diffusers.DDPMScheduler.from_pretrained(a.config / "scheduler")
    torch.manual_seed(a.seed)
    model = build(a.config).to(a.device).train()
    classes = labels if class_count(model) else None
    average = EMAModel(model.parameters(), decay=a.ema, use_ema_warmup=False)
    average.to(a.device)
    optimizer = torch.optim.AdamW(model.parameters(), a.lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(a.seed)
    step, used, losses = 0, 0.0, []
    a.out.mkdir(parents=True, exist_ok=True)
    checkpoint = a.out / "training.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=a.device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average.load_state_dict(saved["average"])
        generator.set_state(saved["generator"].cpu())
        step, used = saved["step"], saved["used"]

    def save() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average.state_dict()}
        torch.save({**state, "generator": generator.get_state(), "step": step, "used": used}, checkpoint)

    begin, budget, saved_at = time.monotonic() - used, a.minutes * 60, used
    bar = tqdm(total=round(budget), initial=round(used), unit="s", mininterval=10)
    while (used := time.monotonic() - begin) < budget:
        # a warm-up, then a cosine over the time budget
        rate = a.lr * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * used / budget))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = noisy_batch(images, classes, scheduler, a.batch, generator)
        batch = tuple(None if value is None else value.to(a.device) for value in batch)
        with torch.autocast(torch.device(a.device).type, torch.bfloat16):
            loss = noise_loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.step(model.parameters())
        step += 1
        losses.append(loss.detach())
        if step % 200 == 0:
            bar.set_postfix(step=step, loss=f"{torch.stack(losses[-1000:]).mean():.4f}")
        bar.update(round(used) - bar.n)
        if used - saved_at > 120:
            save()
            saved_at = used
    save()
    average.copy_to(model.parameters())
    model.half().save_pretrained(a.out)
    scheduler.save_pretrained(a.out / "scheduler")
    print(f"{step} steps of {a.batch}, {used / 60:.0f} minutes, loss {torch.stack(losses[-1000:]).mean():.4f}")


if __name__ == "__main__":
    main()
