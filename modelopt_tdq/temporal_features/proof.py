"""For which calls of a model its temporal features were proven.

A search tries other numbers, flags and sizes. Nobody can try a tensor that a call leaves out, all texts that there are,
a size that the model refuses. So the facts of the call that cannot be tried are kept with the features, and a call with
other facts is looked at when it comes: by a search of its own, once for these facts.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.temporal_features.variation import batch_size, named_attributes, named_leaves

__all__ = ["Proof", "call_facts", "with_defaults"]

_PLAIN = (bool, int, float, complex, str)


def with_defaults(model: nn.Module, arguments: Mapping[str, Any], timestep: str) -> dict[str, Any]:
    """The arguments of a call, with the numbers, flags and texts that the model has by default."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if isinstance(parameter.default, _PLAIN) and name != timestep
    }
    return {**defaults, **arguments}


def call_facts(arguments: Mapping[str, Any], timestep: str, tried: Collection[str]) -> dict[str, str]:
    """What is to be known of a call, but for what was tried.

    Args:
        arguments: With defaults.
        timestep: Name of the argument that holds the time, which does not count.
        tried: Names of arguments and sizes that play no part.

    Returns:
        Of tensors, the rank and each size; of numbers, flags and texts, the value; of other objects the kind. What is
        None counts as not given.
    """
    found: dict[str, Any] = {}
    for name, leaf in named_leaves({key: value for key, value in arguments.items() if key != timestep}):
        if isinstance(leaf, Tensor):
            found[name] = f"a {leaf.dim()}-D tensor"
            found.update({f"{name}.shape[{axis}]": size for axis, size in enumerate(leaf.shape)})
        elif isinstance(leaf, _PLAIN):
            found[name] = leaf
        elif leaf is not None:
            found[name] = type(leaf).__name__
            for key, value in named_attributes(leaf).items():
                found[f"{name}.{key}"] = value if isinstance(value, _PLAIN) else type(value).__name__
    return {name: str(fact) for name, fact in found.items() if name not in tried}


@dataclass(frozen=True)
class Proof:
    """That layers depend on the time alone.

    Attributes:
        tried: Names of arguments and sizes on which they do not depend.
        facts: Of the calls for which this was seen; see :func:`call_facts`.
        programs: Digests of how each layer's output is computed, without sizes, axes and indices.
        time: Form of the time in that call: its dtype, and "one" ([]), "ones" ([1]) or "batch" ([B]).
    """

    tried: tuple[str, ...]
    facts: Mapping[str, str]
    programs: Mapping[str, str]
    time: tuple[str, str]

    @classmethod
    def of(
        cls, arguments: Mapping[str, Any], timestep: str, tried: Collection[str], programs: Mapping[str, str]
    ) -> Proof:
        """From a call whose time is a tensor; see the class."""
        time = arguments[timestep]
        form = "one" if time.dim() == 0 else "ones" if time.numel() == 1 else "batch"
        dtype = str(time.dtype).removeprefix("torch.")
        return cls(tuple(sorted(tried)), call_facts(arguments, timestep, tried), programs, (dtype, form))

    def for_layers(self, names: Iterable[str]) -> Proof:
        """The same for some layers."""
        return replace(self, programs={name: self.programs[name] for name in names})

    def as_json(self) -> dict[str, Any]:
        """As JSON knows it."""
        return {
            "tried": list(self.tried),
            "facts": dict(self.facts),
            "programs": dict(self.programs),
            "time": list(self.time),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Proof:
        """What :meth:`as_json` gave."""
        dtype, form = value["time"]
        return cls(tuple(value["tried"]), dict(value["facts"]), dict(value["programs"]), (dtype, form))

    def differences(self, facts: Mapping[str, str]) -> list[str]:
        """Names of the facts that are others."""
        return [name for name in {**self.facts, **facts} if self.facts.get(name) != facts.get(name)]

    def with_such_a_time(self, arguments: Mapping[str, Any], timestep: str) -> dict[str, Any]:
        """The arguments of a call with its time in the form that was seen."""
        dtype, form = self.time
        time = torch.as_tensor(arguments[timestep]).to(getattr(torch, dtype)).reshape(-1)
        made = time[0] if form == "one" else time[:1]
        batch = batch_size(arguments, timestep)
        if form == "batch":
            made = time if len(time) > 1 else time.expand(batch or 1)
        return {**arguments, timestep: made}
