"""On which inputs of the model does every value of its recorded runs depend?

The result of an operator depends on whatever its operands depend on. Once a value is read into Python (``.item()``),
everything after it may depend on it; if it was the time, nothing after it can be computed again for another time.
What a model keeps from one call to the next depends on that state of the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from modelopt_tdq.temporal_features.tape import Entry, Slot, Tape
from modelopt_tdq.temporal_features.trace import Enter, Leave, Operation, Read, Run

__all__ = ["EARLIER_CALL", "Taints", "Watched", "watched"]

_NOTHING: frozenset[str] = frozenset()

#: What depends on a generator of random numbers is not known before the model runs.
_RANDOM = "random numbers"

#: What an earlier call left behind, wherever it is kept.
EARLIER_CALL = "an earlier call"

#: On what layers depend besides what they take, by name, run by run.
Taints = Sequence[Mapping[str, frozenset[str]]]


class Watched:
    """What was seen in all runs together.

    Attributes:
        tapes: Of each run, all that depends on the time alone; its results are the outputs of all layers on it.
        features: Names of the layers whose outputs leave a tape, in order of execution, with the outputs' shapes in
            the first run.
        depends: For each layer that depends on something else: the inputs of the model on which it depends.
        multiply_adds: Of each layer, in the first run.
        shapes: Of each layer's output, likewise.
        temporal: Of each run, the places of the operators that depend on the time at most.
    """

    def __init__(
        self,
        tapes: tuple[Tape, ...],
        features: Mapping[str, tuple[int, ...]],
        depends: Mapping[str, frozenset[str]],
        multiply_adds: Mapping[str, int],
        shapes: Mapping[str, tuple[int, ...]],
        temporal: tuple[frozenset[int], ...],
    ) -> None:
        self.tapes, self.features, self.depends = tapes, features, depends
        self.multiply_adds, self.shapes, self.temporal = multiply_adds, shapes, temporal


class _Dataflow:
    """Goes through the runs in order; see the module."""

    def __init__(self, time: str, changing: Collection[str]) -> None:
        self.time = frozenset([time])
        self._changing = changing
        self._depends: dict[int, frozenset[str]] = {}
        self._origins: dict[int, frozenset[str]] = {}
        self._taken: dict[str, frozenset[str]] = {}
        self._read = _NOTHING
        self.entries: list[Entry] = []
        self.results: list[dict[str, list[Slot]]] = []
        self.features: dict[str, None] = {}
        self.depends: dict[str, frozenset[str]] = {}
        self.multiply_adds: list[dict[str, int]] = []
        self.shapes: list[dict[str, tuple[int, ...]]] = []
        self.temporal: list[set[int]] = []
        self._timed: set[str] = set()

    def run(self, run: Run, taints: Mapping[str, frozenset[str]]) -> None:
        """The next one."""
        self._begin(run)
        for place, event in enumerate(run.events):
            if isinstance(event, Operation):
                self._operation(event, place, taints.get(event.layer or "", _NOTHING))
            elif isinstance(event, Read):
                self._reading(event.inputs)
            elif isinstance(event, Enter):
                taken = self._taken.get(event.layer, _NOTHING)
                self._taken[event.layer] = taken | self._made_by(event.inputs)
            else:
                self._leave(event)
        self.features.update(dict.fromkeys(sorted(self._made_by(run.outputs))))

    def _begin(self, run: Run) -> None:
        earlier = {key: frozenset([EARLIER_CALL]) for key, on in self._depends.items() if on}
        for where, keys in run.state.items():
            changing = where in self._changing
            earlier.update({key: frozenset([where]) for key in keys if changing or key in earlier})
        given = {slot.storage: earlier.get(slot.storage, _NOTHING) - {EARLIER_CALL} for _, slot in run.labels}
        for name, slot in run.labels:
            given[slot.storage] |= {name}
        self._depends, self._origins, self._read = {**earlier, **given}, {}, _NOTHING
        for made in (self.results, self.multiply_adds, self.shapes):
            made.append({})
        self.temporal.append(set())

    def _depend(self, keys: Iterable[int]) -> frozenset[str]:
        return _NOTHING.union(*(self._depends.get(key, _NOTHING) for key in keys))

    def _made_by(self, keys: Iterable[int]) -> frozenset[str]:
        """The layers whose outputs these temporal values come from, without a layer in between."""
        return _NOTHING.union(*(self._origins.get(key, _NOTHING) for key in keys))

    def _reading(self, keys: tuple[int, ...]) -> None:
        """Values are handed to Python."""
        read = self._read | self._depend(keys)
        if self.time <= read:  # what the tape would hold is true of this time only
            read |= {f"{next(iter(self.time))}.item()"}
        self._read = read
        self.features.update(dict.fromkeys(sorted(self._made_by(keys))))

    def _operation(self, event: Operation, place: int, taint: frozenset[str]) -> None:
        inputs = self._read | taint | self._depend(event.inputs)
        if event.random:
            inputs |= {_RANDOM}
        if event.reads:
            self._reading(event.inputs)
            inputs |= self._read
        known = inputs | self._depend(event.touched)
        origins = self._made_by(event.inputs)
        viewed = set(event.inputs) - set(event.written)
        for key in event.touched:
            if key in viewed:
                continue  # a view changes nothing
            self._depends[key] = self._depends.get(key, _NOTHING) | inputs
            if known <= self.time:
                self._origins[key] = self._origins.get(key, _NOTHING) | origins
        if not known <= self.time:
            self.features.update(dict.fromkeys(sorted(origins)))
        else:
            self.temporal[-1].add(place)
            if event.layer is None:
                self.entries.append(Entry(event.function, None, event.args, event.kwargs, event.outputs))
        if event.layer is not None:
            done = self.multiply_adds[-1].get(event.layer, 0)
            self.multiply_adds[-1][event.layer] = done + event.multiply_adds

    def _leave(self, event: Leave) -> None:
        name, slots = event.layer, [slot for slot in event.outputs if slot is not None]
        depends = self._read | self._depend(slot.storage for slot in slots)
        if not depends <= self.time:
            self.depends[name] = self.depends.get(name, _NOTHING) | depends
            return
        self.entries.append(Entry(None, name, event.args, event.kwargs, event.outputs))
        if event.shape:
            # so does a call that does not depend on the time, where another one does: some models embed a time of zero
            self.results[-1].setdefault(name, []).append(slots[0])
            self.shapes[-1][name] = event.shape
            self._origins[slots[0].storage] = frozenset([name])
            if depends:
                self._timed.add(name)

    def finish(self) -> None:
        """Layers whose calls never depend on the time are no results.

        Those that depend on more in another of their calls need what they take.
        """
        self.results = [{n: slots for n, slots in made.items() if n in self._timed} for made in self.results]
        self.features = {name: None for name in self.features if name in self._timed}
        for name in {name for results in self.results for name in results} & self.depends.keys():
            self.depends[name] |= self.time
        waiting = [name for name in self.features if name in self.depends]
        while waiting:
            taken = self._taken[waiting.pop()]
            waiting += [name for name in taken - self.features.keys() if name in self.depends]
            self.features.update(dict.fromkeys(sorted(taken)))


def watched(runs: Sequence[Run], time: str, times: int, changing: Collection[str], taints: Taints) -> Watched:
    """See what depends on what.

    Args:
        runs: One after the other; the first is the call that the tape is to repeat.
        time: Name of the argument that holds the time.
        times: How many different times a run of the first tape shall compute: as many as its time has, or 1.
        changing: Where the model holds what its calls change.
        taints: What is known besides.
    """
    flow = _Dataflow(time, changing)
    for run, taint in zip(runs, taints, strict=True):
        flow.run(run, taint)
    flow.finish()
    tapes = []
    for index, (run, made) in enumerate(zip(runs, flow.results, strict=True)):
        results = {name: tuple(slots) for name, slots in made.items() if name not in flow.depends}
        computed = times if index == 0 else 1
        tapes.append(Tape(tuple(flow.entries), run.time, run.dtype, run.shape, computed, results))
    features = {name: flow.shapes[0][name] for name in tapes[0].results if name in flow.features}
    temporal = tuple(frozenset(places) for places in flow.temporal)
    return Watched(tuple(tapes), features, flow.depends, flow.multiply_adds[0], flow.shapes[0], temporal)
