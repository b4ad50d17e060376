"""TemporalQuantizer: a ModelOpt ``TensorQuantizer`` whose scale depends on the diffusion time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor
from torch.distributed.tensor import DTensor

from modelopt_tdq.core.fake_quant import NumBits, code_range, fake_quantize
from modelopt_tdq.core.scales import Scales
from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.intact import averaged
from modelopt_tdq.model.kept_rows import CHECKSUM, KeptRows
from modelopt_tdq.model.rows import TimesKey, call_rows, current_rows
from modelopt_tdq.model.saving import SAVING, no_checkpoint
from modelopt_tdq.model.timestep import CurrentTimestep, matched

__all__ = ["TemporalQuantizer"]

_TABLE_BUFFERS = ("_timesteps_bits", "_scale_bits", "_offset_bits", "_dequant_scale_bits", "_dequant_offset_bits")

#: What the channels of the activation are divided by, and what is subtracted from the quotients, at which times: the
#: table is that of the differences.
_DIVISOR, _SHIFT, _SHIFT_TIMES = "_channel_divisor_bits", "_channel_shift_bits", "_shift_times_bits"


class TemporalQuantizer(KeptRows):
    """Per-tensor activation quantizer with one scale (and optional offset) per row of time.

    Made in place from a ``TensorQuantizer``, as ModelOpt does for its own ``StaticBlockScaleQuantizer``,
    so the quantizer keeps its name, its place in the module tree and ModelOpt's save and restore.

    Buffers: ``_timesteps_bits`` [K], ``_scale_bits`` [K], ``_offset_bits`` [K] where the quantizer is asymmetric,
    ``_dequant_scale_bits`` [K] and ``_dequant_offset_bits`` [K] where codes are turned back by others: the bits of
    float32 numbers, kept as int32. ``.half()``, ``.to(dtype)``, diffusers' ``from_pretrained(torch_dtype=...)``
    and the like convert floating point buffers and leave integers alone, so the scales stay exact.
    ``_timesteps``, ``_scale`` and ``scales`` read them as float32. ``_rows_checksum`` [1] tells when somebody has
    computed with the integers.

    Where the channels of the activation are smoothed (:mod:`modelopt_tdq.calibration.channel_smoothing`), they are
    divided by ``channel_divisor``, kept likewise as ``_channel_divisor_bits`` [C] or [C, 1, ...], whether the quantizer
    is enabled or not: the weights behind it are multiplied. ``channel_shift``, kept as ``_channel_shift_bits``
    [K', C, 1, ...] with ``_shift_times_bits`` [K'], is subtracted from the quotients before they are quantized, and
    added again. All scales are those of the differences.
    """

    _row_buffers = (*_TABLE_BUFFERS, _DIVISOR, _SHIFT, _SHIFT_TIMES)
    _skip_properties_for_save_restore = KeptRows._skip_properties_for_save_restore | {"_shift_key"}

    #: Why a kind of quantizer has no table; None: it has, once it is calibrated.
    no_table: ClassVar[str | None] = None

    @classmethod
    def from_tensor_quantizer(
        cls, quantizer: TensorQuantizer, timestep: CurrentTimestep, name: str
    ) -> TemporalQuantizer:
        """Turn ``quantizer``, which has this name, into a temporal one in place; its table is still to be set."""
        promoted = cls._promoted(quantizer, timestep, name)
        promoted._is_temporal_quantizer = True
        return promoted

    @property
    def has_table(self) -> bool:
        """Whether the quantizer is calibrated."""
        return all(name in self._buffers for name in ("_timesteps_bits", "_scale_bits"))

    @property
    def _timesteps(self) -> Tensor:
        """[K] float32, ascending, in the model's own time units."""
        return self._read("_timesteps_bits")

    @property
    def _scale(self) -> Tensor:
        """[K] float32."""
        return self._read("_scale_bits")

    def _optional(self, name: str) -> Tensor | None:
        return self._read(name) if name in self._buffers else None

    @property
    def offset(self) -> Tensor | None:
        """[K] float32, what is subtracted before dividing, per row; None where symmetric."""
        return self._optional("_offset_bits")

    @property
    def dequant_scale(self) -> Tensor | None:
        """[K] float32, the scale that turns codes back, per row; None where scale and offset do."""
        return self._optional("_dequant_scale_bits")

    @property
    def dequant_offset(self) -> Tensor | None:
        """[K] float32, the value of code 0, per row; None where it is 0, or there is no ``dequant_scale``."""
        return self._optional("_dequant_offset_bits")

    @property
    def scales(self) -> Scales:
        """The quantizer's column of the table, [K] each."""
        return Scales(self._scale, self.offset, self.dequant_scale, self.dequant_offset)

    @property
    def channel_divisor(self) -> Tensor | None:
        """float32, of a shape that broadcasts against the activation: what its channels are divided by; None: nothing.

        None as well inside of ModelOpt's ``disable_pre_quant_scale``, which is for inputs that are divided already.
        """
        return self._optional(_DIVISOR) if self._enable_pre_quant_scale else None

    @property
    def channel_shift(self) -> Tensor | None:
        """[K', C, 1, ...] float32: an offset of each channel, once it is divided; K' is 1 where it stays the same.

        None: 0.
        """
        return self._optional(_SHIFT)

    @property
    def shift_times(self) -> Tensor:
        """[K'] float32, the times of the rows of ``channel_shift``."""
        return self._read(_SHIFT_TIMES)

    def set_channels(
        self, divisor: Tensor | None, shift: Tensor | None = None, shift_times: Tensor | None = None
    ) -> None:
        """Divide the channels of the activation by ``divisor`` from now on, and shift the quotients by ``shift``.

        The scales, if there are any, stay what they are: they have to be calibrated anew.

        Args:
            divisor: Positive; [C] where channels are the last dimension, [C, 1, ...] where the inputs of a convolution
                have them; None: 1.
            shift: [K', C] or [K', C, 1, ...] likewise, of any sign; None: 0. Not for the input of a layer that pads it
                with zeros, which would have no code.
            shift_times: [K'] float32, ascending; may be left out where K' is 1.
        """
        if shift is not None and (shift_times is None or len(shift) == 1):
            shift_times = torch.zeros(1, device=shift.device)
        for name, value in ((_DIVISOR, divisor), (_SHIFT, shift), (_SHIFT_TIMES, shift_times)):
            self._buffers.pop(name, None)
            if value is not None:
                self._keep(name, value)
        if CHECKSUM in self._buffers:
            self._sign()

    def shift_at_call(self, x: Tensor) -> Tensor | None:
        """``channel_shift`` at the time of the call, to broadcast against the activation ``x``; None: 0."""
        shift = self.channel_shift
        if shift is None:
            return None
        key = self.__dict__.setdefault("_shift_key", TimesKey())
        return self._channels_at_call(shift.flatten(1), self._on_hand(_SHIFT_TIMES), key, x, shift.dim() - 2)

    def smoothed(self, inputs: Tensor) -> Tensor:
        """``inputs`` with their channels divided, in their dtype."""
        divisor = self.channel_divisor
        if divisor is None:
            return inputs
        return (inputs.to(torch.float32) / divisor.to(inputs.device)).to(inputs.dtype)

    def shifted(self, smoothed: Tensor) -> Tensor:
        """What :meth:`smoothed` gives, less the ``channel_shift``, in its dtype: what the scales are for."""
        shift = self.shift_at_call(smoothed)
        return smoothed if shift is None else (smoothed.to(torch.float32) - shift).to(smoothed.dtype)

    def shifted_back(self, values: Tensor) -> Tensor:
        """What :meth:`shifted` was made from."""
        shift = self.shift_at_call(values)
        return values if shift is None else (values.to(torch.float32) + shift).to(values.dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """As of ModelOpt's quantizer; with a ``channel_divisor``, what is quantized, collected or passed on is divided.

        What is collected is also less the ``channel_shift``. Where it is quantized, it is divided by the product of
        divisor and scale: see :meth:`modelopt_tdq.core.scales.Scales.over_channels`.
        """
        passes = self._disabled or not self._if_quant
        # of a DTensor, ModelOpt comes back with the part of this process
        if not passes or isinstance(inputs, DTensor):
            return cast("Tensor", super().forward(inputs))
        if _DIVISOR in self._buffers:
            inputs = self.smoothed(inputs)
        if _SHIFT not in self._buffers or self._disabled or not self._if_calib:
            return cast("Tensor", super().forward(inputs))
        super().forward(self.shifted(inputs))
        return inputs

    def set_rows(
        self,
        timesteps: Tensor,
        scale: Tensor,
        offset: Tensor | None = None,
        dequant_scale: Tensor | None = None,
        dequant_offset: Tensor | None = None,
    ) -> None:
        """Set the quantizer's column of a table.

        Args:
            timesteps: [K] float32, strictly ascending.
            scale: [K] float32, positive.
            offset: [K] float32 or None.
            dequant_scale: [K] float32, positive, or None where scale and offset turn codes back too.
            dequant_offset: [K] float32 or None (0), of use only with ``dequant_scale``.

        The rows stay on the device of those that they replace, if any, and never on ``meta``.
        """
        device = self._scale.device if self.has_table and not self._scale.is_meta else None
        for name in (*_TABLE_BUFFERS, CHECKSUM, "_amax"):
            self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)
        column = (timesteps, scale, offset, dequant_scale, None if dequant_scale is None else dequant_offset)
        for name, value in zip(_TABLE_BUFFERS, column, strict=True):
            if value is not None:
                self._keep(name, value.to(device or value.device))
        self._sign()
        self._made_for_bits = self._num_bits

    @property
    def made_for_bits(self) -> NumBits:
        """The number format that the scales were made for."""
        bits: NumBits = vars(self).get("_made_for_bits", self._num_bits)
        return bits

    def require_usable(self, name: str | None = None) -> None:
        """Raise if the scales are not those of this quantizer.

        Args:
            name: Of the quantizer, where the caller knows better.

        Raises:
            TdqError: Somebody has computed with the bits of the scales, or the number format was changed after
                calibration.
        """
        name = name or self._quantizer_name
        if self.made_for_bits != self._num_bits:
            raise TdqError(
                "num_bits",
                self._num_bits,
                f"the scales of {name} were made for {self.made_for_bits}",
                "Calibrate again: mtq.quantize(model, config with this format, forward_loop)",
            )
        if not self.is_intact and not self._awaits_state:
            raise averaged("quantizer", name, "its scales")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TemporalQuantizer:
        """As ``nn.Module._apply``, but not into types in which ModelOpt's scales beside this quantizer would be lost.

        Raises:
            TdqError: ``fn`` converts to a type of 8 bits, as diffusers' layerwise casting does.
        """
        dtype = fn(torch.empty(0)).dtype
        if dtype.itemsize < 2:
            raise TdqError(
                "dtype",
                dtype,
                "the scales of the quantized weights would be rounded to it along with the weights",
                "Load the model again without layerwise casting; enable_group_offload and accelerate's cpu_offload "
                "save memory and change no number",
            )
        return super()._apply(fn, recurse)  # type: ignore[no-any-return]

    def _rows(self, inputs: Tensor) -> Scales:
        """The scales of each sample: [1] for one time, [B, 1, ...] for a time per sample, [B, N, 1] for one per token.

        With a ``channel_divisor`` or a ``channel_shift``, scale and offset are those of each channel of ``inputs`` as
        they come.
        """
        if not self.has_table:
            raise TdqError(
                "quantizer",
                type(self).__name__,
                "it has no scales yet",
                'Calibrate the model: mtq.quantize with a forward_loop and algorithm {"method": "tdq"}',
            )
        if not torch.compiler.is_compiling():
            self.require_usable()
        device = inputs.device
        scales = self._at_call(device)
        if scales.scale.dim() > 1 or scales.scale.numel() > 1:
            scales = scales.map(
                lambda value: matched(value, inputs, self._timestep, self._reader, self._quantizer_name)
            )
        divisor, shift = self.channel_divisor, self.shift_at_call(inputs)
        if divisor is None and shift is None:
            return scales
        return scales.over_channels(None if divisor is None else divisor.to(device), shift)

    def _at_call(self, device: torch.device) -> Scales:
        """The scales at each time of the call, [1], [B] or [B, N], on ``device``."""
        # ModelOpt places quantizers on the first device of a model that is spread over several
        if self._buffers["_scale_bits"].numel() == 1:
            return self.scales.map(lambda value: value.to(device))
        bits = self._on_hand("_timesteps_bits")
        found = call_rows(self._timestep, bits, self._times_key, device)
        if found is None:
            rows = current_rows(self._timestep, bits, self._times_key, device)
        else:
            names = [name for name in _TABLE_BUFFERS[1:] if name in self._buffers]
            values = found.values(self._times_key, tuple(self._buffers[name] for name in names))
            if values is not None:
                of = dict(zip(names, values, strict=True))
                return Scales(of["_scale_bits"], *[of.get(name) for name in _TABLE_BUFFERS[2:]])
            rows = found.rows
        return self.scales.map(lambda value: value.to(device)[rows])

    def _fake_quantize(self, inputs: Tensor) -> Tensor:
        scale, offset, dequant_scale, dequant_offset = self._rows(inputs)
        return fake_quantize(inputs, scale, offset, self._num_bits, dequant_scale, dequant_offset)

    @property
    def amax(self) -> Tensor | None:
        """[] float32: the largest magnitude that any row has a code for; for ModelOpt's reports only."""
        if not self.has_table:
            return None
        return (self._scale * code_range(self._num_bits)[1]).max()

    @amax.setter
    def amax(self, value: Tensor | float) -> None:
        self._require_settable()
        value = torch.as_tensor(value)
        if value.numel() != 1:
            raise TdqError(
                "amax",
                tuple(value.shape),
                "a time-dependent quantizer has one scale per time, not one per channel",
                'Run the per-channel method first: algorithm = ["smoothquant", {"method": "tdq"}]',
            )
        if self.has_table and self._scale.numel() > 1:
            # export_hf_checkpoint would do so to the layers of an attention, in the model itself
            raise TdqError(
                "amax",
                float(value),
                f"it would replace the quantizer's {self._scale.numel()} scales over time by one",
                f"Set scales with modelopt_tdq.set_scale_table, or forget them first with reset_amax(). {SAVING}",
            )
        scale = value.detach().to(torch.float32).reshape(1) / code_range(self._num_bits)[1]
        scale = torch.where(scale == 0, 1.0, scale)  # nothing but zeros was seen
        self.set_rows(torch.zeros_like(scale), scale)

    def _require_settable(self) -> None:
        """Raise if a scale that is set would be undone."""

    def export_amax(self) -> Tensor:
        """Refused: what ModelOpt asks every quantizer for when it writes a checkpoint of its own.

        Raises:
            TdqError: Always.
        """
        raise no_checkpoint()

    def _get_amax(self, inputs: Tensor) -> Tensor:
        amax = self.amax
        return super()._get_amax(inputs) if amax is None else amax

    def load_calib_amax(self, *args: Any, **kwargs: Any) -> None:
        """A calibration by ModelOpt's own algorithms replaces the table by one scale."""
        table = {n: self._buffers.pop(n) for n in (*_TABLE_BUFFERS, CHECKSUM) if n in self._buffers}
        try:
            super().load_calib_amax(*args, **kwargs)
        except BaseException:
            self._buffers.update(table)
            raise

    def reset_amax(self) -> None:
        """Forget the table, as ModelOpt's quantizers forget their amax."""
        for name in (*_TABLE_BUFFERS, CHECKSUM):
            self._buffers.pop(name, None)
        super().reset_amax()

    def _check_onnx_readiness(self, inputs: Tensor) -> None:
        raise TdqError(
            "exporter",
            "torch.onnx.export",
            "it cannot express a scale that depends on time",
            "Use modelopt_tdq.export_onnx(model, path, sample_inputs)",
        )

    def extra_repr(self) -> str:
        """ModelOpt's summary, with the rows in place of the amax."""
        if self._disabled or not self.has_table:
            return str(super().extra_repr())
        static = all(value is None or bool((value == value[0]).all()) for value in self.scales)
        kind = "static" if static else f"{self._scale.numel()} rows"
        low, high = float(self._scale.min()), float(self._scale.max())
        extra: dict[str, Any] = {"scale": f"[{low:.3e}, {high:.3e}]", "offset": self.offset is not None}
        if self.dequant_scale is not None:
            low, high = float(self.dequant_scale.min()), float(self.dequant_scale.max())
            extra |= {"dequant_scale": f"[{low:.3e}, {high:.3e}]", "dequant_offset": self.dequant_offset is not None}
        return f"{self._num_bits} bit temporal {kind} " + " ".join(f"{k}={v}" for k, v in extra.items())
