"""What the demo does: its settings, checked once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modelopt_tdq.config import RECIPES, recipe
from modelopt_tdq.core.files import require_writable
from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.maintenance import check_maintenance
from modelopt_tdq.lab.placement import Placement
from modelopt_tdq.lab.reference_models import REFERENCE_MODELS, ReferenceModel, model_of
from modelopt_tdq.lab.trajectories import is_unconditional

__all__ = ["DEFAULT_RECIPES", "SEEDS", "DemoSettings", "recipe_label"]

#: The recipes that the demo compares by default.
DEFAULT_RECIPES = ("int8", "w8a4", "w4a8", "w4a4")

#: Different noise for calibration and for judging.
SEEDS = {"calibration": 0, "judging": 1}

#: Place and type that results of earlier versions are from.
_USUAL = ("cpu", "fp32")

#: The one that is deployed: below 8 bits codes travel as INT8, so engine and speed are the same.
DEPLOYED = "int8"


def recipe_label(recipe_name: str) -> str:
    """``"int8"`` → ``"W8A8"``: bits of weights and activations; FP8 keeps its name."""
    return {"int8": "W8A8", "fp8": "FP8"}.get(recipe_name, recipe_name.upper())


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo. The defaults suit the bundled model; :meth:`for_model` takes those of any other.

    Attributes:
        output: Folder for everything it writes.
        model: Name of a reference model, or folder of a diffusers model with its scheduler.
        recipes: Recipes to compare.
        steps: Sampling steps of the trajectories that are judged.
        samples: Trajectories, and images, that are judged.
        calibration_samples: Trajectories for calibration.
        calibration_steps: Sampling steps of those.
        engines: Whether to export, build TensorRT-RTX engines, and time OpenVINO.
        batch: Of the OpenVINO measurement.
        workers: Processes; by default one per processor core, up to one per recipe_name.
        restart: Do everything again, whatever an earlier run left.
        device: Where the models compute, see :meth:`modelopt_tdq.lab.placement.Placement.of`.
        dtype: Of their weights; engines are made of fp32 models.
        offload: What of them waits in CPU memory meanwhile.
        maintenance: What becomes of the temporal features where scales follow time, see
            :data:`modelopt_tdq.lab.maintenance.MAINTENANCE`.

    Raises:
        TdqError: A number is too small, or a recipe_name unknown.
    """

    output: Path = field(default_factory=lambda: Path("tdq-demo"))
    recipes: tuple[str, ...] = DEFAULT_RECIPES
    steps: int = 50
    samples: int = 8
    calibration_samples: int = 16
    calibration_steps: int = 20
    engines: bool = True
    batch: int = 8
    workers: int | None = None
    restart: bool = False
    maintenance: str = "none"
    model: str = "unet"
    device: str = "cpu"
    dtype: str = "fp32"
    offload: str = "none"

    def __post_init__(self) -> None:
        unknown = [recipe_name for recipe_name in self.recipes if recipe_name not in RECIPES]
        if unknown or not self.recipes or len(set(self.recipes)) < len(self.recipes):
            raise TdqError(
                "recipes", unknown or list(self.recipes), "not different bundled recipes", f"Use {', '.join(RECIPES)}"
            )
        check_maintenance(self.maintenance)
        smallest = {"steps": 2, "samples": 1, "calibration_samples": 1, "calibration_steps": 2, "batch": 1}
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise TdqError(name, getattr(self, name), "too small", f"Use at least {least}")
        if self.workers is not None and self.workers < 1:
            raise TdqError("workers", self.workers, "too small", "Use at least 1")
        require_writable(self.output, folder=True)
        Placement.of(self.device, self.dtype, self.offload)
        if self.engines and self.dtype != "fp32":
            problem = "engines are built, and OpenVINO is timed, of models in fp32"
            raise TdqError("dtype", self.dtype, problem, "Add --no-engines")

    @classmethod
    def for_model(cls, model: str, **given: Any) -> DemoSettings:
        """Settings with the numbers of steps, of samples, and the batch that suit a model, where none are given.

        Args:
            model: Name of a reference model, or a folder.
            **given: Other settings; None for what suits the model.
        """
        chosen = model_of(model)
        suited = {
            "steps": chosen.steps,
            "samples": chosen.samples,
            "calibration_steps": chosen.calibration_steps,
            "calibration_samples": chosen.calibration_samples,
            "batch": chosen.batch,
        }
        return cls(model=model, **suited | {name: value for name, value in given.items() if value is not None})

    @property
    def chosen(self) -> ReferenceModel:
        """The model, and how to load it."""
        return model_of(self.model)

    @property
    def placement(self) -> Placement:
        """Where the models compute."""
        return Placement.of(self.device, self.dtype, self.offload)

    def load(self) -> tuple[nn.Module, Any]:
        """The model in full precision, in its type, on the CPU; and its scheduler.

        Raises:
            TdqError: One is missing, or the model takes more than noise, a time and class labels.
        """
        model = self.chosen.load_model()
        if not is_unconditional(model):
            problem = f"{type(model).__name__} takes more than a sample and a time"
            raise TdqError("model", self.model, problem, f"Use {', '.join(REFERENCE_MODELS)}, or a model without text")
        return model.to(self.placement.dtype), self.chosen.load_scheduler()

    @property
    def processes(self) -> int:
        """Worker processes."""
        return self.workers or max(1, min(cores(), len(self.recipes)))

    @property
    def threads(self) -> int:
        """Threads of each worker: those that PyTorch has here, shared out."""
        return max(1, torch.get_num_threads() // self.processes)

    def judged(self) -> dict[str, Any]:
        """What the full-precision trajectories depend on."""
        depends = {"model": self.chosen.checksum(), "steps": self.steps, "samples": self.samples}
        return {**depends, "seed": SEEDS["judging"], **self._placed()}

    def _placed(self) -> dict[str, Any]:
        """Of the place, what results depend on; nothing of the usual one."""
        return {name: own for name, own in {"device": self.device, "dtype": self.dtype}.items() if own not in _USUAL}

    def calibrated(self, recipe_name: str) -> dict[str, Any]:
        """What a calibration depends on."""
        depends = {
            "model": self.chosen.checksum(),
            "recipe": recipe(recipe_name),
            "samples": self.calibration_samples,
            "steps": self.calibration_steps,
            "seed": SEEDS["calibration"],
            **self._placed(),
        }
        if self.maintenance != "none":
            depends |= {"maintenance": self.maintenance, "sampling_steps": self.steps}
        return depends

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"output": str(self.output), "recipes": list(self.recipes), "seeds": SEEDS}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DemoSettings:
        """The inverse of :meth:`to_dict`."""
        known = {name: value for name, value in data.items() if name in cls.__dataclass_fields__}
        return cls(**{**known, "output": Path(data["output"]), "recipes": tuple(data["recipes"])})


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
