"""OutputCorrection: what stands where ModelOpt has a quantizer of a layer's output, and corrects that output."""

from __future__ import annotations

from typing import Any

import torch
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
from torch import Tensor, nn

from modelopt_tdq.core.layer_correction import LayerCorrection
from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.intact import averaged
from modelopt_tdq.model.kept_rows import CHECKSUM, KeptRows, mark_readers
from modelopt_tdq.model.place import execution_device, require_tensors_on_hand, require_unattended
from modelopt_tdq.model.select import LAYERS, trailing_dimensions
from modelopt_tdq.model.timestep import CurrentTimestep, find_timestep
from modelopt_tdq.model.wrapped import unwrapped

__all__ = [
    "OutputCorrection",
    "correctable_layers",
    "forget_layer_correction",
    "layer_correction",
    "output_channels",
    "output_corrections",
    "set_layer_correction",
]

_BUFFERS = ("_correction_times_bits", "_gain_bits", "_bias_bits")

#: Of a correction, which the quantizer that it was made from has not.
_ATTRIBUTES = ("_timestep", "_intact", "_times_key", "_quantizer_name", "_reader", "_trailing")


class OutputCorrection(KeptRows):
    """y * gain + bias in float32, in the dtype of y; made in place from a disabled ``output_quantizer``.

    So it has a place in ModelOpt's module tree, is saved, restored, disabled and enabled like a quantizer, and passes y
    on where quantizers do (:func:`modelopt_tdq.model.full_precision.full_precision`). It quantizes nothing.

    Buffers: ``_correction_times_bits`` [K], ``_gain_bits`` and ``_bias_bits`` [K, C], or [1, C] where they do not
    depend on time.
    """

    _row_buffers = _BUFFERS

    #: Dimensions of y behind that of the channels.
    _trailing: int = 0

    @classmethod
    def from_tensor_quantizer(
        cls, quantizer: TensorQuantizer, timestep: CurrentTimestep, name: str
    ) -> OutputCorrection:
        """Turn ``quantizer``, which has this name, into a correction in place; its rows are still to be set."""
        promoted = cls._promoted(quantizer, timestep, name)
        promoted._is_output_correction = True
        promoted.enable()
        return promoted

    def forget(self) -> None:
        """Become the disabled quantizer again that it was made from."""
        for name in (*_BUFFERS, CHECKSUM):
            self._buffers.pop(name, None)
        for name in (*_ATTRIBUTES, "_is_output_correction"):
            self.__dict__.pop(name, None)
        self.__class__ = TensorQuantizer
        self.disable()

    def set_rows(self, timesteps: Tensor, gain: Tensor, bias: Tensor, trailing: int) -> None:
        """Set gain and bias [K, C] or [1, C] at ``timesteps`` [K]; channels are ``trailing`` dimensions from the last.

        All float32, on the device on which the layer computes.
        """
        for name, value in zip(_BUFFERS, (timesteps, gain, bias), strict=True):
            self._keep(name, value)
        self._sign()
        self._trailing = trailing

    @property
    def timesteps(self) -> Tensor:
        """[K] float32."""
        return self._read("_correction_times_bits")

    @property
    def gain(self) -> Tensor:
        """[K, C] or [1, C] float32."""
        return self._read("_gain_bits")

    @property
    def bias(self) -> Tensor:
        """Of the same shape."""
        return self._read("_bias_bits")

    @property
    def trailing(self) -> int:
        """Dimensions of y behind that of the channels."""
        return self._trailing

    def require_usable(self) -> None:
        """Raise a TdqError if somebody has computed with the bits of the rows."""
        if not self.is_intact and not self._awaits_state:
            raise averaged("layer", self._quantizer_name.rpartition(".")[0], "its correction")

    def forward(self, inputs: Tensor) -> Tensor:
        """The layer's output, corrected at the time of the call."""
        if self._disabled or not self._if_quant:
            return inputs
        if not torch.compiler.is_compiling():
            self.require_usable()
        times, key = self._correction_times_bits, self._times_key
        gain, bias = (
            self._channels_at_call(rows, times, key, inputs, self._trailing) for rows in (self.gain, self.bias)
        )
        corrected: Tensor = (inputs.float() * gain + bias).to(inputs.dtype)
        return corrected

    def extra_repr(self) -> str:
        """What ModelOpt's summaries show."""
        if self._disabled or "_gain_bits" not in self._buffers:
            return str(super().extra_repr())
        rows, channels = self.gain.shape
        low, high = float(self.gain.min()), float(self.gain.max())
        kind = "static" if rows == 1 else f"{rows} rows"
        return f"correction {kind}, {channels} channels, gain=[{low:.4f}, {high:.4f}]"


def output_corrections(model: nn.Module) -> dict[str, OutputCorrection]:
    """The enabled corrections of ``model``, by name of the layer, in module order."""
    modules = unwrapped(model).named_modules()
    return {n.rpartition(".")[0]: m for n, m in modules if isinstance(m, OutputCorrection) and m.is_enabled}


def correctable_layers(model: nn.Module, *, quantized: bool = True) -> dict[str, nn.Module]:
    """The linear layers and convolutions whose output nothing quantizes, by name, in module order.

    Args:
        model: That ModelOpt has converted.
        quantized: Only those with quantized inputs or weights.
    """
    found: dict[str, nn.Module] = {}
    for name, layer in model.named_modules():
        output = layer._modules.get("output_quantizer")
        if not isinstance(layer, QuantModule) or not isinstance(layer, LAYERS) or output is None:
            continue
        if not isinstance(output, OutputCorrection) and (type(output) is not TensorQuantizer or output.is_enabled):
            continue
        others = (layer._modules.get(key) for key in ("input_quantizer", "weight_quantizer"))
        if not quantized or any(getattr(quantizer, "is_enabled", False) for quantizer in others):
            found[name] = layer
    return found


def layer_correction(model: nn.Module) -> LayerCorrection | None:
    """The corrections of the layers of ``model``, copied to the CPU; None if it has none.

    Raises:
        TdqError: Their state is not loaded, or on disk, or somebody has computed with it.
    """
    model = unwrapped(model)
    corrections = output_corrections(model)
    if not corrections:
        return None
    require_tensors_on_hand(model, "show its corrections", scales_only=True)
    empty = [name for name, c in corrections.items() if c.gain.is_meta or bool(c.gain.isnan().any())]
    if empty:
        raise TdqError(
            "model",
            empty[:3],
            "these corrections were restored, but their rows were not loaded",
            "Load the state dict that was saved with the ModelOpt state",
        )
    for correction in corrections.values():
        correction.require_usable()
    timesteps = max((c.timesteps for c in corrections.values()), key=len).cpu()
    return LayerCorrection(
        timesteps,
        {name: c.gain for name, c in corrections.items()},
        {name: c.bias for name, c in corrections.items()},
    )


def forget_layer_correction(model: nn.Module) -> None:
    """Take all corrections off ``model``: its layers give again what quantization makes of them."""
    for module in list(model.modules()):
        if isinstance(module, OutputCorrection):
            module.forget()


def set_layer_correction(model: nn.Module, correction: LayerCorrection | None) -> None:
    """Let the layers of ``model`` be corrected so, and no others.

    Args:
        model: The module that ``mtq.quantize`` was called with.
        correction: For layers of it; None: no corrections.

    Raises:
        TdqError: There is no such layer, its output is quantized, it has another number of output channels, the model
            is not told the time, or hooks around its layers would not know the corrections. Nothing is changed then.
    """
    model = unwrapped(model)
    require_unattended(model, "have its layers corrected")
    if correction is None:
        forget_layer_correction(model)
        return
    timestep = find_timestep(model)
    layers = correctable_layers(model, quantized=False)
    unknown = [name for name in correction.names if name not in layers]
    if unknown or timestep is None:
        raise TdqError(
            "names",
            unknown[:3] or type(model).__name__,
            "no linear layers or convolutions of this model, or their outputs are quantized"
            if unknown
            else "the model is not told the time",
            "Use the correction that was fitted to this model and quant_cfg, and the module that was quantized",
        )
    for name in correction.names:
        width = output_channels(layers[name])
        if correction.gain[name].shape[1] != width:
            raise TdqError(
                "gain",
                tuple(correction.gain[name].shape),
                f"{name} has {width} output channels",
                "Use the correction that was fitted to this model",
            )
    forget_layer_correction(model)
    for name in correction.names:
        layer: Any = layers[name]
        device = execution_device(layer)
        made = OutputCorrection.from_tensor_quantizer(layer.output_quantizer, timestep, f"{name}.output_quantizer")
        rows = (correction.timesteps, correction.gain[name], correction.bias[name])
        times, gain, bias = (value.to(device) for value in rows)
        made.set_rows(times if len(gain) > 1 else times[:1], gain, bias, trailing_dimensions(layer))
    mark_readers(model)


def output_channels(layer: nn.Module) -> int:
    """Of a linear layer or convolution."""
    found = getattr(layer, "out_features", None)
    return int(getattr(layer, "out_channels", 0) if found is None else found)
