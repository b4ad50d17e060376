"""TemporalQuantizer: a ModelOpt ``TensorQuantizer`` whose scale depends on the diffusion time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor

from modelopt_tdq.errors import TdqError
from modelopt_tdq.fake_quant import code_range, fake_quantize
from modelopt_tdq.schedule import row_index
from modelopt_tdq.timestep import CurrentTimestep

__all__ = ["TemporalQuantizer"]

_TABLE_BUFFERS = ("_timesteps", "_scale", "_offset")


class TemporalQuantizer(TensorQuantizer):  # type: ignore[misc]
    """Per-tensor activation quantizer with one scale (and optional offset) per row of time.

    Made in place from a ``TensorQuantizer``, as ModelOpt does for its own ``StaticBlockScaleQuantizer``,
    so the quantizer keeps its name, its place in the module tree and ModelOpt's save and restore.

    Buffers, all float32 whatever ``.half()`` or ``.to(dtype)`` the model goes through:
        ``_timesteps`` [K], ``_scale`` [K], and ``_offset`` [K] where the quantizer is asymmetric.
    """

    _skip_properties_for_save_restore = TensorQuantizer._skip_properties_for_save_restore | {"_timestep"}

    _timestep: CurrentTimestep
    _timesteps: Tensor
    _scale: Tensor

    @classmethod
    def from_tensor_quantizer(cls, quantizer: TensorQuantizer, timestep: CurrentTimestep) -> TemporalQuantizer:
        """Turn ``quantizer`` into a temporal one in place; its table is still to be set."""
        quantizer.__class__ = cls
        promoted: TemporalQuantizer = quantizer
        promoted._is_temporal_quantizer = True
        promoted._timestep = timestep
        return promoted

    @property
    def has_table(self) -> bool:
        """Whether the quantizer is calibrated."""
        return "_scale" in self._buffers

    @property
    def offset(self) -> Tensor | None:
        """[K] float32, the value of code 0 per row; None where symmetric."""
        offset: Tensor | None = self._buffers.get("_offset")
        return offset

    def set_rows(self, timesteps: Tensor, scale: Tensor, offset: Tensor | None = None) -> None:
        """Set the quantizer's column of a table.

        Args:
            timesteps: [K] float32, strictly ascending.
            scale: [K] float32, positive.
            offset: [K] float32 or None.
        """
        device = self._scale.device if self.has_table else None
        for name in (*_TABLE_BUFFERS, "_amax"):
            self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)
        for name, value in zip(_TABLE_BUFFERS, (timesteps, scale, offset), strict=True):
            if value is not None:
                rows = value.detach().to(dtype=torch.float32, device=device or value.device).clone()
                self.register_buffer(name, rows)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TemporalQuantizer:
        exact = {name: self._buffers[name] for name in _TABLE_BUFFERS if name in self._buffers}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            device = self._buffers[name].device
            self._buffers[name] = value if value.device == device else value.to(device)
        return self

    def _rows(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and offset for each sample: [1] for one time, [B, 1, ...] for a time per sample."""
        if not self.has_table:
            raise TdqError(
                "quantizer",
                type(self).__name__,
                "it has no scales yet",
                'Calibrate the model: mtq.quantize with a forward_loop and algorithm {"method": "tdq"}',
            )
        time = self._timestep.value
        if time is None:
            raise TdqError(
                "timestep",
                None,
                "a quantizer ran before any call of the model told it the time",
                "Call the quantized model itself rather than one of its parts",
            )
        scale, offset = self._scale, self.offset
        if scale.numel() == 1:
            return scale, offset
        rows = row_index(time.to(scale.device), self._timesteps)
        scale = scale[rows]
        offset = None if offset is None else offset[rows]
        if time.numel() == 1:
            return scale, offset
        samples, batch = time.numel(), inputs.shape[0] if inputs.dim() else 0
        if batch % samples:
            raise TdqError(
                "timestep",
                tuple(time.shape),
                f"{samples} times cannot be matched with an activation of shape {tuple(inputs.shape)}",
                "Pass one time for the whole batch, or exclude this quantizer with a `quant_cfg` rule",
            )
        shape = (batch,) + (1,) * (inputs.dim() - 1)

        def spread(value: Tensor) -> Tensor:
            # [B] -> [B * n, 1, ...]: video models fold frames, some attentions fold heads, into the batch
            return value.repeat_interleave(batch // samples).reshape(shape)

        return spread(scale), None if offset is None else spread(offset)

    def _fake_quantize(self, inputs: Tensor) -> Tensor:
        scale, offset = self._rows(inputs)
        return fake_quantize(inputs, scale, offset, self._num_bits)

    @property
    def amax(self) -> Tensor | None:
        """[] float32: the largest magnitude that any row represents; for ModelOpt's reports only."""
        if not self.has_table:
            return None
        return (self._scale * code_range(self._num_bits)[1]).max()

    @amax.setter
    def amax(self, value: Tensor | float) -> None:
        value = torch.as_tensor(value)
        if value.numel() != 1:
            raise TdqError(
                "amax",
                tuple(value.shape),
                "a time-dependent quantizer has one scale per time, not one per channel",
                'Run the per-channel method first: algorithm = ["smoothquant", {"method": "tdq"}]',
            )
        scale = value.detach().to(torch.float32).reshape(1) / code_range(self._num_bits)[1]
        self.set_rows(torch.zeros(1, device=scale.device), scale)

    def _get_amax(self, inputs: Tensor) -> Tensor:
        amax = self.amax
        return super()._get_amax(inputs) if amax is None else amax

    def reset_amax(self) -> None:
        """Forget the table, as ModelOpt's quantizers forget their amax."""
        for name in _TABLE_BUFFERS:
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
        low, high = float(self._scale.min()), float(self._scale.max())
        kind = "static" if low == high and self.offset is None else f"{self._scale.numel()} rows"
        extra: dict[str, Any] = {"scale": f"[{low:.3e}, {high:.3e}]", "offset": self.offset is not None}
        return f"{self._num_bits} bit temporal {kind} " + " ".join(f"{k}={v}" for k, v in extra.items())
