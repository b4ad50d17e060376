"""Which component of a pipeline is the denoiser: the one whose forward takes the time; and how it is exchanged."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.wrapped import unwrapped
from modelopt_tdq.pipeline.engine_denoiser import EngineDenoiser

__all__ = ["denoiser", "denoiser_name", "put_denoiser"]


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
        component: Its name, if the caller knows it; or that of a module inside a component, as ``controlnet.nets.0`` of
            several ControlNets.
        timestep: The argument of its forward that holds the time.

    Raises:
        TdqError: There is no such component, or none or several take the time.
    """
    components = _components(pipeline)
    models = {name: value for name, value in components.items() if isinstance(value, nn.Module)}
    if component is not None:
        name, _, inner = component.partition(".")
        if name not in models:
            raise TdqError("component", component, "the pipeline has no such model", f"It has {', '.join(models)}")
        inside = [path for path, _ in unwrapped(models[name]).named_modules()]
        if inner not in inside:
            raise TdqError("component", component, "no such module", f"There are, for example, {inside[1:6]}")
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
    original = model.original if isinstance(model, EngineDenoiser) else unwrapped(model)
    return inspect.signature(original.forward).parameters


def denoiser(pipeline: Any, name: str) -> nn.Module:
    """The model with a name from :func:`denoiser_name`, without what ``torch.compile`` and the like put around it."""
    component, _, inner = name.partition(".")
    outer: nn.Module = unwrapped(getattr(pipeline, component))
    return unwrapped(outer.get_submodule(inner))


def put_denoiser(pipeline: Any, name: str, model: nn.Module) -> None:
    """Put another model in the place of that one, wrappers included."""
    component, _, inner = name.partition(".")
    if not inner:
        setattr(pipeline, component, model)
        return
    parent, _, child = inner.rpartition(".")
    unwrapped(getattr(pipeline, component)).get_submodule(parent).add_module(child, model)
