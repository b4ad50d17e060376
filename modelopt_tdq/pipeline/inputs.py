"""What a pipeline passes to its denoiser: the inputs of an export, and of a comparison per time step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.recording import recorded_calls
from modelopt_tdq.model.wrapped import eager
from modelopt_tdq.pipeline.calls import call_arguments, quiet
from modelopt_tdq.pipeline.component import denoiser, denoiser_name

__all__ = ["sample_inputs", "trajectory_inputs"]


def sample_inputs(
    pipeline: Any, component: str | None = None, timestep: str = "timestep", **call: Any
) -> dict[str, Any]:
    """What the pipeline passes to its denoiser in the first step of one call: ``sample_inputs`` of an export.

    Args:
        pipeline: From diffusers.
        component: Name of the denoiser, where several components take a time, or of a module inside a component.
        timestep: The argument of its forward that holds the time.
        **call: Keyword arguments of the pipeline; ``num_inference_steps`` is 2 unless given.

    Returns:
        By name of the argument; what is None is left out. A time in whole numbers becomes float32, so that the engine
        also serves schedulers whose times are fractions. A number becomes part of the graph: for one that changes from
        call to call, such as a ControlNet's ``conditioning_scale``, put ``torch.tensor(1.0)`` in its place.

    Raises:
        TdqError: The pipeline has no denoiser, or does not call it.
    """
    return _recorded(pipeline, component, timestep, call, 1)[0]


def trajectory_inputs(
    pipeline: Any, component: str | None = None, timestep: str = "timestep", **call: Any
) -> list[dict[str, Any]]:
    """What the pipeline passes to its denoiser in every step of one call, in the order in which it does.

    Inputs at different times are not interchangeable, so a comparison per time step needs a trajectory.

    Args:
        pipeline: From diffusers.
        component: Name of the denoiser, where several components take a time, or of a module inside a component.
        timestep: The argument of its forward that holds the time.
        **call: Keyword arguments of the pipeline; ``num_inference_steps`` is 2 unless given.

    Returns:
        As :func:`sample_inputs` gives for the first; two per step of a pipeline, such as Wan's, that calls its denoiser
        once with the text and once without.

    Raises:
        TdqError: The pipeline has no denoiser, or does not call it.
    """
    return _recorded(pipeline, component, timestep, call, None)


def _recorded(
    pipeline: Any, component: str | None, timestep: str, call: dict[str, Any], most: int | None
) -> list[dict[str, Any]]:
    model = denoiser(pipeline, denoiser_name(pipeline, component, timestep))
    arguments = next(call_arguments(pipeline, None, [call], 2, 0))
    with eager(), recorded_calls(model, most) as calls, quiet(pipeline):
        pipeline(**arguments)
    if not calls:
        raise TdqError("call", sorted(call), "the pipeline did not run its denoiser", "Pass the arguments of a call")
    return [_inputs(call, timestep) for call in calls]


def _inputs(call: dict[str, Any], timestep: str) -> dict[str, Any]:
    found = {name: value for name, value in call.items() if value is not None and name != "return_dict"}
    time = found.get(timestep)
    if isinstance(time, Tensor) and not time.is_floating_point():
        found[timestep] = time.float()
    return found
