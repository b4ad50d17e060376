"""Watching a block while the model runs: what goes in and what comes out, sample by sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from modelopt_tdq.errors import TdqError
from modelopt_tdq.reconstruction.samples import Samples

__all__ = ["BlockIO", "calls_in_order", "observe", "probe"]


class _Reached(Exception):  # noqa: N818
    """The block has run; what comes after it is of no interest."""


def _leaves(value: Any) -> tuple[list[Any], Any]:
    return pytree.tree_flatten(value)


def calls_in_order(model: nn.Module, names: Sequence[str], call: dict[str, Any]) -> dict[str, int]:
    """How often each of these modules runs in one call of ``model``, in the order of their first runs."""
    counts: dict[str, int] = {}

    def counted(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            counts[name] = counts.get(name, 0) + 1

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(counted(name)) for name in names]
    try:
        with torch.no_grad():
            model(**call)
    finally:
        for handle in handles:
            handle.remove()
    return counts


def _may_stop(model: nn.Module, name: str) -> bool:
    """Whether a run may end at this module: nothing around it has to be put back after it."""
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return False
    parts = name.split(".")
    around = (model.get_submodule(".".join(parts[:n])) for n in range(len(parts)))
    return not any(getattr(module, "_functionals_to_replace", None) for module in around)


@torch.no_grad()
def observe(
    model: nn.Module, name: str, call: dict[str, Any], outputs: bool
) -> tuple[list[Any], Any, list[Any] | None]:
    """Run ``model`` up to a block.

    Args:
        model: In the state that is to be observed.
        name: Of the block.
        call: Keyword arguments of the model.
        outputs: Whether the block itself is to run.

    Returns:
        Leaves of the block's (args, kwargs); how they are nested; leaves of its output.
    """
    seen: dict[str, Any] = {}
    stop = _may_stop(model, name)

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        # copies: what follows may work in place
        leaves, spec = _leaves((args, kwargs))
        seen["inputs"] = [v.clone() if isinstance(v, Tensor) else v for v in leaves], spec
        if stop and not outputs:
            raise _Reached

    def after(module: nn.Module, args: Any, output: Any) -> None:
        seen["outputs"] = [v.clone() if isinstance(v, Tensor) else v for v in _leaves(output)[0]]
        if stop:
            raise _Reached

    block = model.get_submodule(name)
    handles = [block.register_forward_pre_hook(before, with_kwargs=True)]
    if outputs:
        handles.append(block.register_forward_hook(after))
    try:
        model(**call)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    inputs, spec = seen["inputs"]
    return inputs, spec, seen.get("outputs")


@dataclass(frozen=True)
class BlockIO:
    """How the inputs and outputs of a block belong to samples.

    Attributes:
        spec: How the leaves of (args, kwargs) are nested.
        fixed: Of each input leaf: its value where it is the same for all samples; None for a leaf of the samples.
        shapes: Of each leaf of the samples, [n, ...] of one sample, n rows in the batch dimension, with its dtype.
        outputs: Numbers of the output leaves that are compared.
        output_shapes: The same of those.
    """

    spec: Any
    fixed: list[tuple[bool, Any]]
    shapes: list[tuple[torch.Size, torch.dtype]]
    outputs: list[int]
    output_shapes: list[tuple[torch.Size, torch.dtype]]

    def bytes_per_sample(self, copies: int) -> int:
        """Of the recorded outputs, and of ``copies`` of the inputs."""
        one = sum(shape.numel() * dtype.itemsize for shape, dtype in self.shapes)
        return copies * one + sum(shape.numel() * dtype.itemsize for shape, dtype in self.output_shapes)

    def input_samples(self, leaves: list[Any], samples: int) -> list[Tensor]:
        """The leaves of the samples, each [samples, n, ...]."""
        own = [leaf for leaf, (fixed, _) in zip(leaves, self.fixed, strict=True) if not fixed]
        return [_split(leaf, samples, shape) for leaf, (shape, _) in zip(own, self.shapes, strict=True)]

    def output_samples(self, leaves: list[Any], samples: int) -> list[Tensor]:
        """The compared outputs, each [samples, n, ...]."""
        own = [leaves[i] for i in self.outputs]
        return [_split(leaf, samples, shape) for leaf, (shape, _) in zip(own, self.output_shapes, strict=True)]

    def run(self, block: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
        """Outputs of the block [samples, n, ...] for such inputs."""
        rows = iter(inputs)
        leaves = [value if fixed else next(rows).flatten(0, 1) for fixed, value in self.fixed]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.output_samples(_leaves(block(*args, **kwargs))[0], len(inputs[0]))


def _split(leaf: Tensor, samples: int, shape: torch.Size) -> Tensor:
    if len(leaf) == samples * shape[0]:
        return leaf.reshape(samples, *shape)
    return leaf.expand(samples, *leaf.shape)  # one value for all samples of a call, which share their time


def _grows(one: Any, two: Any) -> bool:
    tensors = isinstance(one, Tensor) and isinstance(two, Tensor) and one.dim() > 0
    return tensors and len(two) == 2 * len(one) and one.shape[1:] == two.shape[1:]


def probe(model: nn.Module, name: str, samples: Samples) -> BlockIO:
    """Find out which inputs and outputs of a block belong to the samples: they grow with the batch.

    Raises:
        TdqError: An input differs between samples without growing with the batch; no output grows.
    """
    one, spec, outputs = observe(model, name, samples.call([0]), outputs=True)
    two, _, doubled = observe(model, name, samples.call([0, 0]), outputs=True)
    other, _, _ = observe(model, name, samples.call([len(samples) - 1]), outputs=False)
    fixed: list[tuple[bool, Any]] = []
    shapes = []
    for a, b, c in zip(one, two, other, strict=True):
        if _grows(a, b):
            own = True
        elif isinstance(a, Tensor) and isinstance(c, Tensor):
            own = a.shape != c.shape or not torch.equal(a, c)
            if own and (a.dim() == 0 or len(a) != 1 or a.shape != c.shape):
                raise TdqError(
                    "model",
                    name,
                    f"an input of this block, of shape {tuple(a.shape)}, differs between samples, but does not grow "
                    "with the batch",
                    "Leave its layers out with a `quant_cfg` rule, or call the model with a time per sample",
                )
        else:
            own = False
        fixed.append((not own, None if own else a))
        if own:
            shapes.append((a.shape, a.dtype))
    pairs = list(enumerate(zip(outputs or [], doubled or [], strict=True)))
    compared = [(i, a) for i, (a, b) in pairs if _grows(a, b) and a.is_floating_point()]
    if not compared or not shapes:
        raise TdqError("model", name, "this block has no inputs or outputs per sample", "Leave its layers out")
    return BlockIO(spec, fixed, shapes, [i for i, _ in compared], [(a.shape, a.dtype) for _, a in compared])


def observed(
    model: nn.Module, name: str, io: BlockIO, samples: Samples, chosen: Sequence[int], size: int, outputs: bool
) -> Iterator[tuple[list[int], list[Tensor], list[Tensor]]]:
    """(numbers of samples, inputs, outputs) of a block, call by call; see :class:`BlockIO` for their shapes."""
    for numbers, call in samples.batches(chosen, size):
        inputs, _, found = observe(model, name, call, outputs)
        results = io.output_samples(found, len(numbers)) if found is not None else []
        yield numbers, io.input_samples(inputs, len(numbers)), results
