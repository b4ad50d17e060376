"""The temporal block of a model: the layers whose outputs depend on the time and on nothing else.

*Temporal Feature Matters* calls it the Temporal Information Block: the time MLP h(t) and the heads g_i, whose outputs
g_i(h(t)), the temporal features, steer the rest of the model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.full_precision import full_precision
from modelopt_tdq.model.place import require_weights
from modelopt_tdq.model.timestep import INTERVALS, find_timestep
from modelopt_tdq.model.wrapped import unwrapped
from modelopt_tdq.temporal_features.agreement import near
from modelopt_tdq.temporal_features.dataflow import Watched
from modelopt_tdq.temporal_features.proof import Proof
from modelopt_tdq.temporal_features.search import search, watched_at_once
from modelopt_tdq.temporal_features.tape import Tape
from modelopt_tdq.temporal_features.trace import layers_with_parameters
from modelopt_tdq.temporal_features.variation import named_leaves

__all__ = ["NoTemporalBlockError", "TemporalBlock", "find_temporal_block", "for_times", "named"]

_log = logging.getLogger(__name__)


class NoTemporalBlockError(TdqError):
    """Nothing in the model that has weights depends on the time alone."""


@dataclass(frozen=True)
class TemporalBlock:
    """What a model computes from the time alone.

    Attributes:
        timestep: Name of the argument that holds the time.
        layers: Names of its layers, in order of execution.
        features: Shape [...] per sample of each output that the rest of the model uses, by the layer that makes it.
        shapes: Likewise, of every layer.
        weights: Number of elements of each parameter, by its name, of each layer.
        costs: Multiply-adds of each layer for one time.
        depends: For each layer that depends on the time and on something else: on what. Names of the model's
            arguments, tensors or not; "the size of `sample`"; "the state `count` of module `blocks.0`", which is what
            calls of the model leave behind. What such a layer gives cannot be known before the model runs.
        refused: Those of them that depend on no other tensor of the call: but for numbers, sizes or state they would be
            layers of the block.
        kept: Those of ``layers`` that the model runs for something else than these features, too, or whose output is
            the same at all times.
        tape: What computes the features.
        proof: What was tried to find this, and for which calls it was seen.
    """

    timestep: str
    layers: tuple[str, ...]
    features: Mapping[str, tuple[int, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    weights: Mapping[str, Mapping[str, int]]
    costs: Mapping[str, int]
    depends: Mapping[str, tuple[str, ...]]
    refused: Mapping[str, tuple[str, ...]]
    kept: frozenset[str]
    tape: Tape
    proof: Proof

    @property
    def parameters(self) -> int:
        """Number of weights and biases of the layers that need not run once the features are known."""
        distinct = {key: size for name in self._replaced for key, size in self.weights[name].items()}
        return sum(distinct.values())

    @property
    def multiply_adds(self) -> int:
        """Of the same layers, for one time."""
        return sum(self.costs[name] for name in self._replaced)

    @property
    def _replaced(self) -> list[str]:
        return [name for name in self.layers if name not in self.kept]

    def only(self, features: list[str]) -> TemporalBlock:
        """The part of the block that makes these features.

        Raises:
            TdqError: One is no temporal feature; names the inputs that it depends on.
        """
        for name in features:
            if name not in self.features:
                self._refuse(name)
        tape = self.tape.only(features)
        others = self.tape.only(name for name in self.features if name not in features)
        return replace(
            self,
            layers=tape.layers,
            features={name: shape for name, shape in self.features.items() if name in features},
            kept=self.kept | (set(others.layers) & set(tape.layers)),
            tape=tape,
        )

    def _refuse(self, name: str) -> None:
        if name in self.depends:
            raise TdqError(
                "features",
                name,
                f"its output depends on {named(self.depends[name])} as well as on the time",
                "Leave it to the model",
            )
        raise TdqError(
            "features", name, "no temporal feature of this model", f"Its features: {', '.join(self.features)}"
        )

    def superseded(self) -> dict[str, tuple[int, ...]]:
        """The layers that need not run once the features are known, with the shape of their output per sample."""
        return {name: self.shapes[name] for name in self._replaced if name not in self.features}

    def compute(self, model: nn.Module, times: Tensor) -> dict[str, Tensor]:
        """The features as the model's layers are now, with gradients if those are enabled.

        Args:
            model: The one that was searched.
            times: [K] float32, in the model's own units.

        Returns:
            By name, [K, ...] in the model's own dtype.

        Raises:
            TdqError: A layer is called several times, with different results; or its output has no batch.
        """
        parts: list[dict[str, Tensor]] = []
        size = self.tape.times
        for begin in range(0, len(times), size):
            chunk = times[begin : begin + size]
            padded = torch.cat([chunk, chunk[-1:].expand(size - len(chunk))])
            with _own_time(model, padded):
                made = self.tape.run(model, padded)
            if size == 1:
                made = {name: [_one_row(name, value) for value in values] for name, values in made.items()}
            parts.append({name: _agreed(name, values)[: len(chunk)] for name, values in made.items()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def named(dependencies: Iterable[str]) -> str:
    """For a sentence: "`guidance` and the size of `sample`"."""
    return " and ".join(each if " " in each else f"`{each}`" for each in dependencies)


def _one_row(name: str, value: Tensor) -> Tensor:
    """[1, ...] of [B, ...], the rows being of one time."""
    first = value[:1]
    if len(value) > 1 and not torch.allclose(value.detach().float(), first.detach().float(), 1e-3, 1e-5):
        raise TdqError(
            "features", name, "the first dimension of its output is not the batch", "Leave it out with `features`"
        )
    return first


def _agreed(name: str, values: list[Tensor]) -> Tensor:
    if any(not torch.equal(value, values[0]) for value in values[1:]):
        raise TdqError(
            "features",
            name,
            "this layer runs several times in one call of the model, with different results",
            "Leave it out with `features`",
        )
    return values[0]


def _own_time(model: nn.Module, times: Tensor) -> AbstractContextManager[None]:
    """Let the quantizers of the block know the times."""
    timestep = find_timestep(model)
    return nullcontext() if timestep is None else timestep.at(times)


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """In eval mode, and without the module that makes learned intervals at every call."""
    training, children = [module for module in model.modules() if module.training], dict(model._modules)
    model.eval()
    model._modules.pop(INTERVALS, None)
    try:
        yield
    finally:
        model._modules.clear()
        model._modules.update(children)
        for module in training:
            module.training = True


def find_temporal_block(
    model: nn.Module, arguments: Mapping[str, Any], timestep: str = "timestep", times: int | None = 1
) -> TemporalBlock:
    """Find what ``model`` computes from the time alone, by what values depend on; names of layers play no part.

    The model is not changed. Its parameters may lie on the meta device.

    Args:
        model: Its forward takes the time.
        arguments: Of one call, by name; any batch. Tensors inside mappings count as inputs of their own.
        timestep: Name of the argument that holds the time.
        times: How many times one run of the block's tape shall compute, if the model takes a time per sample. None:
            one, in a batch like that of the call, so that every matrix product has the call's own shape.

    Raises:
        NoTemporalBlockError: Nothing with weights depends on the time alone.
        TdqError: Hooks keep its weights elsewhere between calls; or there is no such argument.
    """
    model = unwrapped(model)
    require_weights(model, "have its temporal block found")
    if arguments.get(timestep) is None:
        raise TdqError("timestep", timestep, "not among the arguments of the call", f"Given: {', '.join(arguments)}")
    with _at_rest(model):
        result = search(model, arguments, timestep, times)
    found = result.watched
    depends = {name: tuple(sorted(on - {timestep})) for name, on in found.depends.items() if timestep in on}
    if not found.features:
        example = next(iter(depends.items()), None)
        why = f"; `{example[0]}`, for one, also depends on {', '.join(example[1])}" if example else ""
        raise NoTemporalBlockError(
            "model",
            type(model).__name__,
            f"it has no temporal block: none of its layers depends on `{timestep}` alone{why}",
            'Quantize it with {"method": "tdq"}',
        )
    inputs = {name for name, leaf in named_leaves(arguments) if isinstance(leaf, Tensor)}
    return TemporalBlock(
        timestep=timestep,
        depends=depends,
        refused={name: on for name, on in depends.items() if inputs.isdisjoint(on)},
        proof=result.proof,
        **_computed(model, found, found.features),
    )


def _computed(model: nn.Module, found: Watched, features: Iterable[str]) -> dict[str, Any]:
    """What the first of the runs tells of a block with these features: fields of :class:`TemporalBlock`."""
    whole = found.tapes[0]
    tape = whole.only(features)
    names = {id(parameter): name for name, parameter in model.named_parameters()}  # each once, by its first name
    layers = layers_with_parameters(model)
    return {
        "layers": tape.layers,
        "features": {name: found.shapes[name][1:] for name in whole.results if name in tape.results},
        "shapes": {name: found.shapes[name][1:] for name in tape.layers if name in found.shapes},
        "weights": {name: {names[id(p)]: p.numel() for p in layers[name].parameters()} for name in tape.layers},
        "costs": {name: found.multiply_adds.get(name, 0) // rows for name, (rows, *_) in found.shapes.items()},
        "kept": frozenset(tape.layers) - whole.results.keys(),
        "tape": tape,
    }


def for_times(block: TemporalBlock, model: nn.Module, arguments: Mapping[str, Any], times: Tensor) -> TemporalBlock:
    """The same block with a tape that computes all of these times in one run, if the model takes a time per sample.

    That takes one more call, not another search: a tape that does not give at all of these times what ``block`` gives
    is not used. Then, and where the model does not take so many times, it is ``block`` itself.

    Args:
        block: All that :func:`find_temporal_block` has found, with ``times=None``.
        model: Of the block; its parameters have data.
        arguments: With which the block was found.
        times: [K] float32, where the model computes.
    """
    whole = unwrapped(model)
    with _at_rest(whole):
        found = watched_at_once(whole, arguments, block.timestep, len(times))
    if found is None or not block.features.keys() <= found.tapes[0].results.keys():
        return block
    made = replace(block, **_computed(whole, found, block.features))
    made = replace(made, kept=made.kept | (block.kept & set(made.layers)))
    return made if _same_features(model, block, made, times) else block


def _same_features(model: nn.Module, one: TemporalBlock, other: TemporalBlock, times: Tensor) -> bool:
    """Whether both compute the same at these times, but for rounding."""
    try:
        with full_precision(model), torch.no_grad():
            first, second = one.compute(model, times), other.compute(model, times)
    except Exception as error:
        _log.info("the temporal block cannot be compared: %s", error)
        return False
    return all(near(*rows) for name, value in first.items() for rows in zip(value, second[name], strict=True))
