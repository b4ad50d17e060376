"""LearnedIntervals: the module in the root of a model that makes the intervals of all its quantizers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.errors import TdqError
from modelopt_tdq.intervals.build import build_source
from modelopt_tdq.intervals.dynamic import DYNAMIC
from modelopt_tdq.intervals.source import IntervalSource
from modelopt_tdq.model.intact import Intact, averaged, checksum
from modelopt_tdq.model.place import release
from modelopt_tdq.model.timestep import INTERVALS, CurrentTimestep, find_timestep
from modelopt_tdq.model.weight_fit import remember_weights
from modelopt_tdq.model.wrapped import unwrapped
from modelopt_tdq.training.attention import leave_attention
from modelopt_tdq.training.quantizer import DynamicQuantizer, LearnedQuantizer
from modelopt_tdq.training.weights import LearnedWeightQuantizer

__all__ = [
    "LearnedIntervals",
    "learned_intervals",
    "learned_quantizers",
    "materialize",
    "stop_learning",
    "stop_noise",
]

#: In place of the fingerprint of the source that the tables were made from, where they were made from none: not yet
#: made, or set by hand. No fingerprint is negative.
_NOT_YET, _BY_HAND = -1, -2


def learned_quantizers(model: nn.Module) -> dict[str, LearnedQuantizer]:
    """The enabled quantizers of ``model`` that learn, by name."""
    modules = unwrapped(model).named_modules()
    return {n: m for n, m in modules if isinstance(m, LearnedQuantizer) and m.is_enabled}


class LearnedIntervals(nn.Module):
    """The source of a model's intervals, evaluated once per call for all quantizers, and its way into the table.

    In training mode, every call of the root makes the intervals of its times. In eval mode the quantizers use
    their table, which is made anew from the source whenever that has changed: after training, after loading a
    checkpoint, after an EMA was copied in.

    Args:
        description: See :func:`modelopt_tdq.intervals.build.build_source`; further ``scheme``; ``rows``, the times of
            the table; and ``checksum``: whether there is one that tells when somebody has computed with what is
            constant.
    """

    rows: Tensor
    settings: Tensor
    made_from: Tensor

    def __init__(self, description: dict[str, Any]) -> None:
        super().__init__()
        self.description = description
        self.source = None if description["intervals"] in DYNAMIC else build_source(description)
        self.register_buffer("rows", torch.tensor(description["rows"], dtype=torch.float32))
        # travels in the state dict, as bytes, so that a checkpoint of other settings is recognised
        self.register_buffer("settings", _encoded(_settings(description)))
        # of the parameters that the table was made from, so that a loaded table is used as it is
        nothing_yet = None if self.source is None else torch.full_like(self.source.fingerprint(), _NOT_YET)
        self.register_buffer("made_from", nothing_yet)
        if description.get("checksum"):
            self.register_buffer("checksum", checksum(self._constants()))
        self._intact = Intact()
        self._learned_since = False

    def _constants(self) -> list[Tensor]:
        return [buffer for name, buffer in self.named_buffers() if name not in ("made_from", "checksum")]

    def _require_intact(self) -> None:
        expected = self._buffers.get("checksum")
        if expected is not None and not self._is_rounded and not self._intact(self._constants(), expected):
            raise averaged("model", INTERVALS, "what its intervals are made with")

    def begin(self, root: nn.Module, timestep: CurrentTimestep) -> None:
        """A call of the root begins: make its intervals, or see that the table is up to date."""
        timestep.learned(None)
        if self.source is None:
            return
        self._release()
        if not torch.compiler.is_compiling():
            self._require_intact()
        if self.training:
            if self._is_rounded:
                raise TdqError(
                    "torch_dtype",
                    next(self.source.parameters()).dtype,
                    "the intervals were loaded in this type, and learn in float32 only",
                    "Load the model in float32, and train with autocast",
                )
            if not self._learned_since and self._are_tables_by_hand:
                raise TdqError(
                    "set_scale_table",
                    type(root).__name__,
                    "training would undo the table that was set",
                    "Call modelopt_tdq.materialize(model) to go on from the learned scales, or "
                    "modelopt_tdq.stop_learning(model) to keep the table and train the weights alone",
                )
            timestep.learned(self.source(timestep.require().to(self.rows.device)))
            self._learned_since = True
        elif not torch.compiler.is_compiling():
            self.refresh(root)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedIntervals:
        """As ``nn.Module._apply``, but ``.half()`` and the like leave the source in float32."""

        def keep_dtype(value: Tensor) -> Tensor:
            moved = fn(value)
            return moved if moved.dtype == value.dtype else value.to(moved.device)

        return super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call, no-any-return]

    @property
    def _is_rounded(self) -> bool:
        """Whether the source was loaded in less than float32, as ``from_pretrained(torch_dtype=...)`` does."""
        return self.source is not None and any(p.dtype != torch.float32 for p in self.source.parameters())

    @property
    def _are_tables_by_hand(self) -> bool:
        return bool((self.made_from == _BY_HAND).all())

    def keep_tables(self) -> None:
        """The tables were set by hand: they stay until :meth:`materialize`, also when the model is saved and loaded."""
        if self.source is not None:
            self.made_from.fill_(_BY_HAND)
        self._learned_since = False

    def _release(self) -> None:
        """Take the source back from who keeps it elsewhere."""
        if any(tensor.is_meta for tensor in (*self.parameters(), *self.buffers())):
            release(self)

    def require_source(self, cure: str) -> IntervalSource:
        """What makes the intervals.

        Raises:
            TdqError: They are measured while the model runs; ``cure`` says what to do instead.
        """
        if self.source is None:
            raise TdqError("intervals", self.description["intervals"], DynamicQuantizer.no_table, cure)
        return self.source

    def refresh(self, root: nn.Module) -> None:
        """Make the tables anew if the source has changed since they were made."""
        self._release()
        if self.source is None or self.rows.is_meta or self._is_rounded:
            return  # a table that was loaded with a rounded source is better than what that would make
        self._require_intact()
        made_from_these = self._are_tables_by_hand or torch.equal(self.source.fingerprint(), self.made_from)
        if made_from_these and not self._learned_since:
            return
        if not any(q.awaits_state for q in learned_quantizers(root).values()):
            self.materialize(root)

    @torch.no_grad()
    def materialize(self, root: nn.Module) -> None:
        """Write the source's intervals at ``rows`` into the tables of the quantizers.

        Raises:
            TdqError: The intervals are measured while the model runs, or one became 0 or NaN. No table has changed.
        """
        source = self.require_source('Train "mlp", "thin", "table" or "static" intervals to deploy a model')
        self._release()
        training = source.training
        source.eval()
        try:
            intervals = source(self.rows)
        finally:
            source.train(training)
        quantizers = learned_quantizers(root)
        self._require_positive(intervals, quantizers)
        for quantizer in quantizers.values():
            made = quantizer.deployed(intervals[:, quantizer._column])
            quantizer.set_rows(self.rows, *made)
        self.made_from.copy_(source.fingerprint())
        self._learned_since = False

    def unlearn(self, root: nn.Module) -> None:
        """Leave ``root``, and turn its learned quantizers back into those they were made from; their scales stay."""
        root._modules.pop(INTERVALS, None)
        timestep = find_timestep(root)
        if timestep is not None:
            timestep.last_intervals = None
        for module in root.modules():
            if isinstance(module, (LearnedQuantizer, LearnedWeightQuantizer)):
                module.unlearn()
        leave_attention(root)

    def _require_positive(self, intervals: Tensor, quantizers: dict[str, LearnedQuantizer]) -> None:
        bad = ~((intervals > 0) & intervals.isfinite())
        names = [name for name, quantizer in quantizers.items() if bool(bad[:, quantizer._column].any())]
        if names:
            times = self.rows[bad.any(1).to(self.rows.device)].tolist()
            raise TdqError(
                "scale",
                names[:3],
                f"the interval of {len(names)} quantizers is 0 or not finite after training, from time {times[0]:g} on",
                f"Use another encoding of time than {self.description.get('encoding')!r}, or a smaller learning rate",
            )


_SETTINGS = ("intervals", "scheme", "encoding", "initialization", "dropout", "timesteps", "rows")


def _settings(description: dict[str, Any]) -> dict[str, Any]:
    return {name: description[name] for name in _SETTINGS}


def _encoded(settings: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


class FreshTable:
    """Brings the tables up to date before a state dict is taken."""

    def __call__(self, module: nn.Module, *_: Any) -> None:
        """Hook of ``state_dict``."""
        learned = module._modules.get(INTERVALS)
        if isinstance(learned, LearnedIntervals):
            learned.refresh(module)


class SameSettings:
    """Refuses to load a checkpoint of other settings, before anything of it is loaded."""

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Hook of ``load_state_dict``."""
        learned, saved = module._modules.get(INTERVALS), state.get(f"{prefix}{INTERVALS}.settings")
        if not isinstance(learned, LearnedIntervals) or saved is None or saved.is_meta:
            return
        try:
            was, now = json.loads(bytes(saved.tolist())), _settings(learned.description)
        except ValueError as error:
            raise averaged("state_dict", f"{prefix}{INTERVALS}.settings", "the settings of its intervals") from error
        for name in _SETTINGS:
            if was.get(name) != now[name]:
                raise TdqError(
                    name,
                    now[name],
                    f"the checkpoint was trained with {was.get(name)!r}",
                    "Resume with the config of the checkpoint, or train from the full-precision model again",
                )


def learned_intervals(model: nn.Module) -> LearnedIntervals:
    """The module that makes the intervals of ``model``.

    Raises:
        TdqError: It does not learn.
    """
    found = unwrapped(model)._modules.get(INTERVALS)
    if not isinstance(found, LearnedIntervals):
        raise TdqError(
            "model",
            type(model).__name__,
            "it does not learn its intervals, or is not the module that mtq.quantize was called with",
            'Quantize it with an algorithm that learns: {"method": "tdq_qat", ...}',
        )
    return found


def materialize(model: nn.Module) -> None:
    """Make the tables of a model that learns from its source, now; eval mode does so by itself."""
    learned_intervals(model).materialize(unwrapped(model))


def stop_learning(model: nn.Module) -> None:
    """Turn the learned quantizers of ``model`` back into calibrated ones, in place; their scales stay as they are now.

    From then on its table is what :func:`~modelopt_tdq.set_scale_table` says, and the scales of its weights are what
    :func:`~modelopt_tdq.recalibrate_weights` says. The weights can be trained on; to learn scales again, quantize the
    model again.

    Raises:
        TdqError: It does not learn, or its scales are measured while it runs: there are none that could stay.
    """
    learned = learned_intervals(model)
    learned.require_source("Calibrate the model again: mtq.quantize(model, modelopt_tdq.TDQ_CONFIG, forward_loop)")
    learned.refresh(model)
    learned.unlearn(model)
    remember_weights(model)


def stop_noise(model: nn.Module) -> None:
    """From now on, a model that trains with NIPQ rounds; the last part of its training does.

    Raises:
        TdqError: No quantizer of the model uses NIPQ.
    """
    quantizers = [q for q in learned_quantizers(model).values() if q._scheme == "nipq"]
    if not quantizers:
        raise TdqError("model", type(model).__name__, "no quantizer of it trains with noise", 'Use scheme "nipq"')
    for quantizer in quantizers:
        quantizer._scheme = "nipq_rounding"
