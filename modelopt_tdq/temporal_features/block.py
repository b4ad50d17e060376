"""The temporal block of a model: the layers whose outputs depend on the time and on nothing else.

*Temporal Feature Matters* calls it the Temporal Information Block: the time MLP h(t) and the heads g_i, whose outputs
g_i(h(t)), the temporal features, steer the rest of the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from modelopt_tdq.errors import TdqError
from modelopt_tdq.temporal_features.tape import Tape
from modelopt_tdq.temporal_features.trace import Watched, layers_with_parameters, watch
from modelopt_tdq.timestep import find_timestep

__all__ = ["TemporalBlock", "find_temporal_block"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TemporalBlock:
    """What a model computes from the time alone.

    Attributes:
        timestep: Name of the argument that holds the time.
        layers: Names of its layers, in order of execution.
        features: Shape [...] per sample of each output that the rest of the model uses, by the layer that makes it.
        shapes: Likewise, of every layer.
        parameters: Number of weights and biases in it.
        multiply_adds: For one time.
        depends: For each layer outside of it that depends on the time too: the other inputs of the model on which it
            depends. What such a layer gives cannot be known before the model runs.
        tape: What computes the features.
    """

    timestep: str
    layers: tuple[str, ...]
    features: Mapping[str, tuple[int, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    parameters: int
    multiply_adds: int
    depends: Mapping[str, tuple[str, ...]]
    tape: Tape

    def only(self, features: list[str]) -> TemporalBlock:
        """The part of the block that makes these features.

        Raises:
            TdqError: One is no temporal feature; names the inputs that it depends on.
        """
        for name in features:
            if name not in self.features:
                self._refuse(name)
        return self.part({name: shape for name, shape in self.features.items() if name in features})

    def part(self, features: Mapping[str, tuple[int, ...]]) -> TemporalBlock:
        """Likewise, without a check."""
        tape = self.tape.only(features)
        shapes = {name: self.shapes[name] for name in tape.layers}
        return TemporalBlock(self.timestep, tape.layers, features, shapes, self.parameters, 0, self.depends, tape)

    def _refuse(self, name: str) -> None:
        if name in self.depends:
            others = " and ".join(f"`{other}`" for other in self.depends[name])
            raise TdqError(
                "features", name, f"its output depends on {others} as well as on the time", "Leave it to the model"
            )
        raise TdqError(
            "features", name, "no temporal feature of this model", f"Its features: {', '.join(self.features)}"
        )

    def superseded(self, without: frozenset[str] = frozenset()) -> dict[str, tuple[int, ...]]:
        """The layers that need not run once the features are known, with the shape of their output per sample.

        Args:
            without: Features that are computed after all.
        """
        needed = set(self.tape.only(n for n in self.features if n in without).layers)
        rest = [n for n in self.layers if n not in self.features and n not in needed and n not in self.depends]
        return {name: self.shapes[name] for name in rest}

    def compute(self, model: nn.Module, times: Tensor) -> dict[str, Tensor]:
        """The features as the model's layers are now, with gradients if those are enabled.

        Args:
            model: The one that was searched.
            times: [K] float32, in the model's own units.

        Returns:
            By name, [K, ...] in the model's own dtype.

        Raises:
            TdqError: A layer is called several times, with different results.
        """
        parts: list[dict[str, Tensor]] = []
        size = self.tape.times
        for begin in range(0, len(times), size):
            chunk = times[begin : begin + size]
            padded = torch.cat([chunk, chunk[-1:].expand(size - len(chunk))])
            with _telling(model, padded):
                made = self.tape.run(model, padded)
            parts.append({name: _agreed(name, values)[: len(chunk)] for name, values in made.items()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _agreed(name: str, values: list[Tensor]) -> Tensor:
    if any(not torch.equal(value, values[0]) for value in values[1:]):
        raise TdqError(
            "features",
            name,
            "this layer runs several times in one call of the model, with different results",
            "Leave it out with `features`",
        )
    return values[0]


@contextmanager
def _telling(model: nn.Module, times: Tensor) -> Iterator[None]:
    """Let the quantizers of the block know the times."""
    timestep = find_timestep(model)
    before = None if timestep is None else timestep.value
    if timestep is not None:
        timestep.value = times
    try:
        yield
    finally:
        if timestep is not None:
            timestep.value = before


def _labels(arguments: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """Every tensor in the arguments, by name: ``outer.inner`` inside a mapping."""
    found = []
    for path, leaf in pytree.tree_flatten_with_path(dict(arguments))[0]:
        if isinstance(leaf, Tensor):
            found.append((".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path), leaf))
    return found


def _batched(arguments: Mapping[str, Any], timestep: str, times: int) -> dict[str, Any]:
    """The arguments of one call, for as many samples as times."""
    tensors = [leaf for name, value in arguments.items() if name != timestep for leaf in pytree.tree_leaves(value)]
    batch = next((t.shape[0] for t in tensors if isinstance(t, Tensor) and t.dim() > 1), None)

    def repeated(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == batch:
            return leaf[:1].expand(times, *leaf.shape[1:])
        return leaf

    made = {name: pytree.tree_map(repeated, value) for name, value in arguments.items()}
    time = torch.as_tensor(arguments[timestep])
    made[timestep] = time.reshape(-1)[:1].expand(times).clone()
    return made


def _watch_call(model: nn.Module, arguments: Mapping[str, Any], timestep: str) -> Watched:
    labels = _labels(arguments)
    time = next(tensor for name, tensor in labels if name == timestep)
    return watch(model, lambda: model(**arguments), labels, (timestep, time))


def _without_data(model: nn.Module, arguments: Mapping[str, Any], timestep: str, times: int) -> Watched:
    """Shapes only: costs neither time nor memory, so that all times fit into one call."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fake = pytree.tree_map(
            lambda leaf: mode.from_tensor(leaf.clone()) if isinstance(leaf, Tensor) else leaf,
            _batched(arguments, timestep, times),
        )
        return _watch_call(model, fake, timestep)


def _search(model: nn.Module, arguments: Mapping[str, Any], timestep: str, times: int) -> Watched:
    """By shapes alone where the model allows it, else with the call's own data and its own time."""

    def with_data() -> Watched:
        own = {**arguments, timestep: torch.as_tensor(arguments[timestep])}
        return _watch_call(model, own, timestep)

    attempts: list[Callable[[], Watched]] = [lambda: _without_data(model, arguments, timestep, times), with_data]
    for attempt in attempts[:-1]:
        try:
            found = attempt()
        except TdqError:
            raise
        except Exception as error:  # models may look at values, or not take a time per sample
            _log.info("the model cannot be watched without data: %s", error)
            continue
        if all(shape[:1] == (times,) for shape in found.features.values()) and not _holds_shapes(found):
            return found
    return attempts[-1]()


def _holds_shapes(found: Watched) -> bool:
    """Whether the tape refers to a tensor without data."""
    leaves = (leaf for e in found.tape.entries for leaf in pytree.tree_leaves((e.args, dict(e.kwargs))))
    return any(isinstance(leaf, FakeTensor) for leaf in leaves)


def find_temporal_block(
    model: nn.Module, arguments: Mapping[str, Any], timestep: str = "timestep", times: int = 1
) -> TemporalBlock:
    """Find what ``model`` computes from the time alone, by what values depend on; names of layers play no part.

    The model is not changed. Its parameters may lie on the meta device.

    Args:
        model: Its forward takes the time.
        arguments: Of one call, by name; any batch. Tensors inside mappings count as inputs of their own.
        timestep: Name of the argument that holds the time.
        times: How many times one run of the block's tape shall compute.

    Raises:
        TdqError: There is no such argument, or nothing with weights depends on the time alone.
    """
    if arguments.get(timestep) is None:
        raise TdqError("timestep", timestep, "not among the arguments of the call", f"Given: {', '.join(arguments)}")
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        found = _search(model, arguments, timestep, times)
    finally:
        for module in training:
            module.training = True
    depends = {name: tuple(sorted(on - {timestep})) for name, on in found.depends.items() if timestep in on}
    if not found.features:
        example = next(iter(depends.items()), None)
        why = f"; `{example[0]}`, for one, also depends on {', '.join(example[1])}" if example else ""
        raise TdqError(
            "model",
            type(model).__name__,
            f"it has no temporal block: none of its layers depends on `{timestep}` alone{why}",
            'Quantize it with {"method": "tdq"}',
        )
    tape = found.tape.only(found.features)
    layers = layers_with_parameters(model)
    distinct = {id(p): p.numel() for name in tape.layers for p in layers[name].parameters()}
    return TemporalBlock(
        timestep,
        tape.layers,
        {name: shape[1:] for name, shape in found.features.items()},
        {name: found.shapes[name][1:] for name in tape.layers},
        sum(distinct.values()),
        sum(found.multiply_adds.get(name, 0) for name in tape.layers) // max(1, _rows(found)),
        depends,
        tape,
    )


def _rows(found: Watched) -> int:
    return next(iter(found.features.values()))[0]
