"""The model and the calibration data that the command line names."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.model_folder import load_model
from modelopt_tdq.lab.trajectories import is_unconditional, load_scheduler, noise, sample, sample_shape

__all__ = ["Calibrated", "load_function", "prepare"]


@dataclass(frozen=True)
class Calibrated:
    """A model, and how to calibrate it.

    Attributes:
        model: In full precision.
        source: Where it came from.
        forward_loop: For ``mtq.quantize``.
        expected_calls: Of the model in one ``forward_loop``; None if unknown.
        done: What the calibration is, as plain data for JSON.
    """

    model: nn.Module
    source: str
    forward_loop: Callable[[nn.Module], Any]
    expected_calls: int | None
    done: dict[str, Any]


def load_function(reference: str, option: str) -> Callable[..., Any]:
    """A function of a Python file, named as ``file.py:function``. Executes the file.

    Raises:
        TdqError: The form is another, the file does not exist, or has no such function.
    """
    path, separator, name = reference.rpartition(":")
    if not separator or not name.isidentifier():
        raise TdqError(option, reference, "not of the form file.py:function", "For example calibrate.py:forward_loop")
    file = Path(path)
    if not file.is_file():
        raise TdqError(option, path, "no such file", "Name a Python file")
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
    model: str | None, subfolder: str | None, script: str | None, samples: int, steps: int, seed: int
) -> Calibrated:
    """Load the model and choose its calibration: the user's script, or the model's own sampling trajectories.

    Raises:
        TdqError: Something cannot be loaded; the model takes more than a sample and a time, and there is no script.
    """
    if model is None:
        from modelopt_tdq.lab.demo.bundled import bundled_model

        model = str(bundled_model())
    function = None if script is None else load_function(script, "calibration_script")
    loaded = load_model(model, subfolder)
    if function is not None:
        return Calibrated(loaded, model, function, None, {"script": script})
    if not is_unconditional(loaded):
        raise TdqError(
            "calibration_script",
            None,
            f"{type(loaded).__name__} takes more than a sample and a time, so it cannot be sampled from noise alone",
            "Pass --calibration-script file.py:function, which gets the model and samples with it",
        )
    scheduler = load_scheduler(model)
    start = noise(samples, sample_shape(loaded), seed)

    def forward_loop(model: nn.Module) -> None:
        sample(model, scheduler, start, steps)

    done = {"scheduler": type(scheduler).__name__, "samples": samples, "steps": steps, "seed": seed}
    return Calibrated(loaded, model, forward_loop, len(_calls(scheduler, steps)), done)


def _calls(scheduler: Any, steps: int) -> Any:
    scheduler.set_timesteps(steps)
    return scheduler.timesteps
