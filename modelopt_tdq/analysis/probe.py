"""A quantized model at a few times: its calls, its full-precision outputs, and the error of what it makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn

from modelopt_tdq.core.distributed import all_reduce
from modelopt_tdq.core.metrics import decibels
from modelopt_tdq.model.call import first_output
from modelopt_tdq.model.replay_ranks import Batch

__all__ = ["Probe", "is_weight", "layer_quantizers"]


class Probe:
    """The model at a few times.

    Args:
        model: Quantized and calibrated.
        calls: Of this process, with their outputs in full precision; their rows are in ``rows``.
        rows: [T] rows of the times; the same in all processes.

    Attributes:
        energy: [T] float64, of the full-precision outputs; summed over processes, as all that is measured here.
    """

    def __init__(self, model: nn.Module, calls: Iterable[tuple[Batch, Tensor]], rows: Sequence[int]) -> None:
        self.model, self.rows = model, list(rows)
        known = list(calls)
        self.batches = [batch for batch, _ in known]
        self._references = [reference for _, reference in known]
        self.energy = self._summed(self._references)

    def _summed(self, values: Iterable[Tensor]) -> Tensor:
        """[T] float64 sum of squares at each time."""
        total = torch.zeros(len(self.rows), dtype=torch.float64)
        for batch, value in zip(self.batches, values, strict=True):
            if batch.counts:
                total[self.rows.index(batch.row)] += value.double().square().sum().cpu()
        return all_reduce(total, "sum")

    @contextmanager
    def only(self, enabled: Callable[[str], bool]) -> Iterator[None]:
        """Only the quantizers with such a name quantize."""
        changed = []
        for name, module in self.model.named_modules():
            if isinstance(module, TensorQuantizer) and module._if_quant and not enabled(name):
                module.disable_quant()
                changed.append(module)
        try:
            yield
        finally:
            for module in changed:
                module.enable_quant()

    def noise(self) -> Tensor:
        """[T] float64 squared error of the output at each time, with the quantizers as they are."""
        with torch.no_grad():
            outputs = [first_output(self.model(**batch.call)).float() for batch in self.batches]
        return self._summed([o - r for o, r in zip(outputs, self._references, strict=True)])

    def sqnr_db(self, noise: Tensor) -> tuple[float, ...]:
        """[T] in dB."""
        return tuple(decibels(*powers) for powers in zip(self.energy.tolist(), noise.tolist(), strict=True))


def is_weight(name: str) -> bool:
    """Whether the quantizer of this name is one of weights."""
    return "weight" in name.rpartition(".")[2]


def layer_quantizers(model: nn.Module) -> dict[str, tuple[list[str], list[str]]]:
    """Activation and weight quantizers (enabled ones, by name) of each layer."""
    layers: dict[str, tuple[list[str], list[str]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and module.is_enabled and module._if_quant:
            layer = name.rpartition(".")[0]
            layers.setdefault(layer, ([], []))[is_weight(name)].append(name)
    return layers
