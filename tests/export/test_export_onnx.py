"""``export_onnx`` as users call it: the file, its inputs and outputs, the report, the errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import onnx
import pytest
import torch
from support.models import TinyDenoiser, fast_config, noise, quantized
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.export.trace import trace
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return quantized()


def inputs(batch: int = 2, time: Any = 300.0) -> dict[str, Any]:
    return {"sample": noise(batch, 3, 8, 8), "timestep": torch.tensor(time)}


def shapes(values: Any) -> dict[str, list[Any]]:
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


def test_file_and_report(model: nn.Module, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = tdq.export_onnx(model, tmp_path / "new" / "model.onnx", inputs(), lowering="reference")
    assert report.path == tmp_path / "new" / "model.onnx"
    assert report.lowering == "reference"
    assert report.skipped == ()
    layers = {name.rpartition(".")[0] for name in tdq.scale_table(model).names}
    expected = {f"{layer}.{kind}_quantizer" for layer in layers for kind in ("input", "weight")}
    assert set(report.quantized) == expected
    assert [file.name for file in report.path.parent.iterdir()] == ["model.onnx"]
    proto = onnx.load(report.path)
    assert {entry.domain for entry in proto.opset_import} == {""}
    assert shapes(proto.graph.input) == {"sample": [2, 3, 8, 8], "timestep": []}
    assert shapes(proto.graph.output) == {"output": [2, 3, 8, 8]}
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    with torch.no_grad():
        model(**inputs())  # the time still reaches the quantizers


def test_the_reference_comes_from_the_same_trace(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = tdq.export_onnx(model, tmp_path / "alone.onnx", inputs(), lowering="reference").path
    plain = tdq.export_onnx(model, tmp_path / "plain.onnx", inputs()).path
    traces: list[nn.Module] = []
    monkeypatch.setattr(
        "modelopt_tdq.export.onnx_export.trace", lambda *given: traces.append(given[0]) or trace(*given)
    )
    twin = tmp_path / "new" / "reference.onnx"
    report = tdq.export_onnx(model, tmp_path / "both.onnx", inputs(), reference_path=twin)
    assert len(traces) == 1
    assert (report.lowering, report.path) == ("ratio", tmp_path / "both.onnx")
    assert onnx.load(report.path) == onnx.load(plain) != onnx.load(alone)
    assert onnx.load(twin) == onnx.load(alone)


def test_quantized_weights_are_stored_as_codes_only(model: nn.Module, tmp_path: Path) -> None:
    report = tdq.export_onnx(model, tmp_path / "model.onnx", inputs())
    tensors = onnx.load(report.path).graph.initializer
    weights = {name for name, _ in model.named_parameters() if name.endswith(".weight")}
    stored = {tensor.name for tensor in tensors}
    for layer in ("conv1", "conv2", "mix"):
        assert f"{layer}.weight" in weights
        assert f"{layer}.weight" not in stored
        codes = next(t for t in tensors if t.name == f"{layer}.weight_quantizer/codes")
        assert codes.data_type == onnx.TensorProto.INT8


@pytest.mark.parametrize("lowering", ["reference", "ratio"])
def test_dynamic_batch(model: nn.Module, tmp_path: Path, lowering: Any) -> None:
    sample = inputs(time=[300.0, 20.0])
    report = tdq.export_onnx(model, tmp_path / "m.onnx", sample, lowering=lowering, dynamic_batch=True)
    proto = onnx.load(report.path)
    assert shapes(proto.graph.input) == {"sample": ["batch", 3, 8, 8], "timestep": ["batch"]}
    assert shapes(proto.graph.output) == {"output": ["batch", 3, 8, 8]}
    session = OnnxRuntimeSession(report.path)
    for times in ([900.0], [1.0, 450.0, 700.0]):
        call = inputs(len(times), times)
        with torch.no_grad():
            expected = model(**call)
        torch.testing.assert_close(torch.from_numpy(session(call)["output"]), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("time", [torch.tensor(300), torch.tensor([300]), 300, 300.5, torch.tensor(300.0).double()])
def test_time_of_any_kind(tmp_path: Path, time: Any) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, sample: Tensor, timestep: Any) -> Tensor:
            out: Tensor = self.layer(sample)
            return out

    torch.manual_seed(0)
    small = Small().eval()

    def forward_loop(called: nn.Module) -> None:
        for scale, t in ((1.0, 0), (2.0, 400), (3.0, 1000)):
            called(scale * noise(8, 4), torch.tensor(t))

    mtq.quantize(small, fast_config(), forward_loop)
    x = noise(8, 4)
    report = tdq.export_onnx(small, tmp_path / "m.onnx", {"sample": x, "timestep": time})
    with torch.no_grad():
        expected = small(x, torch.as_tensor(time))
    found = OnnxRuntimeSession(report.path)({"sample": x, "timestep": time})["output"]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-6)


def test_nested_and_constant_arguments(tmp_path: Path) -> None:
    class Conditioned(TinyDenoiser):
        def forward(  # type: ignore[override]
            self, sample: Tensor, timestep: Tensor, extra: dict[str, Any], double: bool = False
        ) -> dict[str, Tensor]:
            y = super().forward(sample + extra["shift"], timestep)
            return {"sample": y * 2 if double else y, "other": y.mean()}

    torch.manual_seed(0)
    conditioned = Conditioned().eval()
    extra = {"shift": torch.ones(1, 3, 8, 8), "unused": None}

    def forward_loop(called: nn.Module) -> None:
        for t in (10.0, 500.0):
            called(noise(2, 3, 8, 8), torch.tensor(t), extra)

    mtq.quantize(conditioned, fast_config(), forward_loop)
    call = {**inputs(), "extra": extra, "double": True}
    report = tdq.export_onnx(conditioned, tmp_path / "m.onnx", call)
    proto = onnx.load(report.path)
    assert [v.name for v in proto.graph.input] == ["sample", "timestep", "extra.shift"]
    assert [v.name for v in proto.graph.output] == ["output.sample", "output.other"]
    found = OnnxRuntimeSession(report.path)({**inputs(), "extra.shift": extra["shift"]})
    with torch.no_grad():
        expected = conditioned(**call)["sample"]
    torch.testing.assert_close(torch.from_numpy(found["output.sample"]), expected, rtol=1e-4, atol=2e-5)


def test_a_layer_that_does_not_run_is_reported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    denoiser = quantized()
    unused = quantized(TinyDenoiser().eval())
    denoiser.register_module("spare", unused.conv1)
    report = tdq.export_onnx(denoiser, tmp_path / "m.onnx", inputs())
    reasons = dict(report.skipped)
    assert set(reasons) == {"spare.input_quantizer", "spare.weight_quantizer"}
    assert "does not run" in reasons["spare.input_quantizer"]


class TestErrors:
    """Each names the field and the cure, and leaves no file."""

    def check(self, tmp_path: Path, match: str, model: nn.Module, sample: Any, **options: Any) -> tdq.TdqError:
        with pytest.raises(tdq.TdqError, match=match) as caught:
            tdq.export_onnx(model, tmp_path / "m.onnx", sample, **options)
        assert list(tmp_path.iterdir()) == []
        return caught.value

    def test_lowering(self, model: nn.Module, tmp_path: Path) -> None:
        self.check(tmp_path, "lowering = 'gather': no such lowering", model, inputs(), lowering="gather")

    def test_path(self, model: nn.Module, tmp_path: Path) -> None:
        with pytest.raises(tdq.TdqError, match=r"path = .*not the name of a file"):
            tdq.export_onnx(model, tmp_path, inputs())
        self.check(tmp_path, "reference_path = .*not the name of a file", model, inputs(), reference_path=tmp_path)
        same = tmp_path / "gone" / ".." / "m.onnx"
        self.check(tmp_path, "reference_path = .*it is path as well", model, inputs(), reference_path=same)

    def test_inputs_without_the_time(self, model: nn.Module, tmp_path: Path) -> None:
        self.check(tmp_path, "lacks the time, `timestep`", model, {"sample": noise(2, 3, 8, 8)})

    def test_inputs_that_are_no_mapping(self, model: nn.Module, tmp_path: Path) -> None:
        self.check(tmp_path, "not a mapping", model, (noise(2, 3, 8, 8), 3))

    def test_inputs_that_do_not_fit(self, model: nn.Module, tmp_path: Path) -> None:
        self.check(tmp_path, "does not run on them", model, {"sample": noise(2, 4, 8, 8), "timestep": 3.0})

    def test_dynamic_batch_of_one(self, model: nn.Module, tmp_path: Path) -> None:
        self.check(tmp_path, "batch of 2 or more", model, inputs(1), dynamic_batch=True)

    def test_model_that_fixes_its_batch(self, tmp_path: Path) -> None:
        class Fixed(TinyDenoiser):
            def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
                return super().forward(sample.reshape(2, 3, 8, 8), timestep)

        fixed = quantized(Fixed().eval())
        error = self.check(tmp_path, "dynamic_batch = True: Fixed cannot", fixed, inputs(), dynamic_batch=True)
        assert "without dynamic_batch" in error.cure

    def test_unquantized_model(self, tmp_path: Path) -> None:
        self.check(tmp_path, "no enabled quantizer", TinyDenoiser(), inputs())

    def test_uncalibrated_model(self, tmp_path: Path) -> None:
        broken = quantized()
        broken.conv1.input_quantizer.reset_amax()
        self.check(tmp_path, "not calibrated", broken, inputs())

    def test_part_of_the_model(self, tmp_path: Path) -> None:
        class Outer(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, sample: Tensor, timestep: Tensor) -> Any:
                return self.inner(sample, timestep)

        self.check(tmp_path, "not the module that was calibrated", Outer(quantized()), inputs())

    def test_per_channel_activation(self, tmp_path: Path) -> None:
        rules = [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*conv1.input_quantizer", "cfg": {"num_bits": 8, "axis": 1}},
        ]
        denoiser = TinyDenoiser().eval()
        mtq.quantize(denoiser, {"quant_cfg": rules, "algorithm": "max"}, lambda m: m(**inputs()))
        error = self.check(tmp_path, "conv1.input_quantizer", denoiser, inputs())
        assert "quant_cfg rule" in error.cure

    def test_operator_that_torch_cannot_export(self, tmp_path: Path) -> None:
        class Odd(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.special.bessel_j0(x)

        denoiser = quantized()
        denoiser.conv_out = nn.Sequential(denoiser.conv_out, Odd())
        error = self.check(tmp_path, "special_bessel_j0", denoiser, inputs())
        assert "conv_out.1" in error.problem
        assert "quantization has nothing to do with it" in error.problem
        assert "Replace the operator" in error.cure

    def test_padding_with_an_offset_that_leaves_zero_without_a_code(self, tmp_path: Path) -> None:
        denoiser = quantized(asymmetric=True)
        table = tdq.scale_table(denoiser)
        assert table.offset is not None
        odd = tdq.ScaleTable(table.timesteps, table.scale, table.names, table.scale * 3.3)
        tdq.set_scale_table(denoiser, odd)
        error = self.check(tmp_path, "conv1.input_quantizer", denoiser, inputs())
        assert "zero has no code" in error.problem
        tdq.export_onnx(denoiser, tmp_path / "m.onnx", inputs(), lowering="reference")  # pads in float

    def test_a_graph_that_fails_the_check_leaves_the_old_file(
        self, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target = tmp_path / "m.onnx"
        target.write_bytes(b"old")

        def fail(*args: Any, **kwargs: Any) -> None:
            raise onnx.checker.ValidationError("on purpose")

        monkeypatch.setattr(onnx.checker, "check_model", fail)
        with pytest.raises(tdq.TdqError, match="on purpose"):
            tdq.export_onnx(model, target, inputs())
        assert target.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [target]


def test_weights_beyond_a_limit_lie_beside_the_file(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelopt_tdq.export.onnx_file.EXTERNAL_DATA_ABOVE", 0)
    monkeypatch.setattr("modelopt_tdq.export.onnx_file.STAYS_IN_GRAPH", 256)
    report = tdq.export_onnx(model, tmp_path / "m.onnx", inputs())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    with torch.no_grad():
        expected = model(**inputs())
    found = OnnxRuntimeSession(report.path)(inputs())["output"]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=2e-5)
