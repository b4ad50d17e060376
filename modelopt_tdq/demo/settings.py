"""What the demo does: its settings, checked once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from modelopt_tdq.config import RECIPES, recipe
from modelopt_tdq.demo.bundled import bundled_model
from modelopt_tdq.errors import TdqError
from modelopt_tdq.maintenance import check_maintenance

__all__ = ["DEFAULT_PRESETS", "SEEDS", "DemoSettings", "preset_label"]

#: The recipes that the demo compares by default.
DEFAULT_PRESETS = ("int8", "w8a4", "w4a8", "w4a4")

#: Different noise for calibration and for judging.
SEEDS = {"calibration": 0, "judging": 1}

#: The one that is deployed: below 8 bits codes travel as INT8, so engine and speed are the same.
DEPLOYED = "int8"


def preset_label(preset: str) -> str:
    """``"int8"`` → ``"W8A8"``: bits of weights and activations; FP8 keeps its name."""
    return {"int8": "W8A8", "fp8": "FP8"}.get(preset, preset.upper())


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo.

    Attributes:
        output: Folder for everything it writes.
        presets: Recipes to compare.
        steps: DDIM steps of the trajectories that are judged.
        samples: Trajectories, and images, that are judged.
        calibration_samples: Trajectories for calibration.
        calibration_steps: DDIM steps of those.
        engines: Whether to export, build TensorRT-RTX engines, and time OpenVINO.
        batch: Of the OpenVINO measurement.
        workers: Processes; by default one per processor core, up to one per preset.
        restart: Do everything again, whatever an earlier run left.
        maintenance: What becomes of the temporal features where scales follow time, see
            :data:`modelopt_tdq.maintenance.MAINTENANCE`.

    Raises:
        TdqError: A number is too small, or a preset unknown.
    """

    output: Path = field(default_factory=lambda: Path("tdq-demo"))
    presets: tuple[str, ...] = DEFAULT_PRESETS
    steps: int = 50
    samples: int = 8
    calibration_samples: int = 16
    calibration_steps: int = 20
    engines: bool = True
    batch: int = 8
    workers: int | None = None
    restart: bool = False
    maintenance: str = "none"

    def __post_init__(self) -> None:
        unknown = [preset for preset in self.presets if preset not in RECIPES]
        if unknown or not self.presets or len(set(self.presets)) < len(self.presets):
            raise TdqError(
                "presets", unknown or list(self.presets), "not different bundled recipes", f"Use {', '.join(RECIPES)}"
            )
        check_maintenance(self.maintenance)
        smallest = {"steps": 2, "samples": 1, "calibration_samples": 1, "calibration_steps": 2, "batch": 1}
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise TdqError(name, getattr(self, name), "too small", f"Use at least {least}")
        if self.workers is not None and self.workers < 1:
            raise TdqError("workers", self.workers, "too small", "Use at least 1")
        if self.output.exists() and not self.output.is_dir():
            raise TdqError("output", str(self.output), "it is a file", "Name a folder")

    @property
    def processes(self) -> int:
        """Worker processes."""
        return self.workers or max(1, min(cores(), len(self.presets)))

    @property
    def threads(self) -> int:
        """Threads of each worker: those that PyTorch has here, shared out."""
        return max(1, torch.get_num_threads() // self.processes)

    def judged(self) -> dict[str, Any]:
        """What the full-precision trajectories depend on."""
        return {"model": _model_checksum(), "steps": self.steps, "samples": self.samples, "seed": SEEDS["judging"]}

    def calibrated(self, preset: str) -> dict[str, Any]:
        """What a calibration depends on."""
        depends = {
            "model": _model_checksum(),
            "recipe": recipe(preset),
            "samples": self.calibration_samples,
            "steps": self.calibration_steps,
            "seed": SEEDS["calibration"],
        }
        if self.maintenance != "none":
            depends |= {"maintenance": self.maintenance, "sampling_steps": self.steps}
        return depends

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"output": str(self.output), "presets": list(self.presets), "seeds": SEEDS}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DemoSettings:
        """The inverse of :meth:`to_dict`."""
        known = {name: value for name, value in data.items() if name in cls.__dataclass_fields__}
        return cls(**{**known, "output": Path(data["output"]), "presets": tuple(data["presets"])})


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@lru_cache(maxsize=1)
def _model_checksum() -> str:
    weights = bundled_model() / "diffusion_pytorch_model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()
