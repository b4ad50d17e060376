"""The model and the calibration data that the command line names."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from modelopt_tdq.cli.script import script_file
from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.placement import Placement
from modelopt_tdq.lab.reference_models import model_of
from modelopt_tdq.lab.trajectories import is_unconditional, noise, sample, sample_shape

__all__ = ["Calibrated", "load_function", "prepare"]


@dataclass(frozen=True)
class Calibrated:
    """A model, and how to calibrate it.

    Attributes:
        model: In full precision.
        source: Where it came from.
        forward_loop: For ``mtq.quantize``.
        expected_calls: Of the model in one ``forward_loop``; None if unknown.
        steps: Of a sampling trajectory.
        done: What the calibration is, as plain data for JSON.
    """

    model: nn.Module
    source: str
    forward_loop: Callable[[nn.Module], Any]
    expected_calls: int | None
    steps: int
    done: dict[str, Any]


def load_function(reference: str, option: str) -> Callable[..., Any]:
    """A function of a Python file, named as ``file.py:function``. Executes the file.

    Raises:
        TdqError: The form is another, the file does not exist, or has no such function.
    """
    file, name = script_file(reference, option)
    path = str(file)
    spec = importlib.util.spec_from_file_location(f"modelopt_tdq_user_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise TdqError(option, path, "not a Python file", "Name a file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise TdqError(option, name, f"{path} has no such function", "Define it at the top level of the file")
    return function  # type: ignore[no-any-return]


def prepare(
    model: str | None,
    subfolder: str | None,
    script: str | None,
    samples: int | None,
    steps: int | None,
    seed: int,
    most_samples: int | None = None,
    placement: Placement | None = None,
) -> Calibrated:
    """Load the model and choose its calibration: the user's script, or the model's own sampling trajectories.

    Args:
        model: Name of a reference model, folder or hub id; None for the bundled one.
        subfolder: Of the model in the folder.
        script: The user's, as ``file.py:function``.
        samples: Trajectories; by default as many as suit the model.
        steps: Of each; by default as many as suit the model.
        seed: Of their noise.
        most_samples: That a default may be.
        placement: Of the model; by default as it is loaded.

    Raises:
        TdqError: Something cannot be loaded; the model takes more than a sample and a time, and there is no script.
    """
    chosen = model_of(model or "unet", subfolder)
    function = None if script is None else load_function(script, "calibration_script")
    steps = steps or chosen.calibration_steps
    samples = samples or min(chosen.calibration_samples, most_samples or chosen.calibration_samples)
    loaded = chosen.load_model()
    if function is None and not is_unconditional(loaded):
        raise TdqError(
            "calibration_script",
            None,
            f"{type(loaded).__name__} takes more than a sample and a time, so it cannot be sampled from noise alone",
            "Pass --calibration-script file.py:function, which gets the model and samples with it",
        )
    if placement is not None:
        placement.place(loaded)
    if function is not None:
        return Calibrated(loaded, chosen.name, function, None, steps, {"script": script})
    scheduler = chosen.load_scheduler()
    start = noise(samples, sample_shape(loaded), seed)
    if placement is not None:
        start = placement.moved(start)

    def forward_loop(model: nn.Module) -> None:
        sample(model, scheduler, start, steps)

    done = {"scheduler": type(scheduler).__name__, "samples": samples, "steps": steps, "seed": seed}
    return Calibrated(loaded, chosen.name, forward_loop, len(_calls(scheduler, steps)), steps, done)


def _calls(scheduler: Any, steps: int) -> Any:
    scheduler.set_timesteps(steps)
    return scheduler.timesteps
