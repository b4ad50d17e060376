"""Sensitivity: each quantizer alone against full precision, and the fewest layers to leave alone for a target."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn
from tqdm import tqdm

from modelopt_tdq.core.distributed import all_reduce
from modelopt_tdq.core.metrics import decibels
from modelopt_tdq.model.call import first_output
from modelopt_tdq.model.full_precision import full_precision
from modelopt_tdq.model.replay_ranks import Batch

__all__ = ["LayerSensitivity", "Probe", "Proposal", "propose", "sensitivity"]


@dataclass(frozen=True)
class LayerSensitivity:
    """What quantizing one layer alone does to the model's output.

    Attributes:
        name: Of the layer (the parent of its quantizers).
        activation_db: [T] SQNR of the model's output in dB with only this layer's input quantized.
        weight_db: [T] likewise with only its weights quantized; infinite where they are not quantized.
    """

    name: str
    activation_db: tuple[float, ...]
    weight_db: tuple[float, ...]

    @property
    def worst_db(self) -> float:
        """Smallest of all."""
        return min((*self.activation_db, *self.weight_db), default=math.inf)


@dataclass(frozen=True)
class Proposal:
    """Layers to keep in high precision so that the output reaches a target at the probed times.

    Attributes:
        target_db: What was asked for.
        layers: The layers, most harmful first.
        sqnr_db: [T] measured with those layers in high precision and everything else quantized.
        rules: The same as ``quant_cfg`` rules, to be appended to those of the config.
    """

    target_db: float
    layers: tuple[str, ...]
    sqnr_db: tuple[float, ...]
    rules: list[dict[str, Any]] = field(default_factory=list)

    @property
    def reached(self) -> bool:
        """Whether the measured output reaches the target at every probed time."""
        return min(self.sqnr_db, default=math.inf) >= self.target_db


class Probe:
    """The model at a few times: its calls, and its full-precision outputs.

    Args:
        model: Quantized and calibrated.
        batches: Of this process; their rows are in ``rows``.
        rows: [T] rows of the times; the same in all processes.

    Attributes:
        energy: [T] float64, of the full-precision outputs; summed over processes, as all that is measured here.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Batch], rows: Sequence[int]) -> None:
        self.model, self.rows = model, list(rows)
        self._batches = list(batches)
        with full_precision(model), torch.no_grad():
            self._references: list[Tensor] = [first_output(model(**batch.call)).float() for batch in self._batches]
        self.energy = self._summed(self._references)

    def _summed(self, values: Iterable[Tensor]) -> Tensor:
        """[T] float64 sum of squares at each time."""
        total = torch.zeros(len(self.rows), dtype=torch.float64)
        for batch, value in zip(self._batches, values, strict=True):
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
            outputs = [first_output(self.model(**batch.call)).float() for batch in self._batches]
        return self._summed([o - r for o, r in zip(outputs, self._references, strict=True)])

    def sqnr_db(self, noise: Tensor) -> tuple[float, ...]:
        """[T] in dB."""
        return tuple(decibels(*powers) for powers in zip(self.energy.tolist(), noise.tolist(), strict=True))


def _layers(model: nn.Module) -> dict[str, tuple[list[str], list[str]]]:
    """Activation and weight quantizers (enabled ones, by name) of each layer."""
    layers: dict[str, tuple[list[str], list[str]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and module.is_enabled and module._if_quant:
            layer, _, kind = name.rpartition(".")
            layers.setdefault(layer, ([], []))["weight" in kind].append(name)
    return layers


def sensitivity(
    probe: Probe, progress: bool, description: str = "sensitivity", known: Sequence[LayerSensitivity] = ()
) -> list[LayerSensitivity]:
    """Each layer alone, its input and its weights apart; most harmful first.

    Args:
        probe: Times to look at.
        progress: Show a progress bar.
        description: Of the progress bar.
        known: Results with other activation scales, whose weights need not be measured again.
    """
    found = []
    weight_db = {s.name: s.weight_db for s in known}
    layers = _layers(probe.model)
    for layer, (activations, weights) in tqdm(layers.items(), description, disable=not progress, unit="layer"):
        found_db = []
        for names in (activations, weights):
            chosen = set(names)
            if names is weights and layer in weight_db:
                found_db.append(weight_db[layer])
                continue
            if not chosen:
                found_db.append((math.inf,) * len(probe.rows))
                continue
            with probe.only(chosen.__contains__):
                found_db.append(probe.sqnr_db(probe.noise()))
        found.append(LayerSensitivity(layer, *found_db))
    return sorted(found, key=lambda s: s.worst_db)


def _removal_order(noise: dict[str, Tensor], allowed: Tensor) -> list[str]:
    """All layers, in the order in which leaving them out helps most at the time that lacks most.

    Args:
        noise: [T] squared error of the output that each layer causes alone; taken to add up.
        allowed: [T] squared error at the target.
    """
    order = []
    left = dict(noise)
    total = torch.stack(list(left.values())).sum(0)
    while left:
        time = int((total / allowed).argmax())
        worst = max(left, key=lambda name: float(left[name][time]))
        total = total - left.pop(worst)
        order.append(worst)
    return order


def propose(probe: Probe, layers: list[LayerSensitivity], target_db: float) -> Proposal:
    """The shortest prefix of the removal order with which the measured output reaches the target.

    The noise of layers adds up closely enough to put them in order; whether the target is reached is
    measured, by bisection, with everything else quantized.

    Args:
        probe: Times to look at.
        layers: From :func:`sensitivity` of the same probe.
        target_db: SQNR of the model's output to reach at every probed time, in dB.
    """
    noise = {s.name: probe.energy * (_power(s.activation_db) + _power(s.weight_db)) for s in layers}
    allowed = probe.energy * 10.0 ** (-target_db / 10.0)
    order = _removal_order(noise, allowed)

    def measured(kept: int) -> Tensor:
        off = tuple(f"{name}." for name in order[:kept])
        with probe.only(lambda name: not name.startswith(off)):
            return probe.noise()

    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if bool((measured(middle) <= allowed).all()):
            high = middle
        else:
            low = middle + 1
    kept = tuple(order[:low])
    rules = [{"quantizer_name": f"{name}.*_quantizer", "enable": False} for name in kept]
    return Proposal(target_db, kept, probe.sqnr_db(measured(low)), rules)


def _power(decibels: tuple[float, ...]) -> Tensor:
    """[T] noise relative to the signal."""
    return torch.pow(10.0, -torch.tensor(decibels, dtype=torch.float64) / 10.0)
