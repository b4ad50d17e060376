"""Whether the scales of a model still fit its weights: loading, merging or scaling weights does not change the scales.

When weights are calibrated, a few numbers of each are kept with its quantizer: its root mean square, and the noise that
quantizing adds to it. A model that is cast, moved, saved and restored keeps them. A weight that was scaled, replaced or
merged with a LoRA has others. Training changes weights with their quantizers in the loop, so that they suit each other:
what training leaves behind is kept anew.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from modelopt.torch.quantization.nn import QuantModule, SequentialQuantizer, TensorQuantizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from modelopt_tdq.core.fake_quant import FP8_E4M3, SUPPORTED_BITS, NumBits, code_range, fake_quantize, symmetric_scale
from modelopt_tdq.errors import TdqError, TdqWarning
from modelopt_tdq.model.place import offloading_hook
from modelopt_tdq.model.quantized_weight import weight_parts
from modelopt_tdq.model.quantizer import TemporalQuantizer
from modelopt_tdq.model.stored_weight import sharded_layers

__all__ = [
    "WeightChange",
    "calibration_method",
    "changed_weights",
    "is_learned",
    "plain_weights",
    "remember_weight",
    "remember_weights",
    "require_own_weight",
    "require_own_weights",
    "require_smoothed_weights",
    "rounded_weights",
    "settle_weights",
    "warn_of_changed_weights",
    "watch_training",
    "weight_change",
]

#: Attribute of a weight quantizer: what was measured when its scale was calibrated; saved with ModelOpt's state.
_CALIBRATED = "_calibrated_weight"

#: A weight is of another size if its root mean square is this many times larger or smaller.
_RESIZED = 1.15

#: A scale no longer fits if the noise has grown by this fraction.
_NOISIER = 0.5

#: Where nothing was kept: a scale does not fit if the weight's own range would give this fraction of the noise.
_MISFIT = 0.25

#: A weight is rounded already if quantizing adds less than this fraction of the noise of even rounding, beside what its
#: own dtype does.
_ROUNDED = 1e-3

#: Noise of rounding to FP8 E4M3, relative to the energy of what is rounded.
_FP8_ROUNDING = 2.0**-11

#: What to do about weights from elsewhere where channels are smoothed.
_FOREIGN = (
    "Load, merge or scale weights (pipeline.fuse_lora()) in full precision and quantize then: the weights of this "
    "model are multiplied by what its activations are divided by, and those from elsewhere are not"
)

#: Names in a warning.
_SHOWN = 10


@dataclass(frozen=True)
class WeightChange:
    """A weight, and what has become of it since it was calibrated.

    Attributes:
        name: Of its quantizer, as in ``model.named_modules()``.
        size: Its root mean square, relative to that when the activations were calibrated; None if that is not known.
        own_size: The same, relative to that when its scale was calibrated.
        noise: What quantizing adds to it, relative to its energy.
        expected: The same when it was calibrated; where that is not known, with the range of the weight as it is.
        rounding: The same for values that lie evenly between the codes, all in range.
        is_smoothed: Whether its input channels were multiplied by what the activation is divided by.
    """

    name: str
    size: float | None
    own_size: float | None
    noise: float
    expected: float
    rounding: float
    is_smoothed: bool = False

    @property
    def is_foreign(self) -> bool:
        """Whether it was replaced or merged with another that knows nothing of the smoothing of its channels."""
        return self.is_smoothed and self.own_size is not None and self.is_another

    @property
    def is_resized(self) -> bool:
        """Whether the activations behind it must be of another size, too."""
        return self.size is not None and not 1 / _RESIZED < self.size < _RESIZED

    @property
    def misfits(self) -> bool:
        """Whether its scale costs much more than it did, or need."""
        if self.size is None:
            return self.noise * _MISFIT > self.expected
        # a weight of rounded values has no noise of its own, and some in half precision
        return self.noise > self.expected + _NOISIER * max(self.expected, self.rounding)

    @property
    def is_another(self) -> bool:
        """Whether the weight is not the one that was calibrated, but for the rounding of a cast."""
        if self.own_size is None:
            return True
        moved = abs(self.noise - self.expected) > 0.05 * max(self.expected, self.rounding)
        return moved or not math.isclose(self.own_size, 1.0, rel_tol=2e-3)

    def __str__(self) -> str:
        layer = self.name.removesuffix(".weight_quantizer")
        facts = [] if self.size is None or not self.is_resized else [f"{self.size:.2f} times as large"]
        if self.is_foreign:
            facts.append("no longer the weight whose channels were smoothed")
        if self.misfits:
            expected = "with a range of its own" if self.size is None else "when calibrated"
            facts.append(f"SQNR {_decibels(self.noise)} dB, {_decibels(self.expected)} dB {expected}")
        return f"{layer} ({', '.join(facts)})"


def _decibels(noise: float) -> str:
    return f"{-10 * math.log10(noise):.1f}" if noise > 1e-12 else "over 120"


def _is_smoothed(layer: nn.Module) -> bool:
    quantizer = getattr(layer, "input_quantizer", None)
    return isinstance(quantizer, TemporalQuantizer) and quantizer.channel_divisor is not None


def plain_weights(
    model: nn.Module, elsewhere: bool = False
) -> Iterator[tuple[str, nn.Module, Tensor, TensorQuantizer]]:
    """The weights that have a scale per tensor or per channel, each as (name of quantizer, layer, weight, quantizer).

    Weights whose values are elsewhere (on ``meta``, spread over processes as a DTensor, or compressed) are left out;
    with ``elsewhere``, compressed ones alone, and those that tensor parallelism spreads.
    """
    sharded = sharded_layers(model) if elsewhere else set()
    names = {id(module): name for name, module in model.named_modules()}
    for layer in model.modules():
        if not isinstance(layer, QuantModule):
            continue
        for weight, quantizer in layer.iter_weights_for_calibration():
            known = _is_here(weight) or layer in sharded or (elsewhere and offloading_hook(layer) is not None)
            if _is_plain(quantizer) and known and _is_per_channel(quantizer.amax, weight):
                yield names[id(quantizer)], layer, weight, quantizer


def _is_here(weight: Tensor) -> bool:
    return not weight.is_meta and not isinstance(weight, DTensor)


def _is_plain(quantizer: Any) -> bool:
    if not isinstance(quantizer, TensorQuantizer) or isinstance(quantizer, SequentialQuantizer):
        return False
    form = quantizer.num_bits in SUPPORTED_BITS and quantizer.block_sizes is None and not quantizer.unsigned
    usual = quantizer.fake_quant and not quantizer._dynamic and quantizer.backend is None
    if not form or not usual or not quantizer.is_enabled or quantizer.rotate_is_enabled:
        return False
    amax = quantizer.amax
    return amax is not None and not amax.is_meta and bool(amax.isfinite().all())


def _is_per_channel(amax: Tensor, weight: Tensor) -> bool:
    if amax.numel() == 1:
        return True
    sizes = zip(amax.shape, weight.shape, strict=False)
    return amax.dim() == weight.dim() and all(own in (1, size) for own, size in sizes)


def _energy_and_noise(weight: Tensor, amax: Tensor, quantizer: TensorQuantizer) -> tuple[float, float, float]:
    """Sum of squares, and the noise of quantizing with that range and of even rounding, relative to it."""
    num_bits: NumBits = quantizer.num_bits
    largest = code_range(num_bits)[1]
    scale = symmetric_scale(amax.detach().float().to(weight.device), num_bits)
    energies, noises = [], []
    for part, own in weight_parts(weight.detach(), scale):
        values = part.float()
        clipped = torch.maximum(values, -largest * own) if quantizer.narrow_range else values
        error = fake_quantize(clipped, own, None, num_bits).sub_(values)
        energies.append(values.square().sum())
        noises.append(error.square_().sum())
    energy, noise = torch.stack([torch.stack(sums).double().sum() for sums in (energies, noises)]).tolist()
    if energy == 0:
        return 0.0, 0.0, 0.0
    if num_bits == FP8_E4M3:
        return energy, noise / energy, _FP8_ROUNDING
    rounding = float(scale.double().square().mean()) * weight.numel() / 12 / energy
    return energy, noise / energy, rounding


def _own_range(weight: Tensor, amax: Tensor) -> Tensor:
    """The largest magnitudes of a weight, in the shape of its amax."""
    magnitude = weight.detach().float().abs()
    if amax.numel() == 1:
        return magnitude.max().reshape(amax.shape)
    return magnitude.amax([axis for axis, size in enumerate(amax.shape) if size == 1], keepdim=True)


@torch.no_grad()
def remember_weight(weight: Tensor, quantizer: TensorQuantizer, method: str = "keep", size: bool = True) -> None:
    """Keep what :func:`weight_change` compares with; nothing if the values are elsewhere.

    Args:
        weight: As it is now.
        quantizer: Its quantizer, calibrated for it.
        method: How: ``max`` or ``mse``; ``keep`` says nothing new.
        size: Whether the activations behind it were calibrated with it; else their size stays that of before.
    """
    if not _is_here(weight):
        return
    before: dict[str, Any] = vars(quantizer).get(_CALIBRATED) or {}
    energy, noise, _ = _energy_and_noise(weight, quantizer.amax, quantizer)
    own_size = math.sqrt(energy / weight.numel())
    kept = {
        "method": before.get("method", method) if method == "keep" else method,
        "size": own_size if size else before.get("size", own_size),
        "own_size": own_size,
        "noise": noise,
        "amax": float(quantizer.amax.double().mean()),
    }
    setattr(quantizer, _CALIBRATED, kept)


def remember_weights(model: nn.Module, method: str = "keep") -> None:
    """:func:`remember_weight` for all weights of ``model`` whose scales are calibrated."""
    for _, _, weight, quantizer in plain_weights(model):
        remember_weight(weight, quantizer, method)


def is_learned(quantizer: TensorQuantizer) -> bool:
    """Whether the scale of a weight is a parameter, trained together with the weight."""
    return bool(vars(quantizer).get("_learns_weight_scale", False))


def calibration_method(quantizer: TensorQuantizer) -> str | None:
    """How the scale of a weight was calibrated, ``max`` or ``mse``; None if that is not known."""
    method = (vars(quantizer).get(_CALIBRATED) or {}).get("method")
    return None if method == "keep" else method


@torch.no_grad()
def weight_change(name: str, layer: nn.Module, weight: Tensor, quantizer: TensorQuantizer) -> WeightChange:
    """What has become of one weight of :func:`plain_weights`, given as that gives it."""
    amax = quantizer.amax
    kept: dict[str, Any] | None = vars(quantizer).get(_CALIBRATED)
    energy, noise, rounding = _energy_and_noise(weight, amax, quantizer)
    # a scale that was learned since, loaded, or set by another algorithm, is not the one that was measured
    if kept is None or not math.isclose(float(amax.double().mean()), kept["amax"], rel_tol=0.01):
        if is_learned(quantizer):
            return WeightChange(name, None, None, noise, noise, rounding)  # training makes of it what it needs
        own = _energy_and_noise(weight, _own_range(weight, amax), quantizer)[1]
        return WeightChange(name, None, None, noise, max(own, rounding * 1e-3), rounding)
    now = math.sqrt(energy / weight.numel())
    size, own_size = (
        now / was if was > 0 else (math.inf if now > 0 else 1.0) for was in (kept["size"], kept["own_size"])
    )
    return WeightChange(name, size, own_size, noise, kept["noise"], rounding, _is_smoothed(layer))


def require_smoothed_weights(model: nn.Module) -> None:
    """Raise if a weight whose channels were smoothed was replaced or merged since, as by ``pipeline.fuse_lora()``."""
    settle_weights(model)
    for name, layer, weight, quantizer in plain_weights(model):
        if _is_smoothed(layer) and weight_change(name, layer, weight, quantizer).is_foreign:
            problem = "its weight changed after the channels in front of it were smoothed"
            raise TdqError("model", name, problem, _FOREIGN)


@contextmanager
def require_own_weights(model: nn.Module) -> Iterator[None]:
    """While the body runs ``model``, see that weight quantizers get what was calibrated: the weights of their layers.

    Raises:
        TdqError: One gets something else, such as a weight with the matrices of a LoRA added.
    """
    names = {id(module): name for name, module in model.named_modules()}
    handles: list[RemovableHandle] = []

    def watch(weight: Tensor, quantizer: nn.Module) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            require_own_weight(names[id(quantizer)], args[0], weight)
            handle.remove()  # one look is enough

        handle = quantizer.register_forward_pre_hook(hook)
        return handle

    for layer in model.modules():
        if isinstance(layer, QuantModule):
            pairs = layer.iter_weights_for_calibration()
            handles += [watch(weight, q) for weight, q in pairs if q.is_enabled and _is_here(weight)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def require_own_weight(name: str, used: Tensor, weight: Tensor) -> None:
    """Raise if a weight quantizer gets something else than the weight that its scale and its codes are made from."""
    if used is weight or used.data_ptr() == weight.data_ptr() or torch.equal(used.to(weight), weight):
        return
    raise TdqError(
        name,
        tuple(used.shape),
        "what is quantized is not the weight of the layer: something is added to it while the model runs, such as the "
        "matrices of a LoRA",
        "Fuse it into the weights first (pipeline.fuse_lora(), pipeline.unload_lora_weights()); or quantize the model "
        "first, and load adapters then",
    )


class _TrainingWatch:
    """Pre-hook of a root: notices that its quantized weights are trained, and when that is over."""

    def __init__(self) -> None:
        self.trained = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if module.training and torch.is_grad_enabled():
            self.trained = self.trained or _trains_weights(module)
        elif self.trained and not torch.compiler.is_compiling():
            settle_weights(module)


def _trains_weights(model: nn.Module) -> bool:
    layers = (module for module in model.modules() if isinstance(module, QuantModule))
    pairs = (pair for layer in layers for pair in layer.iter_weights_for_calibration())
    return any(weight.requires_grad and quantizer.is_enabled for weight, quantizer in pairs)


def _find_watch(model: nn.Module) -> _TrainingWatch | None:
    return next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, _TrainingWatch)), None)


def watch_training(model: nn.Module) -> None:
    """From now on, let training keep its weights' numbers up to date; harmless when done before."""
    if _find_watch(model) is None:
        model.register_forward_pre_hook(_TrainingWatch())


def settle_weights(model: nn.Module) -> None:
    """If ``model`` was trained since it last ran, keep the numbers of its weights as training left them."""
    watch = _find_watch(model)
    if watch is not None and watch.trained:
        watch.trained = False
        remember_weights(model)


def changed_weights(model: nn.Module) -> list[WeightChange]:
    """The weights that the scales of ``model`` do not fit any more, in module order."""
    settle_weights(model)
    changes = (weight_change(*entry) for entry in plain_weights(model))
    return [change for change in changes if change.is_resized or change.misfits or change.is_foreign]


def rounded_weights(model: nn.Module) -> list[str]:
    """Names of the weights' quantizers that have nothing left to round, in module order.

    So it is after ``rounding`` and reconstruction: the weights are the values of their codes, in their own dtype.
    """
    return [name for name, _, weight, quantizer in plain_weights(model) if _is_rounded(weight, quantizer)]


def _is_rounded(weight: Tensor, quantizer: TensorQuantizer) -> bool:
    amax = quantizer.amax
    per_channel = amax.dim() == weight.dim() > 0 and amax.shape[0] == len(weight)
    # the first channel alone mostly tells that there is something to round
    for values, own in ((weight[:1], amax[:1] if per_channel else amax), (weight, amax)):
        energy, noise, rounding = _energy_and_noise(values, own, quantizer)
        if energy > 0 and not noise < _ROUNDED * rounding + (torch.finfo(weight.dtype).eps / 4) ** 2:
            return False
    return energy > 0 and rounding > 0


def warn_of_changed_weights(model: nn.Module, stacklevel: int = 3) -> None:
    """Warn if there are :func:`changed_weights`: which, how much, and what to do."""
    changes = changed_weights(model)
    if not changes:
        return
    shown = ", ".join(map(str, changes[:_SHOWN])) + (", ..." if len(changes) > _SHOWN else "")
    cures = []
    if any(change.is_foreign for change in changes):
        cures.append(f"{_FOREIGN[0].lower()}{_FOREIGN[1:]}")
    elif any(change.misfits for change in changes):
        cures.append("modelopt_tdq.recalibrate_weights(model) fits the scales of the weights")
    if any(change.is_resized for change in changes):
        cures.append(
            "the activations behind weights of another size are of another size too: calibrate the model again, with "
            "mtq.quantize(model, config, forward_loop)"
        )
    text = f"the scales of {len(changes)} layers do not fit their weights, which changed after calibration: {shown}. "
    warnings.warn(text + "; ".join(cures), TdqWarning, stacklevel=stacklevel)
