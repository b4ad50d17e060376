"""What a model computes from the time alone, recorded as a tape that runs again for other times.

A tape is a list of operators and of calls of layers, in the order in which the model ran them. Layers are called as
they are now: with their quantizers, and with gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["Entry", "Slot", "Tape"]


@dataclass(frozen=True)
class Slot:
    """A value on the tape.

    Attributes:
        number: Of the tensor.
        storage: Of the memory behind it; views of each other have the same.
    """

    number: int
    storage: int = -1


@dataclass(frozen=True)
class Entry:
    """One operator, or one call of a layer.

    Attributes:
        operator: Of ATen; None for a layer.
        layer: Name of the module; None for an operator.
        args: Nested; tensors are slots, parameters their names as :class:`Parameter`, the rest as it is.
        kwargs: Likewise.
        outputs: A slot or None for each leaf of the result.
    """

    operator: Callable[..., Any] | None
    layer: str | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[Slot | None, ...]

    def inputs(self) -> Iterator[Slot]:
        """The values that it takes."""
        return (leaf for leaf in pytree.tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Slot))


@dataclass(frozen=True)
class Parameter:
    """A parameter or buffer of the model that an operator takes directly."""

    name: str


@dataclass(frozen=True)
class Tape:
    """Everything that ``results`` need, and nothing else.

    Attributes:
        entries: In order of execution.
        time: The slot that holds the times.
        dtype: Of the times, as the model got them.
        shape: Of the times, as the model got them: [], [1] or [B].
        times: How many different times one run computes: all of ``shape``, or 1.
        results: Slots of each layer's output, by its name: several if it was called several times.
    """

    entries: tuple[Entry, ...]
    time: Slot
    dtype: torch.dtype
    shape: tuple[int, ...]
    times: int
    results: Mapping[str, tuple[Slot, ...]]

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers on the tape, in order of execution, each once."""
        return tuple(dict.fromkeys(entry.layer for entry in self.entries if entry.layer is not None))

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters and buffers that operators take directly, each once."""
        leaves = (leaf for e in self.entries for leaf in pytree.tree_leaves((e.args, dict(e.kwargs))))
        return tuple(dict.fromkeys(leaf.name for leaf in leaves if isinstance(leaf, Parameter)))

    def only(self, results: Iterable[str]) -> Tape:
        """The part of the tape that these layers' outputs need."""
        kept = {name: self.results[name] for name in results}
        wanted = {slot for slots in kept.values() for slot in slots}
        memory = {slot.storage for slot in wanted}
        entries = []
        for entry in reversed(self.entries):
            if any(slot in wanted for slot in entry.outputs) or _writes_to(entry, memory):
                entries.append(entry)
                wanted.update(entry.inputs())
                memory.update(slot.storage for slot in entry.inputs())
        return Tape(tuple(reversed(entries)), self.time, self.dtype, self.shape, self.times, kept)

    def run(self, model: nn.Module, times: Tensor) -> dict[str, list[Tensor]]:
        """Run it for as many times as it computes at once.

        Args:
            model: The module that was recorded; its layers are called.
            times: [times] float32, in the model's own units.

        Returns:
            By layer, its output [rows, ...] in each of its calls, the rows being those of the recorded call; if one
            time is computed, all of them are of that time.
        """
        whole = times.to(self.dtype)
        time = whole if bool((whole.to(times.dtype) == times).all()) else times
        # cloned: the model may change its time in place
        values: dict[Slot, Any] = {self.time: (time if self.times > 1 else time[0].expand(self.shape)).clone()}
        results: dict[str, list[Tensor]] = {name: [] for name in self.results}

        def value(leaf: Any) -> Any:
            if isinstance(leaf, Slot):
                return values[leaf]
            if isinstance(leaf, Parameter):
                path, _, name = leaf.name.rpartition(".")
                return getattr(model.get_submodule(path), name)
            return leaf

        for entry in self.entries:
            args, kwargs = pytree.tree_map(value, (entry.args, dict(entry.kwargs)))
            function: Any = entry.operator if entry.layer is None else model.get_submodule(entry.layer)
            leaves = pytree.tree_leaves(function(*args, **kwargs))
            values.update({slot: leaf for slot, leaf in zip(entry.outputs, leaves, strict=True) if slot is not None})
            if entry.layer in results:
                # cloned: an operator in place may follow
                results[entry.layer] += [leaf.clone() for leaf in leaves if isinstance(leaf, Tensor)]
        return results


def _writes_to(entry: Entry, memory: set[int]) -> bool:
    """Whether an operator changes, in place, memory that is needed."""
    schema = getattr(entry.operator, "_schema", None)
    if schema is None or not schema.is_mutable:
        return False
    return any(slot.storage in memory for slot in entry.inputs())
