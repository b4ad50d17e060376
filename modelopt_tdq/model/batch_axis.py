"""Which tensors of a model's call have a row per sample: by evidence, not by their sizes.

A tensor whose first dimension is as large as the batch may be a table that all samples share, a grid of positions, a
shift; with a batch of one, every leading 1 looks like a batch. So the first call that is seen is tried on parts of
itself: if the model gives single samples the outputs that they had in the batch, what was taken apart belongs to the
samples. If not, one of the tensors may be shared; if nothing works, calls of this model are not taken apart.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn

from modelopt_tdq.model.call import cloned, layout, tensor_leaves, walk
from modelopt_tdq.model.snapshot import restored
from modelopt_tdq.model.timestep import CurrentTimestep

__all__ = ["BatchAxis", "digest", "find_batch_axis"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchAxis:
    """How calls of one model are made of samples.

    Attributes:
        time: The argument that holds the time.
        own: Names of the tensors with a row per sample; the time among them if it has rows: as many as there are
            samples, or one for several (classifier-free guidance).
        shared: Names of the other tensors.
    """

    time: str
    own: frozenset[str]
    shared: frozenset[str]

    def batch(self, arguments: Mapping[str, Any]) -> int | None:
        """Samples of a call; None if it holds a tensor that is not known, or its tensors disagree."""
        leaves = _without(arguments, self.time)
        sizes = {leaf.shape[0] if leaf.dim() else 0 for name, leaf in leaves.items() if name in self.own}
        if not leaves.keys() <= self.own | self.shared or len(sizes) != 1:
            return None
        batch, time = sizes.pop(), arguments.get(self.time)
        if self.time in self.own and not (isinstance(time, Tensor) and time.dim() > 0 and batch % len(time) == 0):
            return None
        return batch

    def sample(self, arguments: Mapping[str, Any], index: int, batch: int) -> dict[str, Any]:
        """Arguments of a call with one sample of ``batch``."""
        return self._picked(arguments, [index], batch)

    def _picked(self, arguments: Mapping[str, Any], indices: Sequence[int], batch: int) -> dict[str, Any]:
        rows = torch.tensor(indices)

        def pick(name: str, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if name not in self.own:
                return leaf
            own = rows if name != self.time else rows * len(leaf) // batch
            return leaf[own.to(leaf.device)]

        picked: dict[str, Any] = walk(dict(arguments), pick)
        return picked

    def together(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Arguments of one call with these samples, which have one :meth:`layout`."""
        leaves = [tensor_leaves(sample) for sample in samples]

        def join(name: str, leaf: Any) -> Any:
            return torch.cat([own[name] for own in leaves]) if name in self.own and isinstance(leaf, Tensor) else leaf

        joined: dict[str, Any] = walk(dict(samples[0]), join)
        return joined

    def layout(self, sample: Mapping[str, Any]) -> str:
        """What samples of one call have in common: shapes, all that is no tensor, and the content of shared tensors."""
        leaves = tensor_leaves(sample)
        shared = [(name, digest(leaves[name])) for name in sorted(self.shared & leaves.keys())]
        return repr((layout({name: value for name, value in sample.items() if name != self.time}), shared))


def digest(tensor: Tensor) -> str:
    """Of the content of a tensor."""
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(plain.view(torch.uint8).numpy().data).hexdigest() if plain.numel() else ""


def _without(arguments: Mapping[str, Any], time: str) -> dict[str, Tensor]:
    return {name: leaf for name, leaf in tensor_leaves(arguments).items() if name != time}


@contextmanager
def _aside(model: nn.Module, timestep: CurrentTimestep) -> Iterator[None]:
    """A call that leaves no trace: nothing is collected, recorded or drawn from the random numbers."""
    collecting = [m for m in model.modules() if isinstance(m, TensorQuantizer) and m._if_calib]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    timestep.aside = True
    try:
        with restored(model), torch.random.fork_rng(devices), torch.no_grad():
            for quantizer in collecting:
                quantizer._if_calib = False
            yield
    finally:
        timestep.aside = False


def find_batch_axis(
    model: nn.Module,
    timestep: CurrentTimestep,
    arguments: Mapping[str, Any],
    output: Any,
    watched: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> BatchAxis | None:
    """Try a sample of a call by itself; of a call with one sample, two of it together.

    One call of the model per attempt, whatever the batch: one attempt, unless some tensor of the batch's size is
    shared. It is of the last sample: what belongs to all of them, or to the first, shows there.

    Args:
        model: In the state in which it made the call; best in full precision, where no rounding falls the other way.
        timestep: Its time.
        arguments: Of the call, by name.
        output: Of the call.
        watched: Entered around calls of one sample; where the model does not run in it, it runs without.

    Returns:
        None if the samples cannot be told apart: the model does not run on one alone, or its output differs then.
    """
    leaves = _without(arguments, timestep.argument)
    batch = next((leaf.shape[0] for leaf in leaves.values() if leaf.dim()), 0)
    rows = {name: leaf for name, leaf in tensor_leaves({"": output}).items() if leaf.dim() and leaf.shape[0] == batch}
    candidates = [name for name, leaf in leaves.items() if leaf.dim() and leaf.shape[0] == batch]
    if not batch or not rows:
        return None
    time = arguments.get(timestep.argument)
    times = len(time) if isinstance(time, Tensor) and time.dim() else 0
    has_rows = times > 1 or times == batch
    with_time = [[timestep.argument]] if has_rows and batch % times == 0 else []
    attempts = [candidates, *([c for c in candidates if c != left] for left in candidates[1:]), candidates[:1]]
    tried = [frozenset(own + more) for more in [*with_time, []] for own in attempts]
    for own in dict.fromkeys(tried):
        axis = BatchAxis(timestep.argument, own, frozenset(leaves) - own)
        picks = [[batch - 1]] if batch > 1 else [[0, 0], [0]]
        # all are tried in any case: all processes make the same calls
        agreed = [
            _agrees(model, timestep, axis, arguments, batch, rows, pick, watched if len(pick) == 1 else nullcontext)
            for pick in picks
        ]
        if all(agreed):
            return axis
    return None


def _agrees(
    model: nn.Module,
    timestep: CurrentTimestep,
    axis: BatchAxis,
    arguments: Mapping[str, Any],
    batch: int,
    rows: Mapping[str, Tensor],
    pick: list[int],
    watched: Callable[[], AbstractContextManager[Any]],
) -> bool:
    """Whether these samples by themselves get the outputs that they have in the batch."""
    found = None
    for around in dict.fromkeys((watched, nullcontext)):
        with _aside(model, timestep):
            try:
                with around():
                    found = tensor_leaves({"": model(**cloned(axis._picked(arguments, pick, batch)))})
                break
            except Exception as failure:  # whatever a model raises on samples that it cannot take
                _log.debug("samples %s do not run by themselves: %s", pick, failure)
    if found is None:
        return False
    for name, reference in rows.items():
        own = found.get(name)
        expected = reference[torch.tensor(pick, device=reference.device)]
        if own is None or own.shape != expected.shape:
            return False
        if not expected.is_floating_point():
            continue
        # other batches may take other kernels: errors of rounding, far below those of a tensor taken apart wrongly
        error, power = (
            value.double().square().sum() for value in (own.double() - expected.double(), expected.double())
        )
        if not bool(error <= torch.finfo(expected.dtype).eps * power):
            return False
    return True
