"""Runs the rows; finished ones are kept, so that it can go on after an interruption."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.config import make_config
from modelopt_tdq.errors import MissingExtraError, TdqError
from modelopt_tdq.lab.bench.supplement import OfModel, Store, facts, labelled_progress
from modelopt_tdq.lab.bench.temporal.deploy import deploy
from modelopt_tdq.lab.bench.temporal.measure import Yardstick, measure
from modelopt_tdq.lab.bench.temporal.rows import TemporalBudget, TemporalRun, runs
from modelopt_tdq.lab.example_call import example_call
from modelopt_tdq.lab.features import compute_features
from modelopt_tdq.lab.image_metrics.efficientnet import EfficientNetLite0
from modelopt_tdq.lab.image_metrics.extractor import FeatureExtractor
from modelopt_tdq.lab.image_metrics.images import to_uint8
from modelopt_tdq.lab.image_metrics.statistics import feature_statistics
from modelopt_tdq.lab.judge import reference
from modelopt_tdq.lab.maintenance import schedule_times
from modelopt_tdq.lab.model_folder import load_model
from modelopt_tdq.lab.provenance import PACKAGES, provenance
from modelopt_tdq.lab.trajectories import calibration_loop, is_unconditional, load_scheduler

__all__ = ["TemporalBench", "maintained", "run_rows", "yardstick"]

#: Seeds of what is calibrated on, and of what is judged.
_CALIBRATION_SEED, _JUDGED_SEED = 0, 77_001

#: Cost of the steps that have no ticks, in ticks; only for the time left.
_CALIBRATION, _MAINTENANCE, _DEPLOYMENT = 150, 40, 60


@dataclass(frozen=True)
class TemporalBench(OfModel):
    """What all rows share.

    Attributes:
        model: Folder of the full-precision model, with its scheduler.
        budget: What it may cost.
        output: Folder of the results.
    """

    budget: TemporalBudget
    output: Path

    @property
    def path(self) -> Path:
        """Of the results; the suffix is still to be added."""
        return self.output / f"{self.name}_{self.budget.name}"

    def key(self, run: TemporalRun) -> str:
        """Of a row in the store; with ``-deployed`` behind it, of what its export is."""
        return run.key(self.checksum, self.budget)


def _extractor() -> FeatureExtractor | None:
    try:
        return EfficientNetLite0()
    except MissingExtraError:
        return None


def yardstick(model: nn.Module, scheduler: Any, budget: TemporalBudget, tick: Callable[[], None]) -> Yardstick:
    """Full-precision trajectories, temporal features and images; ``tick`` is called after every step."""
    references = {
        steps: reference(model, scheduler, samples, steps, _JUDGED_SEED, tick)
        for steps, samples in budget.judged.items()
    }
    times = torch.tensor(schedule_times(scheduler, list(budget.judged)))
    extractor = _extractor()
    shortest = references[min(references)]
    images = None if extractor is None else feature_statistics(to_uint8(shortest.images), extractor)
    return Yardstick(scheduler, references, times, compute_features(model, times), extractor, images)


def maintained(calibrated: nn.Module, run: TemporalRun, times: Tensor, iterations: int) -> tuple[nn.Module, float]:
    """A copy of a calibrated model with its temporal features as the row wants them, and the seconds that took."""
    import modelopt.torch.quantization as mtq

    model = copy.deepcopy(calibrated)
    if run.options is None:
        return model, 0.0
    call = example_call(model, 1)
    algorithm = {
        "method": "tdq_temporal",
        "recalibrate": False,
        "times": times.tolist(),
        "iterations": iterations,
        "progress": False,
        **run.options,
    }
    start = time.perf_counter()
    with torch.no_grad():
        mtq.calibrate(model, algorithm, lambda m: m(**call))
    return model, time.perf_counter() - start


def _calibrated(model: nn.Module, scheduler: Any, run: TemporalRun, budget: TemporalBudget) -> nn.Module:
    import modelopt.torch.quantization as mtq

    steps = budget.calibration_steps
    config = make_config(
        run.weight_bits,
        run.activation_bits,
        asymmetric="auto" if run.activation_bits < 8 else False,
        correction="none",  # the papers have none
        progress=False,
    )
    loop = calibration_loop(scheduler, budget.calibration_samples * steps, steps, _CALIBRATION_SEED)
    quantized: nn.Module = mtq.quantize(copy.deepcopy(model), config, loop)
    return quantized


def run_rows(bench: TemporalBench, store: Store, command: str) -> None:
    """Run what the store does not have yet.

    All rows of the same bits share one calibration; what differs is what becomes of the temporal features after it.

    Args:
        bench: What the rows share.
        store: Of the results.
        command: To write beside each result.

    Raises:
        TdqError: There is no such model, it needs more than noise, a time and classes, or has no temporal features;
            or what the store has is of other settings or versions.
    """
    budget = bench.budget

    def missing(run: TemporalRun) -> list[str]:
        wanted = [""]
        if (run.weight_bits, run.activation_bits) in budget.deployed:
            wanted.append("-deployed")
        return [suffix for suffix in wanted if bench.key(run) + suffix not in store.runs]

    todo = {run: parts for run in runs() if (parts := missing(run))}
    if not todo:
        return
    store.begin(bench.checksum, facts(bench.model, PACKAGES))
    model, scheduler = load_model(bench.model), load_scheduler(bench.model)
    if not is_unconditional(model):
        raise TdqError("model", bench.name, "it takes more than noise, a time and classes", "Name another model")
    steps = sum(budget.judged)
    groups = [list(group) for _, group in groupby(todo, key=lambda run: run.bits)]
    cost = {"": 2 * steps, "-deployed": _DEPLOYMENT}
    total = steps + len(groups) * _CALIBRATION + sum(_MAINTENANCE + sum(cost[p] for p in todo[r]) for r in todo)
    with labelled_progress(total) as advance:
        against = yardstick(model, scheduler, budget, lambda: advance("full precision", 1))
        for group in groups:
            advance(f"{group[0].bits}, calibration", 0)
            calibrated = _calibrated(model, scheduler, group[0], budget)
            advance(f"{group[0].bits}, calibration", _CALIBRATION)
            for run in group:
                label = f"{run.bits}, {run.label}"
                advance(label, 0)
                student, seconds = maintained(calibrated, run, against.times, budget.iterations)
                advance(label, _MAINTENANCE)
                about = {"run": asdict(run), "source": provenance(command)}
                if "" in todo[run]:
                    found = measure(student, against, lambda label=label: advance(label, 1))  # type: ignore[misc]
                    store.add(bench.key(run), {**found, "maintenance_seconds": round(seconds, 1), **about})
                if "-deployed" in todo[run]:
                    store.add(bench.key(run) + "-deployed", {**deploy(student), **about})
                    advance(label, _DEPLOYMENT)
