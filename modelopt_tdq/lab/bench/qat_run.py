"""One row of a table: quantize, train, judge. The same data, steps and seeds for every row."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.config import make_config
from modelopt_tdq.core.metrics import json_numbers
from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.bench.budget import Budget
from modelopt_tdq.lab.denoising import class_count, noise_loss, noisy_batch
from modelopt_tdq.lab.judge import Reference, judge, reference
from modelopt_tdq.lab.trajectories import calibration_loop
from modelopt_tdq.model.model_table import scale_table
from modelopt_tdq.model.place import execution_device
from modelopt_tdq.training.finite import require_finite
from modelopt_tdq.training.groups import interval_penalty, parameter_groups
from modelopt_tdq.training.learned import learned_intervals, stop_noise

__all__ = ["Data", "QatRun", "checksum", "full_precision_row", "run_qat", "train_qat"]

#: Seeds of what is judged; those of training and calibration are others.
_JUDGED_SEED, _LOSS_SEED = 77_001, 77_002

#: NIPQ trains with noise for this part of the steps, then with rounding.
_NOISE_PART = 0.7

#: Fields of the errors that a training ends in: NaN, or intervals of zero.
_FAILURES = ("loss", "scale")


@dataclass(frozen=True)
class QatRun:
    """What distinguishes one training run from another.

    Attributes:
        weight_bits: Of integers.
        activation_bits: Likewise.
        seed: Of the batches, the dropout and the MLP's weights.
        penalty: Weight of the scheme's penalty in the loss.
        scale_lr: Learning rate of the scales over that of the model.
        options: Fields of :class:`modelopt_tdq.training.config.TdqQatConfig`.
    """

    weight_bits: int = 4
    activation_bits: int = 4
    seed: int = 0
    penalty: float = 1e-4
    scale_lr: float = 0.1
    options: dict[str, Any] = field(default_factory=dict)

    def key(self, model: str, budget: Budget) -> str:
        """The same for runs that would give the same result."""
        what = json.dumps([model, asdict(budget), asdict(self)], sort_keys=True)
        return hashlib.sha256(what.encode()).hexdigest()[:16]

    def measure(
        self, model: nn.Module, sampler: Any, data: Data, budget: Budget, against: Reference, table: Path
    ) -> dict[str, Any]:
        """See :func:`run_qat`."""
        return run_qat(model, sampler, data, self, budget, against, table)


@dataclass(frozen=True)
class Data:
    """Training and test images uint8 [N, 3, H, W] with labels [N], and the scheduler that adds noise to them."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    scheduler: Any


def checksum(folder: Path) -> str:
    """SHA-256 of a model's weights, the first 16 digits."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _test_loss(model: nn.Module, data: Data, images: int) -> float:
    """Mean squared error of the noise prediction over test images, at fixed noises and times."""
    generator, total, done = torch.Generator().manual_seed(_LOSS_SEED), 0.0, 0
    labels = data.test[1] if class_count(model) else None
    device = execution_device(model)
    with torch.no_grad():
        while done < images:
            batch = noisy_batch(data.test[0], labels, data.scheduler, min(64, images - done), generator)
            total += float(noise_loss(model, _to(batch, device))) * len(batch[0])
            done += len(batch[0])
    return total / images


def _to(batch: Any, device: torch.device) -> Any:
    return tuple(None if value is None else value.to(device) for value in batch)


def judged(model: nn.Module, sampler: Any, data: Data, budget: Budget, against: Reference) -> dict[str, Any]:
    """Loss on test images, SQNR and PSNR against full precision."""
    model.eval()
    judgement = judge(model, sampler, against, lambda: None)
    decibels = judgement.sqnr_db
    return {
        "loss": _test_loss(model, data, budget.loss_images),
        "sqnr_db": math.fsum(decibels) / len(decibels),
        "worst_sqnr_db": min(decibels),
        "psnr_db": judgement.psnr_db,
    }


def full_precision(model: nn.Module, sampler: Any, budget: Budget) -> Reference:
    """Trajectories to judge against."""
    return reference(model, sampler, budget.judged_samples, budget.judged_steps, _JUDGED_SEED, lambda: None)


def full_precision_row(model: nn.Module, data: Data, budget: Budget) -> dict[str, Any]:
    """The first row of every table."""
    return {"loss": _test_loss(model, data, budget.loss_images)}


def train_qat(model: nn.Module, sampler: Any, data: Data, run: QatRun, budget: Budget) -> nn.Module:
    """A quantized copy of ``model``, trained on the plain diffusion loss (TDQ, section 5: no distillation).

    Raises:
        TdqError: The loss became NaN: with the quantizer and the times.
    """
    import modelopt.torch.quantization as mtq

    steps = budget.calibration_steps
    calibration = calibration_loop(sampler, budget.calibration_samples * steps, steps, 0)
    config = make_config(
        run.weight_bits, run.activation_bits, method="tdq_qat", seed=run.seed, progress=False, **run.options
    )
    student: nn.Module = mtq.quantize(copy.deepcopy(model), config, calibration).train()
    optimizer = torch.optim.AdamW(parameter_groups(student, budget.lr, scale_lr=budget.lr * run.scale_lr))
    warm_up = max(1, budget.steps // 10)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / budget.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    average = copy.deepcopy(student) if budget.ema else None
    generator = torch.Generator().manual_seed(run.seed + 1)
    torch.manual_seed(run.seed)
    labels = data.train[1] if class_count(model) else None
    device = execution_device(model)
    for step in range(budget.steps):
        if run.options.get("scheme") == "nipq" and step == round(_NOISE_PART * budget.steps):
            stop_noise(student)
        batch = _to(noisy_batch(data.train[0], labels, data.scheduler, budget.batch, generator), device)
        loss = noise_loss(student, batch)
        require_finite(loss, student, *batch[:2], **({} if batch[3] is None else {"class_labels": batch[3]}))
        total = loss + run.penalty * interval_penalty(student)
        optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if average is not None:
            decay = min(budget.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(student.parameters()), 1 - decay)
    return student if average is None else average


def run_qat(
    model: nn.Module,
    sampler: Any,
    data: Data,
    run: QatRun,
    budget: Budget,
    against: Reference,
    table: Path | None = None,
) -> dict[str, Any]:
    """Train and judge one row.

    Args:
        model: Full precision.
        sampler: Deterministic scheduler for calibration and judging.
        data: To train on and to judge on.
        run: The row.
        budget: What it may cost.
        against: Full-precision trajectories, from :func:`full_precision`.
        table: Where to write the learned ScaleTable, if there is one.

    Returns:
        Plain data for JSON, with the wall time in seconds; ``failed`` says why a training ended in NaN, or in intervals
        of zero.
    """
    start = time.perf_counter()
    try:
        student = train_qat(model, sampler, data, run, budget)
        trained = time.perf_counter() - start
        result = judged(student, sampler, data, budget, against)
    except TdqError as error:
        if error.field not in _FAILURES:
            raise
        return {"failed": str(error), "run": asdict(run)}
    if table is not None and learned_intervals(student).source is not None:
        scale_table(student).save(table)
    return {**json_numbers(result), "train_seconds": round(trained, 1), "run": asdict(run)}
