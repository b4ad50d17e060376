"""Calls of one model, recorded one after the other; the model is put back as it was."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from modelopt_tdq.temporal_features.agreement import disagreeing, outputs_of
from modelopt_tdq.temporal_features.dataflow import Watched, watched
from modelopt_tdq.temporal_features.numbering import Number, numbered
from modelopt_tdq.temporal_features.state import CachedFunctions, Held, ModelState, tensors_inside
from modelopt_tdq.temporal_features.trace import Operation, Recorder, Run
from modelopt_tdq.temporal_features.variation import Change, named_leaves, other_values, with_changes

__all__ = ["VariedCalls"]

_log = logging.getLogger(__name__)


class VariedCalls:
    """Runs of one model, the first as given, the others with changes.

    Args:
        model: In eval mode.
        arguments: Of the first call; the time is a tensor.
        timestep: Name of the argument that holds the time.
        times: How many times a run of the first call's tape shall compute.
        data: Whether the calls have data; else shapes only, which costs neither time nor memory.
    """

    def __init__(self, model: nn.Module, arguments: dict[str, Any], timestep: str, times: int, data: bool) -> None:
        self.runs: list[Run] = []
        self.taints: list[dict[str, frozenset[str]]] = []
        self._model, self._arguments, self._timestep, self._times = model, arguments, timestep, times
        self._mode = None if data else FakeTensorMode(allow_non_fake_inputs=True)
        self._empty = any(parameter.is_meta for parameter in model.parameters())
        self._recorder = Recorder(model, self._mode)
        self._initial, self._functions = ModelState(model), CachedFunctions(model)
        self._changed: dict[str, Held] = {}
        self._changing: set[str] = set()

    def restore(self) -> None:
        """Put the model back as it was before the first call."""
        self._initial.restore()
        self._recorder.restore()
        if self._mode is not None:
            self._functions.forget()

    def call(self, changes: Sequence[Change] = ()) -> int:
        """Record a call.

        Returns:
            Its place in ``runs``.

        Raises:
            Exception: Whatever the model raises; nothing is recorded then.
        """
        before = ModelState(self._model)
        with self._mode or nullcontext(), _quiet(), _uncompiled_flex_attention():
            arguments = with_changes(pytree.tree_map(self._own, self._arguments), changes)
            run = self._recorder.run(
                lambda: self._model(**arguments), _labels(arguments), arguments[self._timestep], before.tensors()
            )
        self.runs.append(run)
        self.taints.append({})
        written = {key for event in run.events if isinstance(event, Operation) for key in event.written}
        changed = ModelState(self._model).changed(before)
        changed.update({w: before.held[w] for w, keys in run.state.items() if not written.isdisjoint(keys)})
        self._changed.update(changed)
        # what is made at the first call and kept is a constant, if it is made from nothing else
        self._changing.update(w for w in changed if w in before.held and before.held[w].value is not None)
        return len(self.runs) - 1

    def attempt(self, changes: Sequence[Change]) -> int | None:
        """Likewise; None if the model refuses."""
        try:
            return self.call(changes)
        except Exception as error:  # whatever a model raises at arguments that it cannot take
            _log.info("the model refuses %s: %s", ", ".join(label for c in changes for label in c.labels), error)
            return None

    def _own(self, leaf: Any) -> Any:
        """A tensor that nobody else has."""
        if not isinstance(leaf, Tensor):
            return leaf
        if self._mode is None:
            return leaf.clone()
        return self._mode.from_tensor(leaf.to("meta") if self._empty else leaf).clone()

    def shift_state(self) -> None:
        """Give the numbers that the calls leave behind other values."""
        for where, held in ModelState(self._model).held.items():
            values = other_values(held.value)
            if where in self._changing and held.holder is not None and values and not isinstance(held.value, str):
                held.holder[held.key] = values[0]

    @property
    def writes_state(self) -> bool:
        """Whether calls leave anything behind in the model."""
        return bool(self._changed)

    def left_behind(self) -> tuple[str, ...]:
        """What the calls leave behind that is no tensor; where tensors get is known anyway."""
        return tuple(sorted(w for w, held in self._changed.items() if not isinstance(held.value, Tensor)))

    def watched(self, runs: Sequence[int] | None = None) -> Watched:
        """What depends on what, as far as ``taints`` tell; in all runs, or in some."""
        chosen = range(len(self.runs)) if runs is None else runs
        return watched(
            [self.runs[run] for run in chosen],
            self._timestep,
            self._times,
            self._changing,
            [self.taints[run] for run in chosen],
        )

    def outputs(self, found: Watched) -> list[dict[str, list[Number]]]:
        """Run by run, how the temporal layers' outputs are computed."""
        numbers = numbered(self.runs, found.temporal)
        return [
            outputs_of(run, own, tape.results) for run, own, tape in zip(self.runs, numbers, found.tapes, strict=True)
        ]

    def disagreements(self) -> list[tuple[set[str], set[str]]]:
        """Run by run, the layers of the first one that it computes differently, and its own."""
        found = self.watched()
        outputs = self.outputs(found)
        time = self._arguments[self._timestep].detach().reshape(-1)[:1].to(torch.float32)
        return [
            disagreeing(self._model, found, (outputs[0], outputs[run]), (0, run), time) for run in range(len(self.runs))
        ]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's messages about operators that have no result: whoever calls knows."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _uncompiled_flex_attention() -> Iterator[None]:
    """Torch's flex_attention compiles itself, which it cannot under a mode that sees every operator."""
    module, switch = sys.modules.get("torch.nn.attention.flex_attention"), "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"
    before = getattr(module, switch, None)
    if before is None:
        yield
        return
    setattr(module, switch, True)
    try:
        yield
    finally:
        setattr(module, switch, before)


def _labels(arguments: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """Every tensor in the arguments, by name; those inside of other objects by the name of these."""
    found = []
    for name, leaf in named_leaves(arguments):
        found += [(name, leaf)] if isinstance(leaf, Tensor) else [(name, tensor) for tensor in tensors_inside(leaf)]
    return found
