"""Which component of a pipeline is the denoiser: the one whose forward takes the time."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from modelopt_tdq.errors import TdqError
from modelopt_tdq.pipeline.engine_denoiser import EngineDenoiser

__all__ = ["denoiser_name"]


def _components(pipeline: Any) -> dict[str, Any]:
    components: Any = getattr(pipeline, "components", None)
    if not isinstance(components, dict):
        raise TdqError(
            "pipeline", type(pipeline).__name__, "not a diffusers pipeline", "Pass one, or quantize the model itself"
        )
    return components


def denoiser_name(pipeline: Any, component: str | None, timestep: str) -> str:
    """Name of the denoiser among the components of ``pipeline``.

    Args:
        pipeline: From diffusers.
        component: Its name, if the caller knows it.
        timestep: The argument of its forward that holds the time.

    Raises:
        TdqError: There is no such component, or none or several take the time.
    """
    components = _components(pipeline)
    models = {name: value for name, value in components.items() if isinstance(value, nn.Module)}
    if component is not None:
        if component not in models:
            raise TdqError("component", component, "the pipeline has no such model", f"It has {', '.join(models)}")
        return component
    found = [name for name, model in models.items() if timestep in _arguments(model)]
    if not found:
        raise TdqError(
            "component",
            list(models),
            f"no model of the pipeline takes `{timestep}`",
            "Name the denoiser: component='transformer'",
        )
    if len(found) > 1:
        raise TdqError("component", found, "several models take a time", f"Name the denoiser: component={found[0]!r}")
    return found[0]


def _arguments(model: nn.Module) -> Iterable[str]:
    """Of the model's forward; an engine in its place is called like the original."""
    original = model.original if isinstance(model, EngineDenoiser) else model
    return inspect.signature(original.forward).parameters
