"""The inputs and targets of one block, for all samples, within a bound on memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.full_precision import full_precision
from modelopt_tdq.model.place import execution_device
from modelopt_tdq.reconstruction import files
from modelopt_tdq.reconstruction.observe import BlockIO, observed
from modelopt_tdq.reconstruction.samples import Samples

__all__ = ["BlockCache", "Chunk"]


@dataclass(frozen=True)
class Chunk:
    """What is recorded of some samples.

    Attributes:
        times: [n] float32.
        inputs: Of the model quantized so far, each [n, rows, ...].
        full: The same of the full-precision model; empty without QDrop.
        targets: Outputs of the full-precision block on full-precision inputs, each [n, rows, ...].
    """

    times: Tensor
    inputs: list[Tensor]
    full: list[Tensor]
    targets: list[Tensor]

    def __len__(self) -> int:
        return len(self.times)

    def pick(self, rows: Tensor) -> Chunk:
        """Some of the samples, in this order."""
        lists = ([v[rows] for v in values] for values in (self.inputs, self.full, self.targets))
        return Chunk(self.times[rows], *lists)

    @property
    def bytes(self) -> int:
        """Memory of inputs and targets."""
        return sum(v.numel() * v.element_size() for v in self.inputs + self.full + self.targets)


class BlockCache:
    """Records a block and hands its samples out in chunks.

    All inputs and targets that are held at one time, including a batch that was picked from them, take at most
    ``memory_limit`` bytes. What does not fit is written to ``folder``, or recorded again whenever it is needed. What
    a running model needs beside (its weights, the activations of one call, the recorded calls of the model) is not
    counted.

    Args:
        model: Quantized so far.
        name: Of the block.
        io: Its inputs and outputs.
        samples: Of the model.
        batch_size: Samples of a batch, and of a call of the model.
        qdrop: Whether full-precision inputs are needed too.
        memory_limit: In bytes.
        folder: For chunks that do not fit, or None.

    Raises:
        TdqError: Two batches do not fit into ``memory_limit``.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        io: BlockIO,
        samples: Samples,
        batch_size: int,
        qdrop: bool,
        memory_limit: int,
        folder: Path | None,
    ) -> None:
        self._model, self._name, self.io, self._samples = model, name, io, samples
        self._device = execution_device(model.get_submodule(name))
        self._batch, self._qdrop, self._folder = min(batch_size, len(samples)), qdrop, folder
        each = io.bytes_per_sample(2 if qdrop else 1)
        most = memory_limit // each - self._batch
        if most < self._batch:
            raise TdqError(
                "memory_limit",
                memory_limit,
                f"a sample of block {name} takes {each} bytes, and two batches of {self._batch} have to fit",
                f"Allow {2 * self._batch * each} bytes, or lower `batch_size`",
            )
        count = math.ceil(len(samples) / most)
        #: Numbers of the samples of each chunk; every chunk is spread over the times.
        self.chunks = [list(range(len(samples)))[i::count] for i in range(count)]
        self._held: tuple[int, Chunk] | None = None
        self.close()  # an interrupted run may have left chunks

    def chunk(self, number: int) -> Chunk:
        """One chunk; the one before is released first, so keep no reference to it."""
        if self._held is None or self._held[0] != number:
            self._held = None
            self._held = number, self._load(number)
        return self._held[1]

    def _stem(self, number: int) -> Path | None:
        return None if self._folder is None or len(self.chunks) == 1 else self._folder / f"chunk-{number:05d}"

    def _load(self, number: int) -> Chunk:
        stem = self._stem(number)
        if stem is None or not files.is_complete(stem):
            chunk = self._record(self.chunks[number])
            if stem is not None:
                lists = {"inputs": chunk.inputs, "full": chunk.full, "targets": chunk.targets}
                tensors = {f"{k}.{i}": v for k, values in lists.items() for i, v in enumerate(values)}
                files.write(stem, {"times": chunk.times, **tensors}, {"block": self._name, "chunk": number})
            return chunk
        tensors, _ = files.read(stem, self._device)

        def listed(kind: str) -> list[Tensor]:
            return [tensors[f"{kind}.{i}"] for i in range(sum(k.startswith(f"{kind}.") for k in tensors))]

        return Chunk(tensors["times"], listed("inputs"), listed("full"), listed("targets"))

    def _record(self, chosen: list[int]) -> Chunk:
        device = self._device
        io, place = self.io, {number: i for i, number in enumerate(chosen)}

        def empty(shapes: list[tuple[torch.Size, torch.dtype]]) -> list[Tensor]:
            return [torch.empty(len(chosen), *shape, dtype=dtype, device=device) for shape, dtype in shapes]

        times = self._samples.times[chosen].to(device)
        chunk = Chunk(times, empty(io.shapes), empty(io.shapes if self._qdrop else []), empty(io.output_shapes))

        def fill(numbers: list[int], pairs: Iterator[tuple[Tensor, Tensor]]) -> None:
            rows = torch.tensor([place[n] for n in numbers], device=device)
            for own, values in pairs:
                own.index_copy_(0, rows, values)

        with torch.no_grad():
            for numbers, inputs, _ in self._observed(chosen, outputs=False):
                fill(numbers, zip(chunk.inputs, inputs, strict=True))
            with full_precision(self._model):
                for numbers, inputs, outputs in self._observed(chosen, outputs=True):
                    fill(numbers, zip(chunk.full, inputs, strict=False))
                    fill(numbers, zip(chunk.targets, outputs, strict=True))
        return chunk

    def _observed(self, chosen: list[int], outputs: bool) -> Iterator[tuple[list[int], list[Tensor], list[Tensor]]]:
        return observed(self._model, self._name, self.io, self._samples, chosen, self._batch, outputs)

    def errors(self, run: Callable[[Chunk], Tensor]) -> Tensor:
        """[N] float64, what ``run`` makes of each sample, batch by batch, in the samples' order."""
        found = torch.zeros(len(self._samples), dtype=torch.float64)
        for number, chosen in enumerate(self.chunks):
            chunk = self.chunk(number)
            for start in range(0, len(chosen), self._batch):
                part = torch.arange(start, min(start + self._batch, len(chosen)), device=chunk.times.device)
                found[chosen[start : start + self._batch]] = run(chunk.pick(part)).double().cpu()
            del chunk
        return found

    def close(self) -> None:
        """Release the memory and delete the chunk files."""
        self._held = None
        if self._folder is not None:
            for path in self._folder.glob("chunk-*"):
                path.unlink()
