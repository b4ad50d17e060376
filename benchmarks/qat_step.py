#!/usr/bin/env python3
"""Time of one QAT step: TDQ intervals against a static LSQ interval and against full precision, in one run."""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import modelopt.torch.quantization as mtq
import torch
from diffusers import DDPMScheduler, UNet2DModel
from record import write
from torch import nn

import modelopt_tdq as tdq
from modelopt_tdq.lab.denoising import noise_loss, noisy_batch
from modelopt_tdq.training.learned import learned_quantizers

#: A UNet of the bundled one's kind, deep enough for about 100 quantized layers.
CONFIG = {
    "sample_size": 32,
    "block_out_channels": (32, 64, 128),
    "layers_per_block": 3,
    "norm_num_groups": 16,
    "attention_head_dim": 32,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=15, help="interleaved steps of each variant")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    original = UNet2DModel(**CONFIG).to(a.device)
    images = torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8)
    scheduler = DDPMScheduler()
    generator = torch.Generator().manual_seed(0)

    def calibration(model: nn.Module) -> None:
        for t in (20, 400, 900):
            model(torch.randn(2, 3, 32, 32, device=a.device), torch.tensor(t, device=a.device))

    models: dict[str, nn.Module] = {"full precision": copy.deepcopy(original).train()}
    for label, intervals in (("static LSQ", "static"), ("TDQ", "mlp"), ("table per step", "table")):
        config = tdq.make_config(
            4, 4, method="tdq_qat", intervals=intervals, statistic="max", weights="max", progress=False
        )
        models[label] = mtq.quantize(copy.deepcopy(original), config, calibration).train()
    groups = {
        name: m.parameters() if name == "full precision" else tdq.parameter_groups(m, 1e-4)
        for name, m in models.items()
    }
    optimizers = {name: torch.optim.AdamW(group, 1e-4) for name, group in groups.items()}
    quantizers = len(learned_quantizers(models["TDQ"]))

    def step(name: str) -> float:
        batch = tuple(
            None if v is None else v.to(a.device) for v in noisy_batch(images, None, scheduler, a.batch, generator)
        )
        if a.device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        noise_loss(models[name], batch).backward()
        optimizers[name].step()
        optimizers[name].zero_grad(set_to_none=True)
        if a.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    rounds = []
    for _ in range(a.rounds):
        times: dict[str, list[float]] = {name: [] for name in models}
        for name in models:
            step(name)  # warm up
        for _ in range(a.repetitions):
            for name in models:
                times[name].append(step(name))
        rounds.append({name: statistics.median(values) for name, values in times.items()})
    lines = [
        f"One QAT step, {quantizers} activation quantizers, batch {a.batch}, {a.threads} thread(s) on {a.device}; "
        f"medians of {a.repetitions} interleaved steps, {a.rounds} rounds.",
        "",
        "| | ms, per round | over static LSQ |",
        "|---|---|---|",
    ]
    for name in models:
        milliseconds = ", ".join(f"{1000 * r[name]:.0f}" for r in rounds)
        ratios = ", ".join(f"{r[name] / r['static LSQ']:.3f}" for r in rounds)
        lines.append(f"| {name} | {milliseconds} | {ratios} |")
    write("qat_step", {"quantizers": quantizers, "batch": a.batch, "rounds": rounds}, "\n".join(lines))


if __name__ == "__main__":
    main()
