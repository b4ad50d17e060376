"""What a stage is, what it works on, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.export.inputs import flatten_inputs
from modelopt_tdq.export.outputs import flatten_outputs
from modelopt_tdq.lab.zoo.entry import Entry

__all__ = ["FAILED", "NONE", "NOT_RUN", "REFUSED", "RIGHT", "WRONG", "Case", "Cell", "Stage"]

#: What a stage answers: its verdict under "verdict", the reason of any verdict but RIGHT under "reason", and numbers.
Cell = dict[str, Any]

#: The value was compared, and is as it should be; and is not.
RIGHT, WRONG = "right", "wrong"

#: A library or this package says that it cannot, with a reason.
REFUSED = "refused"

#: An error that nobody foresaw, a crash, or no end within the time limit.
FAILED = "failed"

#: The model has nothing that this stage is about.
NONE = "none"

#: A stage that it needs did not end well.
NOT_RUN = "not run"

#: The times of calibration, as shares of the largest; the middle one is that of the held-out call.
_TIMES = (0.95, 0.7, 0.4, 0.15, 0.02)

_HELD_OUT_TIME = _TIMES[2]

#: Samples per call.
_BATCH = 2

#: Seeds of the first calibration call, and of the held-out call.
_CALIBRATION_SEED, _HELD_OUT_SEED = 10, 77


@dataclass
class Case:
    """One class on its way through the stages.

    Attributes:
        entry: Of the zoo.
        folder: For its files; its own.
        exact: The outputs of the full-precision model for the held-out call, by name.
        quantized: The quantized model.
        expected: Its outputs for the held-out call.
        noise_db: For each output, signal to quantization noise.
        cached: The model whose temporal features come from a table.
        codes: What a comparison of codes found, if there was one.
        amplified: Whether a difference by rounding, with codes that are right, grew near the quantization noise.
        onnxruntime_db: Lowest of the outputs: quantized torch to the difference of ONNX Runtime.
    """

    entry: Entry
    folder: Path
    exact: dict[str, Tensor] = field(default_factory=dict)
    quantized: nn.Module | None = None
    expected: dict[str, Tensor] = field(default_factory=dict)
    noise_db: dict[str, float] = field(default_factory=dict)
    cached: nn.Module | None = None
    codes: Cell | None = None
    amplified: bool = False
    onnxruntime_db: float | None = None

    @property
    def model(self) -> nn.Module:
        """The quantized model.

        Raises:
            RuntimeError: Nothing has quantized it.
        """
        if self.quantized is None:
            raise RuntimeError("there is no quantized model")
        return self.quantized

    @property
    def held_out(self) -> dict[str, Any]:
        """Arguments of the call that everything is judged by: at a time of the calibration, of another seed."""
        return self.entry.inputs(_BATCH, _HELD_OUT_TIME * self.entry.largest, _HELD_OUT_SEED)

    @property
    def feeds(self) -> dict[str, Any]:
        """Its tensors by the names of the graph's inputs, as arrays."""
        flat = flatten_inputs(self.held_out, self.entry.times[0])
        return {name: tensor.numpy() for name, tensor in zip(flat.names, flat.tensors, strict=True)}

    @property
    def ratio(self) -> Path:
        """The graph to deploy."""
        return self.folder / "ratio.onnx"

    @property
    def reference(self) -> Path:
        """The graph that it is proven by."""
        return self.folder / "reference.onnx"

    @property
    def saved(self) -> Path:
        """The quantized model, as ``mto.save`` writes it."""
        return self.folder / "quantized.pt"

    @property
    def saved_outputs(self) -> Path:
        """What it gave before it was saved."""
        return self.folder / "outputs.pt"

    def forward_loop(self, model: nn.Module) -> None:
        """Calls at five times, noisiest first, for ``mtq.quantize``."""
        for share in _TIMES:
            self._call(model, share)

    def forward_loop_of_one_time(self, model: nn.Module) -> None:
        """Those of its calls that are at the time of the held-out call."""
        self._call(model, _HELD_OUT_TIME)

    def _call(self, model: nn.Module, share: float) -> None:
        seed = _CALIBRATION_SEED + _TIMES.index(share)
        with torch.no_grad():
            model(**self.entry.inputs(_BATCH, share * self.entry.largest, seed))

    def outputs(self, model: nn.Module) -> dict[str, Tensor]:
        """Of the held-out call: those of floating type, by the names that the graph's outputs have."""
        held_out = self.held_out
        names = flatten_inputs(held_out, self.entry.times[0]).names
        with torch.no_grad():
            outputs = flatten_outputs(model(**held_out), names)
        return {name: value.clone() for name, value in outputs.items() if value.is_floating_point()}


@dataclass(frozen=True)
class Stage:
    """One column of the matrix.

    Attributes:
        name: Of the column.
        shows: What it is about, for people.
        run: Of the case: its answer. An error of it is an answer as well.
        needs: Stages that must have run before, with a verdict of ``with_verdicts``.
        with_verdicts: See ``needs``.
        fresh: Whether it runs in a process of its own, which has seen nothing of the model but its files.
        on_request: Whether it runs only if it is asked for by name.
    """

    name: str
    shows: str
    run: Callable[[Case], Cell]
    needs: tuple[str, ...] = ()
    with_verdicts: tuple[str, ...] = (RIGHT, WRONG)
    fresh: bool = False
    on_request: bool = False

    def missing(self, cells: Mapping[str, Cell]) -> str | None:
        """The first stage that it needs and that did not end well."""
        for name in self.needs:
            if cells.get(name, {}).get("verdict") not in self.with_verdicts:
                return name
        return None
