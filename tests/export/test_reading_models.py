"""Models whose code reads numbers of their inputs: exported with what it read, refused or NaN where that differs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import onnx
import pytest
import torch
from support.models import TIMES, fast_config, noise
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq import TdqError, TdqWarning
from modelopt_tdq.compare.model import compare_model
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession

MASK = torch.tensor([[True, True, True, False, False], [True, True, False, False, False]])


class Reading(nn.Module):
    """A denoiser [2, 5, 8] that trims texts to their longest, or reads what ``read`` does."""

    def __init__(self, read: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.first, self.text, self.last = nn.Linear(8, 8), nn.Linear(4, 8), nn.Linear(8, 8)
        self.read = read

    def forward(self, sample: Tensor, timestep: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        h = self.first(sample * (1 + timestep.reshape(-1, 1, 1) / 100))
        if self.read is not None:
            return self.last(h + self.text(self.read(context, mask)))
        longest = max(mask.sum(1).tolist())
        seen = self.text(context) * mask.unsqueeze(-1)
        return self.last(h + sum(seen[:, place : place + 1] for place in range(longest)))


def call(time: float = TIMES[1], seed: int = 0, **others: Any) -> dict[str, Any]:
    inputs = {"sample": noise(2, 5, 8, seed=seed), "context": noise(2, 5, 4, seed=seed + 1), "mask": MASK}
    return {**inputs, "timestep": torch.tensor(time), **others}


def quantized(model: nn.Module) -> nn.Module:
    def loop(made: nn.Module) -> None:
        for index, time in enumerate(TIMES):
            made(**call(time, index))

    return mtq.quantize(model.eval(), fast_config(high_precision=()), loop)


def numpy(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.numpy() for name, value in inputs.items()}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return quantized(Reading())


@pytest.fixture(scope="module")
def exported(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reading") / "m.onnx"
    with pytest.warns(TdqWarning, match=r"mask: the code of Reading reads their values"):
        report = tdq.export_onnx(model, path, call())
    assert report.constants == ("mask",)
    assert report.decisions == ()
    return path


def test_what_is_read_is_a_constant_and_the_numbers_are_right(model: nn.Module, exported: Path) -> None:
    session = OnnxRuntimeSession(exported)
    assert sorted(session.inputs) == ["context", "sample", "timestep"]
    inputs = call(seed=7)
    with torch.no_grad():
        expected = model(**inputs)
    del inputs["mask"]
    assert torch.allclose(torch.from_numpy(session(numpy(inputs))["output"]), expected, atol=1e-5)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_other_values_are_refused(exported: Path, backend: str) -> None:
    pytest.importorskip(backend)
    session = tdq.open_session(exported, backend)
    given = numpy(call())
    without = session({name: value for name, value in given.items() if name != "mask"})["output"]
    assert np.array_equal(session(given)["output"], without)
    with pytest.raises(TdqError, match=r"(?s)mask = .* which is part of it"):
        session({**given, "mask": np.ones_like(given["mask"])})
    with pytest.raises(TdqError, match="not the inputs of the graph"):
        session({**given, "another": given["mask"]})


def test_a_swapped_denoiser_refuses_other_values(model: nn.Module, exported: Path) -> None:
    denoiser = tdq.EngineDenoiser(tdq.open_session(exported), model)
    with torch.no_grad():
        expected = model(**call())
    found = denoiser(**call())
    assert torch.allclose(found[0], expected, atol=1e-5)
    with pytest.raises(TdqError, match=r"(?s)mask = .* which is part of its graph"):
        denoiser(**call(mask=MASK | True))


def test_comparing_a_model_with_its_graph_takes_the_constants(model: nn.Module) -> None:
    pytest.importorskip("polygraphy")
    found = compare_model(model, [call(time, 3) for time in TIMES[:2]], backends=["torch"], progress=False)
    assert found.passed
    assert found.compared_codes["torch"] > 0


def test_constants_can_be_asked_for(model: nn.Module, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", TdqWarning)
        report = tdq.export_onnx(model, tmp_path / "m.onnx", call(), constants=["mask", "context"])
    assert report.constants == ("context", "mask")
    session = OnnxRuntimeSession(tmp_path / "m.onnx")
    assert sorted(session.inputs) == ["sample", "timestep"]
    inputs = call()
    with torch.no_grad():
        expected = model(**inputs)
    assert torch.allclose(torch.from_numpy(session(numpy(inputs))["output"]), expected, atol=1e-5)


@pytest.mark.parametrize(("name", "problem"), [("masks", "no such tensor"), ("timestep", "the scales depend on it")])
def test_constants_that_cannot_be(model: nn.Module, tmp_path: Path, name: str, problem: str) -> None:
    with pytest.raises(TdqError, match=problem):
        tdq.export_onnx(model, tmp_path / "m.onnx", call(), constants=[name])


def test_what_a_truth_value_decides_is_kept_or_the_output_is_nan(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = quantized(Reading(lambda context, mask: context * 2 if (context.abs() < 1e-3).all() else context))
    with pytest.warns(TdqWarning, match=r"test_reading_models.py:\d+, `model = quantized.*gives NaN"):
        report = tdq.export_onnx(model, tmp_path / "m.onnx", call())
    assert report.constants == ()
    assert len(report.decisions) == 1
    session = OnnxRuntimeSession(tmp_path / "m.onnx")
    with torch.no_grad():
        expected = model(**call(seed=5))
    used = {name: value for name, value in numpy(call(seed=5)).items() if name in session.inputs}
    assert torch.allclose(torch.from_numpy(session(used)["output"]), expected, atol=1e-5)
    assert np.isnan(session({**used, "context": used["context"] * 0})["output"]).all()


def test_what_follows_from_no_constant_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = quantized(Reading(lambda context, mask: context[:, np.argsort(context[0, :, 0].numpy())]))
    with pytest.raises(TdqError, match="nor can the model in full precision") as raised:
        tdq.export_onnx(model, tmp_path / "m.onnx", call())
    assert "its code reads numbers that are computed from the inputs" in raised.value.problem
    assert "test_reading_models.py:" in raised.value.problem
    assert "context[0, :, 0].numpy()" in raised.value.problem
    assert "`constants`" in raised.value.cure


class Differs(Reading):
    """Reads itself whether it is traced, so that torch's exporter makes another model of it."""

    def forward(self, sample: Tensor, timestep: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        factor = 2.0 if torch.compiler.is_exporting() else 1.0
        return super().forward(sample * factor, timestep, context, mask)


def test_a_trace_that_computes_something_else_is_not_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.raises(TdqError, match="makes something else of it"):
        tdq.export_onnx(quantized(Differs()), tmp_path / "m.onnx", call())
    assert not (tmp_path / "m.onnx").exists()


def test_the_file_says_what_is_part_of_it(exported: Path) -> None:
    metadata = {entry.key: entry.value for entry in onnx.load(exported).metadata_props}
    assert '"mask": [[true, true, true, false, false]' in metadata["modelopt_tdq.arguments"]
