"""Makes and judges the rows; finished ones are kept, so that it can go on after an interruption."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modelopt_tdq.core.metrics import json_numbers
from modelopt_tdq.errors import TdqError, require
from modelopt_tdq.lab.bench.cifar10 import load_cifar10
from modelopt_tdq.lab.bench.qat_run import Data
from modelopt_tdq.lab.bench.rivals.rows import Row, chosen_rows, made
from modelopt_tdq.lab.bench.rivals.setting import FORMATS, Format, Setting, quantized_layers
from modelopt_tdq.lab.bench.supplement import Store, labelled_progress
from modelopt_tdq.lab.image_metrics.efficientnet import EfficientNetLite0
from modelopt_tdq.lab.image_metrics.extractor import FeatureExtractor
from modelopt_tdq.lab.image_metrics.frechet import frechet_distance
from modelopt_tdq.lab.image_metrics.images import to_uint8
from modelopt_tdq.lab.image_metrics.statistics import FeatureStatistics, feature_statistics
from modelopt_tdq.lab.judge import Reference, folded, judge, reference
from modelopt_tdq.lab.provenance import installed_versions, provenance
from modelopt_tdq.lab.reference_models import ReferenceModel, reference_model
from modelopt_tdq.lab.trajectories import noise, sample, sample_shape

__all__ = ["Bench", "Place", "Subject", "places", "run_rows", "subject"]

#: Seeds of what is calibrated on, what is judged, and the images for the Fréchet distance.
_CALIBRATION_SEED, _JUDGED_SEED, _IMAGE_SEED = 0, 1, 2

#: Channels of the images that have a Fréchet distance: its network looks at colours.
_COLOURS = 3

#: Images in a call.
_BATCH = 64

#: Whose versions may change a result.
_PACKAGES = ("modelopt-tdq", "nvidia-modelopt", "torch", "diffusers")


@dataclass(frozen=True, eq=False)
class Subject:
    """A reference model, loaded.

    Attributes:
        about: Its name, its files, and sizes that suit it.
        model: In eval mode.
        scheduler: Deterministic.
    """

    about: ReferenceModel
    model: nn.Module
    scheduler: Any


@cache
def subject(name: str) -> Subject:
    """Load the reference model of a name.

    Raises:
        TdqError: There is none, or its files are missing.
    """
    about = reference_model(name)
    return Subject(about, about.load_model(), about.load_scheduler())


@dataclass(frozen=True)
class Bench:
    """What is compared, and how.

    Attributes:
        models: Names of reference models.
        formats: Names of the number formats.
        output: Folder of the results.
        only: Names of the rows; empty for all.
        long: Those as well that take long.
        samples: Calibration trajectories; None: what suits the model.
        held_out: Trajectories to judge on; None: what suits the model.
        steps: Of a trajectory; None: what suits the model.
        frechet: Images for the Fréchet distance, of models that make images in colour; 0: none.
        data: ``cifar10.npz`` for QAT; None: none.
        iterations: Of the reconstruction, per block.
        training_steps: Of QAT.
        progress: Whether algorithms show their progress.
    """

    models: Sequence[str]
    formats: Sequence[str]
    output: Path
    only: Sequence[str] = ()
    long: bool = False
    samples: int | None = None
    held_out: int | None = None
    steps: int | None = None
    frechet: int = 0
    data: Path | None = None
    iterations: int = 1000
    training_steps: int = 1000
    progress: bool = True

    def __post_init__(self) -> None:
        for name in self.formats:
            if name not in FORMATS:
                raise TdqError("formats", name, "no such number format", f"Use some of {', '.join(FORMATS)}")
        chosen_rows(self.only, self.long)
        if "qat" in self.only and self.data is None:
            raise TdqError("data", None, "QAT needs images to train on", "Pass --data cifar10.npz")

    @property
    def path(self) -> Path:
        """Of the results; the suffix is still to be added."""
        return self.output / "rivals"


@dataclass(frozen=True)
class Place:
    """One row of one table.

    Attributes:
        subject: The model.
        bits: The number format.
        row: The row.
        sizes: What else the result depends on.
    """

    subject: Subject
    bits: Format
    row: Row
    sizes: dict[str, int] = field(hash=False)

    @property
    def key(self) -> str:
        """In the store: the same for what would give the same result."""
        what = json.dumps([self.subject.about.checksum(), self.bits.name, self.row.name, self.sizes], sort_keys=True)
        return hashlib.sha256(what.encode()).hexdigest()[:16]


def _sizes(bench: Bench, of: Subject, row: Row) -> dict[str, int]:
    sizes = {
        "samples": bench.samples or of.about.calibration_samples,
        "held_out": bench.held_out or of.about.samples,
        "steps": bench.steps or of.about.calibration_steps,
        "frechet": bench.frechet if sample_shape(of.model)[0] == _COLOURS else 0,
    }
    if row.long:
        sizes |= {"iterations": bench.iterations, "training_steps": bench.training_steps}
    return sizes


def _setting(bench: Bench, of: Subject, bits: Format, images: Data | None) -> Setting:
    sizes = _sizes(bench, of, chosen_rows(bench.only, bench.long)[0])
    shape = sample_shape(of.model)
    fits = images is not None and tuple(images.train[0].shape[1:]) == shape
    return Setting(
        of.model,
        of.scheduler,
        bits,
        noise(sizes["samples"], shape, _CALIBRATION_SEED),
        sizes["steps"],
        bench.iterations,
        bench.training_steps,
        images if fits else None,
        bench.progress,
    )


def _images(bench: Bench) -> Data | None:
    if bench.data is None or (not bench.long and not bench.only):
        return None
    return _cifar10(bench.data)


@cache
def _cifar10(file: Path) -> Data:
    diffusers = require("diffusers", "diffusers")
    return Data(load_cifar10(file), load_cifar10(file, "test"), diffusers.DDPMScheduler())


def places(bench: Bench) -> dict[tuple[str, str], list[Place]]:
    """Model and format to the rows that apply, all in the order of the tables.

    Raises:
        TdqError: There is no such model.
    """
    images = _images(bench)
    found: dict[tuple[str, str], list[Place]] = {}
    for name in bench.models:
        of = subject(name)
        for bits in (one for one in FORMATS.values() if one.name in bench.formats):
            setting = _setting(bench, of, bits, images)
            rows = [row for row in chosen_rows(bench.only, bench.long) if row.applies(setting)]
            found[name, bits.name] = [Place(of, bits, row, _sizes(bench, of, row)) for row in rows]
    return found


@dataclass(frozen=True)
class _Yardstick:
    """Full precision: held-out trajectories, and statistics of images."""

    held_out: Reference
    extractor: FeatureExtractor | None
    images: FeatureStatistics | None


def _statistics(model: nn.Module, of: Subject, place: Place, extractor: FeatureExtractor) -> FeatureStatistics:
    """Of as many images as asked for."""
    start = noise(place.sizes["frechet"], sample_shape(of.model), _IMAGE_SEED)
    images = [sample(model, of.scheduler, part, place.sizes["steps"]) for part in torch.split(start, _BATCH)]
    return feature_statistics(to_uint8(torch.cat(images).clamp(-1.0, 1.0)), extractor)


def _yardstick(place: Place) -> _Yardstick:
    of, sizes = place.subject, place.sizes
    held_out = reference(of.model, of.scheduler, sizes["held_out"], sizes["steps"], _JUDGED_SEED, lambda: None)
    if not sizes["frechet"]:
        return _Yardstick(held_out, None, None)
    extractor = EfficientNetLite0()
    return _Yardstick(held_out, extractor, _statistics(of.model, of, place, extractor))


def _measure(model: nn.Module, place: Place, against: _Yardstick, tick: Callable[[], None]) -> dict[str, Any]:
    judgement = judge(model, place.subject.scheduler, against.held_out, tick)
    decibels = judgement.sqnr_db
    found: dict[str, Any] = {
        "sqnr_db": decibels,
        "mean_sqnr_db": math.fsum(decibels) / len(decibels),
        "worst_sqnr_db": min(decibels),
        "psnr_db": judgement.psnr_db,
        "frechet": None,
    }
    if against.extractor is not None and against.images is not None:
        images = _statistics(folded(model), place.subject, place, against.extractor)
        found["frechet"] = frechet_distance(against.images, images)
    numbers: dict[str, Any] = json_numbers(found)
    return numbers


def run_rows(bench: Bench, store: Store, command: str) -> None:
    """Run what the store does not have yet; a row that fails is kept with the reason, and is tried again the next time.

    Args:
        bench: What is compared.
        store: Of the results.
        command: To write beside each result.

    Raises:
        TdqError: There is no such model, or what the store has is of other versions.
    """
    todo = {
        table: missing
        for table, all_places in places(bench).items()
        if (missing := [p for p in all_places if "psnr_db" not in store.runs.get(p.key, {})])
    }
    images = _images(bench)
    yardsticks: dict[str, _Yardstick] = {}  # of one model at a time
    with labelled_progress(sum(3 * p.sizes["steps"] for rows in todo.values() for p in rows)) as advance:
        for rows in todo.values():
            of, bits = rows[0].subject, rows[0].bits
            store.begin(of.about.checksum(), {"versions": installed_versions(_PACKAGES)})
            name = of.about.name
            if name not in yardsticks:
                advance(f"{name} full precision", 0)
                yardsticks = {name: _yardstick(rows[0])}
            against = yardsticks[name]
            setting = _setting(bench, of, bits, images)
            for place in rows:
                label = f"{name} {bits.name} {place.row.name}"
                advance(label, 0)
                found = _one(place, setting, against, lambda label=label: advance(label, 1))  # type: ignore[misc]
                about = {"model": name, "format": bits.name, "row": place.row.name, "sizes": place.sizes}
                store.add(place.key, {**about, **found, "source": provenance(command)})
                advance(label, place.sizes["steps"])


def _one(place: Place, setting: Setting, against: _Yardstick, tick: Callable[[], None]) -> dict[str, Any]:
    """What was found of one row."""
    start = time.perf_counter()
    try:
        model = made(place.row, setting)
    except TdqError as error:
        return {"failed": str(error)}
    seconds = time.perf_counter() - start
    found = {"layers": len(quantized_layers(model)), "of_layers": len(setting.layers)}
    return {**found, **_measure(model, place, against, tick), "calibration_seconds": round(seconds, 1)}
