"""One class of the zoo: a tiny model of it with random weights, and the arguments of its calls.

Most arguments follow from the names in the signature of forward and from the config. An entry says the rest.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.lab.zoo.classes import find_class
from modelopt_tdq.lab.zoo.inputs import DERIVED, Call

__all__ = ["Entry"]

#: Of what diffusers begins with zeros, so that its output depends on everything all the same.
_SPREAD = 0.1


@dataclass(frozen=True)
class Entry:
    """A tiny configuration of one class of diffusers."""

    #: Of the class.
    name: str

    #: What its files are called by: unet, transformer, controlnet, prior, decoder.
    kind: str

    #: Arguments of its ``__init__``; an entry among them stands for its model.
    config: Mapping[str, Any]

    #: Arguments of forward beyond those that follow from names: values, or recipes. None leaves an argument out.
    arguments: Mapping[str, Any] = field(default_factory=dict)

    #: Shape of one sample; by default [in_channels, 8, 8].
    latent: tuple[int, ...] | None = None

    #: Arguments that hold the time; the first is the one to quantize by.
    times: tuple[str, ...] = ("timestep",)

    #: The noisiest time, in the units of the model.
    largest: float = 1000.0

    #: What a new model of the class needs to be complete.
    finish: Callable[[nn.Module], nn.Module] | None = None

    def build(self, seed: int = 0) -> nn.Module:
        """The model, float32 and in evaluation mode, the same for the same seed."""
        with torch.random.fork_rng(devices=[]), _uninitialized_is_nan():
            torch.manual_seed(seed)
            model: nn.Module = find_class(self.name)(**{key: _built(value) for key, value in self.config.items()})
            model = model if self.finish is None else self.finish(model)
            model = model.float().eval()
            _fill(model)
        return model

    def inputs(self, batch: int = 2, time: float | Tensor = 500.0, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of one call.

        Args:
            batch: Samples.
            time: [] or [batch], in the units of the model.
            seed: Of everything but the time.
        """
        model = find_class(self.name)
        config = self._settings()
        latent = (config.get("in_channels", 0), 8, 8) if self.latent is None else self.latent
        times = torch.as_tensor(time, dtype=torch.float32).expand(batch)
        call = Call(config, latent, batch, times, torch.Generator().manual_seed(seed))
        recipes = {**DERIVED, **dict.fromkeys(self.times, _time), **self.arguments}
        found = {}
        for name in inspect.signature(model.forward).parameters:
            recipe = recipes.get(name)
            found[name] = recipe(call) if callable(recipe) else recipe
        return {name: value for name, value in found.items() if value is not None}

    def _settings(self) -> dict[str, Any]:
        """The config with its defaults; a model of models has that of the first of them too."""
        found: dict[str, Any] = {}
        for value in self.config.values():
            if isinstance(value, list) and value and isinstance(value[0], Entry):
                found |= value[0]._settings()
        for name, parameter in inspect.signature(find_class(self.name).__init__).parameters.items():
            if parameter.default is not inspect.Parameter.empty:
                found[name] = parameter.default
        return {**found, **self.config}


def _time(call: Call) -> Tensor:
    return call.time


def _built(value: Any) -> Any:
    """``value`` with models in the place of entries."""
    if isinstance(value, Entry):
        return value.build()
    return [_built(item) for item in value] if isinstance(value, list) else value


@contextmanager
def _uninitialized_is_nan() -> Iterator[None]:
    """Memory that a class takes and does not write to is seen as such, rather than random."""
    deterministic: Any = torch.utils.deterministic
    mode, filled = torch.get_deterministic_debug_mode(), deterministic.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        deterministic.fill_uninitialized_memory = filled


def _fill(model: nn.Module) -> None:
    """Small random numbers for parameters that are all zero or were never written to."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.isfinite().all() or not parameter.any():
                parameter.normal_(0, _SPREAD)
