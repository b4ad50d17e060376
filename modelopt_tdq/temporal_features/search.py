"""How a model is watched: without data if that is possible, for as many times at once as are wanted, and several times.

One call shows what its tensors depend on. What does not depend on tensors shows in a second call that differs: other
numbers, flags and texts, another batch, other sizes, and whatever the first call has left behind. What both calls
compute from the time in the same way depends on none of these. Only where they differ, or where the model refuses the
second call, further calls tell one from the other.

Sizes. A dependence on a size is looked for by doubling it, or halving it where the model refuses that. Of a size that
the model takes in neither nothing is known: the features are proven for calls with this size. The same holds for a
text or another value for which no other could be found that the model takes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from modelopt_tdq.errors import TdqError
from modelopt_tdq.temporal_features.dataflow import EARLIER_CALL, Watched
from modelopt_tdq.temporal_features.proof import Proof, with_defaults
from modelopt_tdq.temporal_features.variation import (
    Change,
    Question,
    batch_changes,
    batch_size,
    number_changes,
    size_changes,
)
from modelopt_tdq.temporal_features.varied_calls import VariedCalls

__all__ = ["Found", "search", "watched_at_once"]

_log = logging.getLogger(__name__)

#: What makes the same call of the same model compute something else.
_OUTSIDE = "something outside of the model"


@dataclass(frozen=True)
class Found:
    """What a search gives.

    Attributes:
        watched: All runs together.
        proof: That the temporal layers depend on the time alone.
    """

    watched: Watched
    proof: Proof


def _tensors(model: nn.Module, arguments: Mapping[str, Any], timestep: str) -> dict[str, Any]:
    """The arguments with a time that is a tensor, and with the numbers and flags that the model has by default."""
    leaves = [leaf for name, value in arguments.items() if name != timestep for leaf in pytree.tree_leaves(value)]
    device = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), None)
    time = arguments[timestep]
    time = time if isinstance(time, Tensor) else torch.as_tensor(time, device=device)
    return {**with_defaults(model, arguments, timestep), timestep: time}


def _batched(arguments: Mapping[str, Any], timestep: str, times: int) -> dict[str, Any]:
    """The arguments of one call, for as many samples as times."""
    batch = batch_size(arguments, timestep)

    def repeated(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == batch:
            return leaf[:1].expand(times, *leaf.shape[1:]).clone()
        return leaf

    made = {name: pytree.tree_map(repeated, value) for name, value in arguments.items()}
    made[timestep] = arguments[timestep].reshape(-1)[:1].expand(times).clone()
    return made


def _is_usable(found: Watched, times: int) -> bool:
    """Whether the layers have a row per time, and the tape refers to no tensor without data."""
    rows = times == 1 or all(shape[:1] == (times,) for shape in found.features.values())
    leaves = (leaf for e in found.tapes[0].entries for leaf in pytree.tree_leaves((e.args, dict(e.kwargs))))
    return rows and not any(isinstance(leaf, FakeTensor) for leaf in leaves)


def search(model: nn.Module, arguments: Mapping[str, Any], timestep: str, times: int | None) -> Found:
    """Watch a call of the model, and others: by shapes alone where the model allows it, else with the call's own data.

    Args:
        model: In eval mode; put back as it was.
        arguments: Of the call, by name.
        timestep: Name of the argument that holds the time.
        times: How many times the call shall have, if the model takes a time per sample; None: the call as it is.
    """
    own = _tensors(model, arguments, timestep)
    ways = [(own, 1)] if times is None else [(_batched(own, timestep, times), times), (own, 1)]
    for call, computed in ways:
        calls = VariedCalls(model, call, timestep, computed, data=False)
        try:
            calls.call()
            if _is_usable(calls.watched(), computed):
                return _found(calls, model, call, own, timestep, data=False)
        except TdqError:
            raise
        except Exception as error:  # models may look at values, or not take a time per sample
            _log.info("the model cannot be watched without data: %s", error)
        finally:
            calls.restore()
    calls = VariedCalls(model, own, timestep, 1, data=True)
    try:
        calls.call()
        return _found(calls, model, own, own, timestep, data=True)
    finally:
        calls.restore()


def watched_at_once(model: nn.Module, arguments: Mapping[str, Any], timestep: str, times: int) -> Watched | None:
    """Watch one call with as many samples as times, by shapes alone; None where :func:`search` would not do so either.

    Nothing is proven by one call: what it computes has to be compared with what a search has found.

    Args:
        model: As for :func:`search`, also for the next two.
        arguments: Likewise.
        timestep: Likewise.
        times: How many.
    """
    batched = _batched(_tensors(model, arguments, timestep), timestep, times)
    calls = VariedCalls(model, batched, timestep, times, data=False)
    try:
        calls.call()
        found = calls.watched()
    except TdqError:
        raise
    except Exception as error:  # models may look at values, or not take a time per sample
        _log.info("the model cannot be watched at several times without data: %s", error)
        return None
    finally:
        calls.restore()
    return found if _is_usable(found, times) else None


class _Evidence:
    """Calls besides the first, and what differs in them.

    Attributes:
        single: In calls with one change, by their place.
        compound: In calls with many.
        repeats: Calls without any.
        tried: Arguments and sizes that were changed in a call that the model has taken, and that need no other try.
    """

    def __init__(self, calls: VariedCalls) -> None:
        self.calls = calls
        self.single: dict[int, tuple[str, ...]] = {}
        self.compound: dict[int, tuple[str, ...]] = {}
        self.repeats: list[int] = []
        self.tried: set[str] = set()

    def disagrees(self) -> bool:
        """Whether any call computes a temporal layer's output in a way of its own."""
        return any(one or other for one, other in self.calls.disagreements())

    def _attempt(self, changes: Sequence[Change]) -> int | None:
        run = self.calls.attempt(changes)
        if run is not None:
            self.tried.update(aspect for change in changes if change.conclusive for aspect in change.aspects)
        return run

    def has_tried(self, question: Question) -> bool:
        """Whether nothing of it is left to try."""
        return all(self.tried.issuperset(change.aspects) for change in question.ways)

    def together(self, changes: Sequence[Change], anew: bool = False) -> bool:
        """Whether the model takes a call with many changes: after the one before, or anew from the beginning."""
        if anew:
            self.calls.restore()
        run = self._attempt(changes)
        if run is not None:
            self.compound[run] = tuple(dict.fromkeys(label for change in changes for label in change.labels))
        return run is not None

    def alone(self, question: Question) -> None:
        """Calls that differ in one thing."""
        for change in question.ways:
            self.calls.restore()
            run = self._attempt([change])
            if run is not None:
                self.single[run] = change.labels
                if not question.every:
                    return

    def repeat(self) -> None:
        """The first call again, from the beginning; and once more, with what it left behind.

        Raises:
            Exception: Whatever the model raises at a second call.
        """
        self.calls.restore()
        self.repeats.append(self.calls.call())
        self.single[self.calls.call()] = self.calls.left_behind() or (EARLIER_CALL,)

    def blame(self) -> None:
        """Taint the layers that differ.

        Those that differ in a repeated call, by that alone; then by what differs in a call with one change; where many
        things differ, by those that explain it, or by all.
        """
        different = self.calls.disagreements()
        blamed = {name: frozenset([_OUTSIDE]) for run in self.repeats for name in set().union(*different[run])}
        outside = set(blamed)
        for run, labels in self.single.items():
            for name in set().union(*different[run]) - outside:
                blamed[name] = blamed.get(name, frozenset()) | set(labels)
        for run, labels in self.compound.items():
            for name in set().union(*different[run]):
                blamed.setdefault(name, frozenset(self.calls.left_behind() or labels))
        for run, (own, its) in enumerate(different):
            self.calls.taints[0].update({name: blamed[name] for name in own})
            self.calls.taints[run].update({name: blamed[name] for name in its})


def _found(
    calls: VariedCalls,
    model: nn.Module,
    call: Mapping[str, Any],
    given: Mapping[str, Any],
    timestep: str,
    data: bool,
) -> Found:
    """After the first call: the others. ``given`` is that call as the user gave it."""
    questions = [*number_changes(model, call, timestep), Question(batch_changes(call, timestep))]
    layouts, axes, groups = size_changes(call, timestep, smaller_first=data)
    evidence = _Evidence(calls)
    left = _together(evidence, questions, layouts)
    if left == questions or evidence.disagrees():
        left = questions
        evidence.tried.clear()
        evidence.repeat()
    for question in left:
        evidence.alone(question)
    for question in axes:
        if not evidence.has_tried(question):
            evidence.alone(question)
    for question in groups:
        if not evidence.has_tried(question):
            any(evidence.together([change], anew=True) for change in question.ways)
    evidence.blame()
    found = calls.watched()
    return Found(found, Proof.of(given, timestep, evidence.tried, _programs(calls, found)))


def _together(evidence: _Evidence, questions: list[Question], layouts: Sequence[Change]) -> list[Question]:
    """Calls with many changes at once.

    The first follows on the recorded call, in the first of the layouts that the model takes, with other numbers where
    the model keeps some. If the model keeps anything, the same again from the beginning. Every number is tried twice,
    and every flag also alone, because two may cancel.

    Returns:
        What the model has refused to be asked so; all, if it takes no first call.
    """
    evidence.calls.shift_state()
    free = [question for question in questions if not question.tied]
    ways = [
        (asked, layout)
        for asked in ([questions] if free == questions else [questions, free])
        for layout in [*([change] for change in layouts), []]
    ]
    for asked, layout in ways:
        first = [*(question.ways[0] for question in asked if question.ways), *layout]
        if evidence.together(first):
            break
    else:
        return questions
    if evidence.calls.writes_state and not evidence.together(first, anew=True):
        return questions
    left = [question for question in questions if question not in asked]
    several = [question for question in asked if question.every and len(question.ways) > 1]
    if several and not evidence.together([question.ways[1] for question in several]):
        left += several
    flags = [question for question in asked if question.every and len(question.ways) == 1]
    return left + [flag for flag in flags if len(flags) > 1 and not evidence.together(flag.ways)]


def _programs(calls: VariedCalls, found: Watched) -> dict[str, str]:
    """How the output of each temporal layer is computed, as a digest without sizes, axes and indices."""
    outputs = calls.outputs(found)[0]
    return {name: " ".join(number.alike[:16] for number in numbers) for name, numbers in outputs.items()}
