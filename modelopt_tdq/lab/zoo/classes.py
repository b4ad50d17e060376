"""Diffusers' classes whose forward takes a time, found by their signatures: a new release shows its new classes."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from functools import cache

from torch import nn

__all__ = ["find_class", "time_arguments", "timed_classes"]

_TIME = frozenset({"t", "time", "timestep", "timesteps", "sigma", "sigmas"})

#: Beside one of these words it is something else: an embedding of guidance, sizes, positions, a switch, a constant.
_NOT_A_TIME = frozenset({"cond", "ids", "indices", "use", "fixed", "mask"})

#: Public names like these are not loaded: they are no models, and many would load a pipeline.
_NO_MODEL = re.compile("Pipeline|Blocks|Scheduler|Output|Config|Processor|Guid(ance|er)")


def time_arguments(model: type[nn.Module]) -> tuple[str, ...]:
    """The arguments of its forward that are times, by the words in their names."""
    found = []
    for name in inspect.signature(model.forward).parameters:
        words = set(name.split("_"))
        if words & _TIME and not words & _NOT_A_TIME:
            found.append(name)
    return tuple(found)


@cache
def timed_classes() -> dict[str, type[nn.Module]]:
    """Those of ``diffusers.models`` and of diffusers' public names, by name."""
    import diffusers
    import diffusers.models

    base: type[nn.Module] = diffusers.ModelMixin  # type: ignore[assignment]
    candidates: list[object] = []
    for module in pkgutil.walk_packages(diffusers.models.__path__, "diffusers.models."):
        candidates.extend(vars(importlib.import_module(module.name)).values())
    for name in dir(diffusers):
        if name[0].isupper() and not _NO_MODEL.search(name):
            candidates.append(getattr(diffusers, name, None))
    found: dict[str, type[nn.Module]] = {
        c.__name__: c for c in candidates if inspect.isclass(c) and issubclass(c, base)
    }
    return {name: found[name] for name in sorted(found) if time_arguments(found[name])}


def find_class(name: str) -> type[nn.Module]:
    """The class of this name, without a look at all others where it is public."""
    import diffusers

    found: type[nn.Module] | None = getattr(diffusers, name, None)
    return timed_classes()[name] if found is None else found
