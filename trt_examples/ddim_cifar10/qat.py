#!/usr/bin/env python3
"""Train a W4A4 denoiser whose activation scales are functions of the diffusion time. An ordinary loop; resumable.

python qat.py --data cifar10.npz --out w4a4 --steps 2000
python qat.py --data cifar10.npz --out w4a4_static --steps 2000 --intervals static   # what it is compared with
"""

from __future__ import annotations

import argparse
from pathlib import Path

import diffusers
import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm

import modelopt_tdq as tdq
from modelopt_tdq.lab.bench.cifar10 import load_cifar10
from modelopt_tdq.lab.denoising import class_count, noise_loss, noisy_batch
from modelopt_tdq.lab.model_folder import load_model
from modelopt_tdq.lab.trajectories import load_scheduler, noise, sample, sample_shape

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "model", help="full precision; `dit` is the other one")
    parser.add_argument("--data", type=Path, help="cifar10.npz; left out, it is downloaded")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=4, help="of weights and activations")
    parser.add_argument("--intervals", default="mlp", help="mlp, thin, table, static")
    parser.add_argument("--scheme", default="lsq", help="lsq, pact, nipq, duq, qil")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    a = parser.parse_args()

    mto.enable_huggingface_checkpointing()  # save_pretrained keeps the quantizers
    accelerator = Accelerator()
    set_seed(a.seed)
    model, sampler = load_model(a.model).to(accelerator.device), load_scheduler(a.model)

    def forward_loop(model: torch.nn.Module) -> None:
        start = noise(16, sample_shape(model), 0).to(accelerator.device)
        sample(model, sampler, start, 20)

    config = tdq.make_config(a.bits, a.bits, method="tdq_qat", intervals=a.intervals, scheme=a.scheme, seed=a.seed)
    mtq.quantize(model, config, forward_loop)
    model.train()
    optimizer = torch.optim.AdamW(tdq.parameter_groups(model, a.lr))
    schedule = diffusers.optimization.get_cosine_schedule_with_warmup(optimizer, a.steps // 40, a.steps)
    average = diffusers.training_utils.EMAModel(model.parameters(), decay=a.ema)
    average.to(accelerator.device)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    accelerator.register_for_checkpointing(average)
    checkpoint, first = a.out / "checkpoint", 0
    if a.resume and checkpoint.is_dir():
        accelerator.load_state(checkpoint)
        first = int((checkpoint / "step.txt").read_text())

    images, labels = load_cifar10(a.data)
    classes = labels if class_count(accelerator.unwrap_model(model)) else None
    diffusion = diffusers.DDPMScheduler.from_pretrained(a.model, subfolder="scheduler")
    penalty = 1e-4 if a.scheme == "pact" else 0.0
    bar = tqdm(range(first, a.steps), initial=first, total=a.steps, disable=not accelerator.is_main_process)
    for step in bar:
        if a.scheme == "nipq" and step == max(first, round(0.7 * a.steps)):
            tdq.stop_noise(accelerator.unwrap_model(model))
        # the batch of a step depends on its number alone, so a resumed run sees the same ones
        generator = torch.Generator().manual_seed((a.seed * a.steps + step) * accelerator.num_processes)
        batch = noisy_batch(images, classes, diffusion, a.batch, generator)
        batch = tuple(None if value is None else value.to(accelerator.device) for value in batch)
        with accelerator.autocast():
            loss = noise_loss(model, batch)
        if penalty:
            loss = loss + penalty * tdq.interval_penalty(accelerator.unwrap_model(model))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.step(model.parameters())
        if (step + 1) % 500 == 0 or step + 1 == a.steps:
            bar.set_postfix(loss=f"{float(loss.detach()):.4f}")
            accelerator.save_state(checkpoint)
            (checkpoint / "step.txt").write_text(str(step + 1))

    trained = accelerator.unwrap_model(model).eval()
    average.copy_to(trained.parameters())
    if accelerator.is_main_process:
        trained.save_pretrained(a.out)
        table = tdq.scale_table(trained)  # the learned intervals, at the calibrated times
        table.save(a.out / "scale_table")
        following = int((~table.is_static).sum())
        print(f"{a.out}: {len(table.names)} quantizers, {following} follow {len(table)} times")


if __name__ == "__main__":
    main()
