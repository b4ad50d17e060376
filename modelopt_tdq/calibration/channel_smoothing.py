"""Smoothing over channels (SmoothQuant, Xiao et al. 2023), of linear layers and of convolutions.

    y = w x = (w c) (x / c),    c_j = max|x_j|^a / max|w_j|^(1 - a)    per input channel j

A few channels with large values cost all others their codes. Dividing them moves the difficulty into the weights, whose
codes have scales of their own. x is divided where it is quantized, by the product of c and the scale
(:meth:`modelopt_tdq.core.scales.Scales.over_channels`), w is multiplied before it is calibrated. max|x_j| is over all
calibrated times. Padding stays exact, since zero divided is zero.

Layers that read the same tensor share a vector (q, k, v; the shortcut and the first convolution of a block), with
max|w_j| over all of them: the tensor is divided once. ``auto`` chooses a strength a for each tensor, or none.

Attention products have no weights to multiply, and stay as they are; so do transposed convolutions, and layers whose
weight other modules use too.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from modelopt.torch.quantization.nn import QuantModule, SequentialQuantizer, TensorQuantizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from tqdm import tqdm

from modelopt_tdq.calibration.weights import calibrate_weights
from modelopt_tdq.config import CalibrationFields
from modelopt_tdq.core.distributed import all_reduce, gather, union
from modelopt_tdq.core.fake_quant import FP8_E4M3, SUPPORTED_BITS, NumBits, code_range, fake_quantize, quantize
from modelopt_tdq.core.together import check
from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.call import first_output, layer_input
from modelopt_tdq.model.full_precision import full_precision
from modelopt_tdq.model.place import require_weights
from modelopt_tdq.model.quantizer import TemporalQuantizer
from modelopt_tdq.model.replay import Replay
from modelopt_tdq.model.replay_ranks import all_samples
from modelopt_tdq.model.select import temporal_names, weight_quantizers
from modelopt_tdq.model.timestep import CurrentTimestep

__all__ = ["smooth_channels", "smoothing_vector", "undo_channel_smoothing"]

#: Strengths that ``auto`` tries, beside none.
STRENGTHS = (0.3, 0.5, 0.6, 0.7, 0.8)

#: So many of them ``auto`` tries for all tensors at once.
_UNIFORM = 3

#: Times at which ``auto`` compares outputs of the model; and by how many dB smoothing has to be better than none.
_JUDGED = 8
_CLEAR = 0.1

#: ``auto`` smooths where it lowers the error of the outputs below this fraction of what it is without.
_WORTH = 0.98

#: c of a tensor lies within these factors of its geometric mean, so that the weights keep the range of their dtype.
_FURTHEST = 1024.0

#: Multiples of the largest magnitude at which ``auto`` tries to clip activations and weights, below 8 bits.
_CLIPS = (1.0, 0.85, 0.7, 0.55, 0.4)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def smoothing_vector(activation: Tensor, weight: Tensor, strength: float) -> Tensor:
    """What the channels of an activation are divided by: c_j = max|x_j|^a / max|w_j|^(1 - a).

    Its geometric mean is 1: a common factor would change nothing, since scales follow.

    Args:
        activation: [C] max|x_j|.
        weight: [C] max|w_j|.
        strength: a, in [0, 1].

    Returns:
        [C] float32, positive and finite; 1 for channels in which either is zero or not finite.
    """
    largest, other = activation.double(), weight.double()
    alive = (largest > 0) & (other > 0) & largest.isfinite() & other.isfinite()
    if not bool(alive.any()):
        return torch.ones_like(activation, dtype=torch.float32)
    log = strength * torch.where(alive, largest, 1.0).log() - (1 - strength) * torch.where(alive, other, 1.0).log()
    log = torch.where(alive, log - log[alive].mean(), 0.0)
    return log.exp().clamp(1 / _FURTHEST, _FURTHEST).float()


@dataclass(eq=False)
class _Layer:
    """A layer whose input channels can be divided.

    Attributes:
        name: As in ``model.named_modules()``.
        module: The layer.
        largest: [C] float32, max|x_j| so far.
        original: The memory of its weight as it is, [O, C / groups, ...].
    """

    name: str
    module: Any
    largest: Tensor = field(init=False, repr=False)
    original: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.original = self.weight.data
        self.largest = torch.zeros(self.weight.shape[1] * self.groups, device=self.weight.device)

    @property
    def quantizer(self) -> TensorQuantizer:
        """Of the input."""
        return self.module.input_quantizer

    @property
    def weight(self) -> nn.Parameter:
        """[O, C / groups, ...] as stored, not quantized."""
        weight: nn.Parameter = self.module._parameters["weight"]
        return weight

    @property
    def groups(self) -> int:
        """Of a convolution; 1 for a linear layer."""
        return int(getattr(self.module, "groups", 1))

    @property
    def trailing(self) -> int:
        """Dimensions of the input behind that of the channels."""
        return len(getattr(self.module, "kernel_size", ()))

    def see(self, x: Tensor) -> None:
        """Take an input into account."""
        channels = x.detach().movedim(x.dim() - 1 - self.trailing, 0).reshape(self.largest.numel(), -1)
        self.largest = torch.maximum(self.largest, channels.abs().amax(1).float().to(self.largest.device))

    def weight_magnitude(self) -> Tensor:
        """[C] float32, the largest magnitude of the weights that each channel is multiplied with."""
        weight = self.original
        grouped = weight.reshape(self.groups, -1, *weight.shape[1:]).abs().float()  # [g, O / g, C / g, ...]
        return grouped.flatten(3).amax(3).amax(1).flatten() if grouped.dim() > 3 else grouped.amax(1).flatten()

    def divisor(self, vector: Tensor) -> Tensor:
        """[C] as it broadcasts against the input."""
        return vector.reshape(-1, *(1,) * self.trailing)

    def multiplied(self, vector: Tensor) -> Tensor:
        """The original weight, its input channels multiplied by ``vector`` [C] in float32; in its own dtype."""
        weight = self.original
        grouped = weight.reshape(self.groups, -1, *weight.shape[1:]).float()
        factor = vector.to(weight.device).reshape(self.groups, 1, -1, *(1,) * (weight.dim() - 2))
        return (grouped * factor).reshape(weight.shape).to(weight.dtype)

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the layer makes of ``x`` with another weight, both as they are."""
        bias = self.module._parameters["bias"]
        if self.trailing:
            output: Tensor = self.module._conv_forward(x, weight, bias)
            return output
        return functional.linear(x, weight, bias)

    def smooth(self, vector: Tensor | None, timestep: CurrentTimestep) -> None:
        """Divide the input by ``vector`` [C] from now on; None: leave both as they were.

        The multiplied weight is put in place of the original, which stays as it is: whoever raises later gives it back
        (:func:`modelopt_tdq.model.snapshot.restored_on_error`).
        """
        quantizer = TemporalQuantizer.from_tensor_quantizer(self.quantizer, timestep, f"{self.name}.input_quantizer")
        self.weight.data = self.original if vector is None else self.multiplied(vector)
        quantizer.set_channel_divisor(None if vector is None else self.divisor(vector).to(self.original.device))


def _layers(model: nn.Module, quantizers: dict[str, TensorQuantizer]) -> list[_Layer]:
    """Those whose input quantizer is one of ``quantizers``, and whose weight is theirs alone."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, QuantModule) or not isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
            continue
        weight = module._parameters.get("weight")
        if quantizers.get(f"{name}.input_quantizer") is None or weight is None or owners[id(weight)] > 1:
            continue
        if weight.dim() != 2 + len(getattr(module, "kernel_size", ())):
            continue  # compressed
        if isinstance(weight, DTensor):
            raise TdqError(
                "channel_smoothing",
                name,
                "the channels of this weight are spread over processes",
                'Smooth and calibrate before the model is sharded, or set "channel_smoothing": "none"',
            )
        found.append(_Layer(name, module))
    return found


def _require_plain(model: nn.Module, config: CalibrationFields) -> None:
    """Raise where channels cannot be smoothed, or are already."""
    if config.weights == "keep":
        raise TdqError(
            "channel_smoothing",
            config.channel_smoothing,
            'it changes the weights, and "weights": "keep" says that their scales stay',
            'Use "weights": "max" or "mse", or "channel_smoothing": "none"',
        )
    require_weights(model, "have its channels smoothed")
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and getattr(module, "pre_quant_scale", None) is not None:
            raise TdqError(
                "channel_smoothing",
                config.channel_smoothing,
                f"the input of {name} has a pre_quant_scale already, as of ModelOpt's smoothquant or awq",
                'Take the other algorithm out of "algorithm", or set "channel_smoothing": "none"',
            )


class _Readers:
    """Which layers read the same tensor, over all calls of the model: sets that grow together."""

    def __init__(self, layers: list[_Layer]) -> None:
        self._parent = list(range(len(layers)))
        self._readers: dict[Any, tuple[StorageWeakRef, int]] = {}

    def _root(self, number: int) -> int:
        while self._parent[number] != number:
            number = self._parent[number]
        return number

    def join(self, one: int, other: int) -> None:
        """Layers ``one`` and ``other`` share a vector."""
        one, other = self._root(one), self._root(other)
        self._parent[max(one, other)] = min(one, other)

    def read(self, number: int, trailing: int, x: Tensor) -> None:
        """Layer ``number`` reads ``x``: the same as an earlier one, if the same memory has not been written since."""
        # as long as it is kept, no other memory has its address
        storage = StorageWeakRef(x.untyped_storage())  # type: ignore[no-untyped-call]
        version = -1 if x.is_inference() else x._version
        key = storage.cdata, x.storage_offset(), x.shape, x.stride(), x.dtype, version, trailing
        known = self._readers.setdefault(key, (storage, number))
        self.join(known[1], number)

    def next_call(self) -> None:
        """A call of the model is over."""
        self._readers.clear()

    def groups(self) -> list[list[int]]:
        """Numbers of the layers that share a vector; the same in all processes."""
        for parents in gather(self._parent):
            for number, parent in enumerate(parents):
                self.join(number, parent)
        found: dict[int, list[int]] = {}
        for number in range(len(self._parent)):
            found.setdefault(self._root(number), []).append(number)
        return list(found.values())


@contextmanager
def _observed(layers: list[_Layer], readers: _Readers) -> Iterator[None]:
    """While the model runs, find the largest magnitudes of the layers' inputs, and who shares one."""

    def hook(number: int) -> Callable[..., None]:
        layer = layers[number]

        def observe(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            if x.numel() == 0:
                return
            layer.see(x)
            readers.read(number, layer.trailing, x)

        return observe

    handles = [layer.quantizer.register_forward_pre_hook(hook(number)) for number, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(
    model: nn.Module,
    forward_loop: Callable[[nn.Module], Any],
    timestep: CurrentTimestep,
    config: CalibrationFields,
    layers: list[_Layer],
) -> tuple[list[list[_Layer]], Replay | None]:
    """Run ``forward_loop`` in full precision.

    Returns:
        The layers whose inputs are not only zeros, those that read the same tensor together; and a sample of the calls,
        for ``auto``.
    """
    readers = _Readers(layers)
    replay = Replay(model, timestep, config.replay_samples) if config.channel_smoothing == "auto" else None
    with tqdm(total=config.expected_calls, desc="channels", unit="call", disable=not config.progress) as bar:

        def count(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            check()
            readers.next_call()
            if not timestep.aside:
                bar.update()

        handle = model.register_forward_hook(count)
        try:
            with _observed(layers, readers), full_precision(model), torch.no_grad():
                if replay is None:
                    forward_loop(model)
                else:
                    with replay.recording(model):
                        forward_loop(model)
        finally:
            handle.remove()
    if replay is not None:
        replay.agree()
    for layer in layers:
        layer.largest = all_reduce(layer.largest, "max")
    groups = [[layers[number] for number in group] for group in readers.groups()]
    return [group for group in groups if any(bool(layer.largest.any()) for layer in group)], replay


def _vector(group: list[_Layer], strength: float) -> Tensor:
    """[C] of the layers that read one tensor."""
    device = group[0].weight.device
    largest = torch.stack([layer.largest.to(device) for layer in group]).amax(0)
    weights = torch.stack([layer.weight_magnitude().to(device) for layer in group]).amax(0)
    return smoothing_vector(largest, weights, strength)


class _Trial:
    """Forward hook on one layer: the error of its output, quantized with each strength, against what it is.

    Weights and activations have their bits, activations a scale for each call, as close to the final one as the
    samples of one time allow.
    """

    def __init__(
        self, layer: _Layer, vectors: list[Tensor], config: CalibrationFields, temporal: bool, rows: int
    ) -> None:
        self.layer, self.vectors = layer, vectors
        self.clips = (1.0,) if config.statistic == "max" else _CLIPS
        self.shifted = bool(config.asymmetric)
        self.static = not temporal
        self.squares = torch.zeros(rows, len(vectors) + 1, dtype=torch.float64)  # of the errors, and of the output
        self.row = 0
        self.counts = True
        clips = (1.0,) if config.weights == "max" else _CLIPS
        self.weights = [_rounded_weight(layer, vector, clips) for vector in vectors]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self.counts:
            return
        layer, num_bits = self.layer, self.layer.quantizer.num_bits
        x, y = layer_input(args, kwargs), first_output(output)
        self.squares[self.row, -1] += float(y.double().square().sum())
        for number, (vector, rounded) in enumerate(zip(self.vectors, self.weights, strict=True)):
            divided = x.float() / layer.divisor(vector).to(x.device)
            bound = (layer.largest / vector.to(layer.largest.device)).max()
            quantized = _rounded_activation(divided, num_bits, self.clips, self.shifted, bound if self.static else None)
            if rounded is None:
                weight = layer.multiplied(vector)
            else:
                weight = (rounded[0].float() * rounded[1]).to(layer.weight.dtype)
            found = layer.compute(quantized.to(x.dtype), weight)
            self.squares[self.row, number] += float((found - y).double().square().sum())

    def error(self) -> Tensor:
        """[number of vectors] of each, relative to the output, summed over the times; over all processes."""
        squares = all_reduce(self.squares, "sum")
        return (squares[:, :-1] / squares[:, -1:].clamp(min=1e-30)).sum(0)


def _clips_of(num_bits: NumBits, clips: tuple[float, ...]) -> tuple[float, ...]:
    return clips if isinstance(num_bits, int) and num_bits < 8 else clips[:1]


def _rounded_weight(layer: _Layer, vector: Tensor, clips: tuple[float, ...]) -> tuple[Tensor, Tensor] | None:
    """Codes and scales [O, 1, ...] of the multiplied weight, for each output channel; None if it stays in float."""
    quantizer = layer.module.weight_quantizer
    plain = isinstance(quantizer, TensorQuantizer) and not isinstance(quantizer, SequentialQuantizer)
    if not plain or not quantizer.is_enabled or quantizer.num_bits not in SUPPORTED_BITS:
        return None
    num_bits: NumBits = quantizer.num_bits
    weight = layer.multiplied(vector).float()
    kept = () if quantizer.axis is None else (0,)
    amax = weight.abs().amax([d for d in range(weight.dim()) if d not in kept], keepdim=True).clamp(min=1e-30)
    best = torch.full_like(amax, float("inf"))
    scale = amax / code_range(num_bits)[1]
    for clip in _clips_of(num_bits, clips):
        tried = amax * clip / code_range(num_bits)[1]
        error = (fake_quantize(weight, tried, None, num_bits) - weight).square()
        error = error.sum([d for d in range(weight.dim()) if d not in kept], keepdim=True)
        scale, best = torch.where(error < best, tried, scale), torch.minimum(error, best)
    codes = quantize(weight, scale, None, num_bits)
    return codes.to(torch.float8_e4m3fn if num_bits == FP8_E4M3 else torch.int8), scale


def _rounded_activation(
    x: Tensor, num_bits: NumBits, clips: tuple[float, ...], shifted: bool, bound: Tensor | None
) -> Tensor:
    """Fake-quantized with that one of a few scales which has the least squared error."""
    smallest, largest = code_range(num_bits)
    low, high = (v.clamp(max=0) if i == 0 else v.clamp(min=0) for i, v in enumerate(torch.aminmax(x)))
    amax = (torch.maximum(-low, high) if bound is None else bound.to(x.device)).clamp(min=1e-30)
    options: list[tuple[Tensor, Tensor | None]] = [(amax * clip / largest, None) for clip in _clips_of(num_bits, clips)]
    if shifted and isinstance(num_bits, int):
        for clip in _clips_of(num_bits, clips):
            scale = ((high * clip - low) / (largest - smallest)).clamp(min=1e-30)
            options.append((scale, scale * torch.round(low / scale - smallest)))
    best, error = x, float("inf")
    for scale, offset in options:
        tried = fake_quantize(x, scale, offset, num_bits)
        found = error if len(options) == 1 else float((tried - x).square().sum())
        if len(options) == 1 or found < error:
            best, error = tried, found
    return best


def _least_layer_error(
    model: nn.Module, groups: list[list[_Layer]], replay: Replay, config: CalibrationFields, follow: set[str]
) -> list[Tensor | None]:
    """The vector of each group with the least error of its layers' outputs, over all times; None: not smoothed."""
    vectors = []
    trials: dict[int, _Trial] = {}
    handles = []
    times = union(set(replay.times))
    for group in groups:
        tried = [_vector(group, strength) for strength in STRENGTHS]
        vectors.append([torch.ones_like(tried[0]), *tried])
        for layer in group:
            temporal = f"{layer.name}.input_quantizer" in follow and config.bins != 1
            trials[id(layer)] = _Trial(layer, vectors[-1], config, temporal, len(times))
            handles.append(layer.module.register_forward_hook(trials[id(layer)], with_kwargs=True))
    try:
        with full_precision(model), torch.no_grad():
            for batch in tqdm(replay.batches(times), "strengths", len(times), disable=not config.progress, unit="step"):
                for trial in trials.values():
                    trial.row, trial.counts = batch.row, batch.own
                model(**batch.call)
    finally:
        for handle in handles:
            handle.remove()
    found: list[Tensor | None] = []
    for group, tried in zip(groups, vectors, strict=True):
        errors = torch.stack([trials[id(layer)].error() for layer in group]).sum(0)
        errors[0] *= _WORTH
        best = int(errors.argmin())
        found.append(tried[best] if best else None)
    return found


class _Judge:
    """The error of the model's output for a choice of vectors, on replayed calls at a few times.

    Weights are quantized as they will be; activations with a scale for each call.
    """

    def __init__(
        self,
        model: nn.Module,
        quantizers: dict[str, TensorQuantizer],
        replay: Replay,
        config: CalibrationFields,
    ) -> None:
        self._model, self._replay, self._config = model, replay, config
        self._activations = list(quantizers.values())
        inner = [part for q in weight_quantizers(model) for part in q.modules()]
        self._weights = [q for q in inner if isinstance(q, TensorQuantizer) and q.is_enabled]
        times = union(set(replay.times))
        count = min(len(times), _JUDGED)
        self._times = [times[(2 * i + 1) * len(times) // (2 * count)] for i in range(count)]
        self._references: dict[int, Tensor] = {}

    @contextmanager
    def _rounding(self) -> Iterator[None]:
        clips = (1.0,) if self._config.statistic == "max" else _CLIPS

        def hook(quantizer: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
            shifted = bool(self._config.asymmetric)
            return _rounded_activation(output.float(), quantizer.num_bits, clips, shifted, None).to(output.dtype)

        handles = [quantizer.register_forward_hook(hook) for quantizer in self._activations]
        for quantizer in self._weights:
            quantizer.enable_quant()
        try:
            yield
        finally:
            for quantizer in self._weights:
                quantizer.disable_quant()
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def __call__(self) -> float:
        """Mean over the times of the error of the model as it is now, in dB."""
        calibrate_weights(self._model, self._config.weights, remember=False)
        found: dict[int, list[tuple[Sequence[float], Tensor]]] = defaultdict(list)
        with full_precision(self._model):
            for number, batch in enumerate(self._replay.batches(self._times)):
                if number not in self._references:
                    self._references[number] = first_output(self._model(**batch.call)).float()
                reference = self._references[number]
                with self._rounding():
                    difference = first_output(self._model(**batch.call)).float() - reference
                if batch.counts:
                    powers = [value.flatten(1).double().square().sum(1) for value in (difference, reference)]
                    found[batch.row].append((batch.order, torch.stack(powers, 1)))
        rows = [sums.sum(0).clamp(min=1e-30) for sums in all_samples(found).values()]
        return sum(10 * math.log10(float(row[0] / row[1])) for row in rows) / max(len(rows), 1)


def _chosen(
    model: nn.Module,
    groups: list[list[_Layer]],
    quantizers: dict[str, TensorQuantizer],
    replay: Replay,
    timestep: CurrentTimestep,
    config: CalibrationFields,
) -> list[Tensor | None]:
    """The vectors of ``auto``: those with the least error of the model's output.

    Among none, those that are best for each tensor by itself, and some strengths everywhere. What rounding does to
    a weight is the same for all samples and times, and adds up through the layers: the best for each layer may not be
    the best for all.

    Where samples are spread over several processes, or over other batches, scales of a call differ a little, and so may
    the choice; all processes make the same one.
    """
    follow = temporal_names(config.temporal, list(quantizers))
    own = _least_layer_error(model, groups, replay, config, follow)
    choices: list[list[Tensor | None]] = [[None] * len(groups), own]
    choices += [[_vector(group, strength) for group in groups] for strength in STRENGTHS[:_UNIFORM]]
    judge, errors = _Judge(model, quantizers, replay, config), []
    for choice in tqdm(choices, "smoothings", disable=not config.progress):
        _smooth(groups, choice, timestep)
        errors.append(judge())
    errors[0] -= _CLEAR
    return choices[errors.index(min(errors))]


def _smooth(groups: list[list[_Layer]], vectors: list[Tensor | None], timestep: CurrentTimestep) -> None:
    for group, vector in zip(groups, vectors, strict=True):
        for layer in group:
            layer.smooth(vector, timestep)


def smooth_channels(
    model: nn.Module,
    forward_loop: Callable[[nn.Module], Any],
    quantizers: dict[str, TensorQuantizer],
    timestep: CurrentTimestep,
    config: CalibrationFields,
) -> None:
    """Divide the input channels of linear layers and convolutions, and multiply their weights.

    Runs ``forward_loop`` once; the scales are calibrated by another run.

    Args:
        model: Quantized by ``mtq.quantize``.
        forward_loop: Calls the model on calibration data.
        quantizers: The enabled activation quantizers with one scale per tensor, by name.
        timestep: Of the model.
        config: Its ``channel_smoothing`` is the strength a, ``auto``, or ``none``.

    Raises:
        TdqError: The weights' scales are to be kept, or weights are spread over processes or elsewhere; or a quantizer
            has a ``pre_quant_scale`` of ModelOpt's.
    """
    if config.channel_smoothing == "none":
        return
    _require_plain(model, config)
    layers = _layers(model, quantizers)
    groups, replay = _run(model, forward_loop, timestep, config, layers)
    if not groups:
        return
    if replay is None:
        vectors: list[Tensor | None] = [_vector(group, float(config.channel_smoothing)) for group in groups]
    else:
        vectors = _chosen(model, groups, quantizers, replay, timestep, config)
    _smooth(groups, vectors, timestep)


def undo_channel_smoothing(model: nn.Module) -> None:
    """Give the layers of ``model`` back the weights that they had, but for rounding, and the inputs as they are.

    The scales of both no longer fit.
    """
    for name, module in model.named_modules():
        quantizer: Any = getattr(module, "input_quantizer", None)
        if not isinstance(quantizer, TemporalQuantizer):
            continue
        divisor = quantizer.channel_divisor
        if divisor is not None:
            layer = _Layer(name, module)
            layer.weight.data = layer.multiplied(1.0 / divisor.flatten())
            quantizer.set_channel_divisor(None)
