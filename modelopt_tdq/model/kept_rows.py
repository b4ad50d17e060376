"""What quantizers with rows over time have in common: the time of the call, and float32 rows that stay exact.

``.half()``, ``.to(dtype)``, diffusers' ``from_pretrained(torch_dtype=...)`` and the like convert floating point buffers
and leave integers alone. So rows are buffers of int32, which hold the bits of float32 numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn

from modelopt_tdq.model.intact import Intact, checksum
from modelopt_tdq.model.place import release
from modelopt_tdq.model.rows import TimesKey, current_rows
from modelopt_tdq.model.timestep import CurrentTimestep, per_sample
from modelopt_tdq.model.token_times import Reader, find_layout, one_of_tokens, readers, spread

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CHECKSUM", "KeptRows", "mark_readers"]

#: Buffer: of the others, so that arithmetic on them is noticed.
CHECKSUM = "_rows_checksum"

#: A float32 NaN as an integer: what a restored quantizer computes with until its rows are loaded.
_NAN_BITS = 0x7FC00000


class KeptRows(TensorQuantizer):  # type: ignore[misc]
    """A quantizer of ModelOpt's that keeps rows; a subclass names the buffers. ``_rows_checksum`` [1] is of all."""

    _skip_properties_for_save_restore = TensorQuantizer._skip_properties_for_save_restore | {
        "_timestep",
        "_intact",
        "_times_key",
        "_reader",
    }

    #: Names of the buffers.
    _row_buffers: ClassVar[tuple[str, ...]]

    _timestep: CurrentTimestep
    _intact: Intact
    _times_key: TimesKey

    #: Name in the model, for errors; as it was when the quantizer was made.
    _quantizer_name: str = ""

    #: The layer that it belongs to, see :func:`mark_readers`.
    _reader: Reader | None = None

    @classmethod
    def _promoted(cls, quantizer: TensorQuantizer, timestep: CurrentTimestep, name: str) -> Self:
        """Turn ``quantizer``, which has this name, into this kind in place."""
        quantizer.__class__ = cls
        promoted: Self = quantizer
        promoted._timestep = timestep
        promoted._intact = Intact()
        promoted._times_key = TimesKey()
        promoted._quantizer_name = name
        return promoted

    def _keep(self, name: str, value: Tensor) -> None:
        """Set a buffer of rows; :meth:`_sign` comes behind."""
        bits = value.detach().to(torch.float32).clone().contiguous().view(torch.int32)
        self._buffers.pop(name, None)
        self.register_buffer(name, bits)

    def _sign(self) -> None:
        """The buffers are as they are meant to be."""
        self._buffers.pop(CHECKSUM, None)
        self.register_buffer(CHECKSUM, checksum(self._kept()))

    def _on_hand(self, name: str) -> Tensor:
        """A buffer, wherever it is kept."""
        bits: Tensor = getattr(self, name)
        if bits.is_meta:
            release(self)
            bits = getattr(self, name)
        return bits

    def _read(self, name: str) -> Tensor:
        """float32: what a buffer holds, wherever it is kept."""
        return self._on_hand(name).view(torch.float32)

    def _kept(self) -> list[Tensor]:
        """The buffers that there are, in their order."""
        buffers = (self._buffers.get(name) for name in self._row_buffers)
        return [buffer for buffer in buffers if buffer is not None]

    @property
    def is_intact(self) -> bool:
        """Whether the rows are what was set or loaded: nobody has computed with their bits."""
        expected = self._buffers.get(CHECKSUM)
        return expected is None or self._intact(self._kept(), expected)

    @property
    def _awaits_state(self) -> bool:
        """Whether the quantizer was restored, and its rows were not loaded yet."""
        return any(bool((bits == _NAN_BITS).any()) for bits in self._kept())

    def _channels_at_call(self, rows: Tensor, times: Tensor, key: TimesKey, x: Tensor, trailing: int) -> Tensor:
        """Rows of channels at the time of the call, to broadcast against ``x``.

        Args:
            rows: [K, C] float32, or [1, C] where they do not depend on time.
            times: [K] int32, the bits of the rows' times.
            key: For these.
            x: The activation.
            trailing: Its dimensions behind that of the channels.

        Returns:
            [C, 1, ...], or [B * n, 1, ..., C, 1, ...] for a time per sample, [B, N, C] for one per token.
        """
        rows, behind = rows.to(x.device), (1,) * trailing
        if len(rows) > 1:
            found = current_rows(self._timestep, times, key, x.device)
            if found.dim() > 1:
                layout = find_layout(found.shape, x.shape, self._reader, self._timestep.per_frame)
                if layout is not None:
                    return spread(rows[found], layout, x.dim(), x.dim() - 1 - trailing)
                found = one_of_tokens(found, rows[found], x.shape, self._reader, self._quantizer_name)
            rows = rows[per_sample(found, x).flatten()]
        if len(rows) == 1:
            return rows.reshape(-1, *behind)
        between = (1,) * (x.dim() - 2 - trailing)
        return rows.reshape(len(rows), *between, -1, *behind)

    def _reset_pytorch_state_from_metadata(self, metadata: dict[str, Any]) -> None:
        super()._reset_pytorch_state_from_metadata(metadata)
        kept = self._kept()
        for bits in kept:
            bits.fill_(_NAN_BITS)  # ModelOpt leaves memory as it found it
        if CHECKSUM in self._buffers and kept:
            self._buffers[CHECKSUM].copy_(checksum(kept))


def mark_readers(model: nn.Module) -> None:
    """Let the quantizers of ``model`` know which layers they belong to, for times of tokens; nothing of it is saved."""
    for name, reader in readers(model).items():
        quantizer = model.get_submodule(name)
        if isinstance(quantizer, KeptRows):
            quantizer._reader = reader
