"""Temporal features in the graph: what is looked up is torch's to the last bit, and what it replaces is gone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import onnx
import pytest
import torch
from support.double import run_double
from support.export import LOWERINGS, Lowered, codes_by_definition, lowered, trace
from support.models import SMALL_UNET, TinyDenoiser, fast_config, noise
from support.temporal import UPSTREAM, head_names, make_table, unet_table
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq import TdqError
from modelopt_tdq.export import export_onnx
from modelopt_tdq.export.report import report_of
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession, add_outputs
from modelopt_tdq.temporal_features.runtime import feature_table, free_modules, install_features
from modelopt_tdq.temporal_features.table import Feature, FeatureTable

ROWS = [0.0, 250.0, 500.0, 999.0]
TIMES = [-5.0, 0.0, 100.0, 125.0, 126.0, 250.0, 470.25, 749.5, 800.0, 999.0, 2000.0]


class Heads(nn.Module):
    """Layers of all kinds whose outputs are the model's; the first two hold the same number of rows as the batch."""

    def __init__(self, frames: int = 3) -> None:
        super().__init__()
        self.frames = frames
        self.time = nn.Linear(1, 3)
        self.plain, self.tokens, self.halves = nn.Linear(3, 5), nn.Linear(3, 4), nn.Linear(3, 2)
        self.full, self.single, self.folded = nn.Linear(3, 6), nn.Linear(3, 1), nn.Linear(3, 3)

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        h = self.time(timestep.reshape(-1, 1).to(sample).expand(sample.shape[0], 1) / 1000)
        return (
            self.plain(h),
            self.tokens(h[:, None]),
            self.halves(h),
            self.full(h),
            self.single(h),
            self.folded(h.repeat_interleave(self.frames, 0)),
            self.plain(h) + sample,
        )


def _heads(outside: str, rows: list[float] | None = None) -> Heads:
    torch.manual_seed(0)
    model, rows = Heads().eval(), ROWS if rows is None else rows

    def values(*shape: int) -> Tensor:
        return torch.randn(len(rows), *shape)

    symmetric = torch.randint(-8, 8, (len(rows), 3))
    features = {
        "tokens": Feature.quantized(values(1, 4), 8),
        "plain": Feature.quantized(values(5), 4),
        "halves": Feature(values(2).half()),
        "full": Feature(values(6)),
        "single": Feature.quantized(values(1), 8),
        "folded": Feature(None, symmetric, torch.rand(len(rows)) + 1, None, 4),
    }
    install_features(model, FeatureTable(torch.tensor(rows), features, outside), {"time": (3,)}, "timestep")
    return model


def _call(times: int | None, time: float, batch: int = 2) -> dict[str, Tensor]:
    """``times``: None for one scalar time, else a time per sample of as many, that differ."""
    spread = torch.tensor(time) if times is None else torch.tensor([time, 250.0, 333.0][:times])
    return {"sample": noise(batch, 5), "timestep": spread}


@pytest.mark.parametrize(
    ("outside", "times", "dynamic"),
    [
        ("nearest", None, False),
        ("nearest", 2, True),
        ("linear", None, True),
        ("linear", 2, False),
        ("exact", None, False),
        ("exact", 2, False),
        ("exact", 2, True),
    ],
)
def test_outputs_are_those_of_torch_bit_for_bit(outside: Any, times: int | None, dynamic: bool) -> None:
    model = _heads(outside)
    graph = trace(model, _call(times, 300.0), dynamic)
    batches = (2, 3) if dynamic else (2,)
    for lowering in LOWERINGS:
        session = OnnxRuntimeSession(lowered(graph, lowering).proto)
        for time in TIMES:
            for batch in batches:
                call = _call(None if times is None else batch, time, batch)
                with torch.no_grad():
                    expected = model(**call)
                for found, value in zip(session(call).values(), expected, strict=True):
                    if outside == "exact":  # the layers' own sums are not torch's to the last bit
                        np.testing.assert_allclose(found, value.numpy(), rtol=1e-5, atol=1e-6)
                    else:
                        np.testing.assert_array_equal(found, value.numpy())


def test_exact_takes_the_rows_where_there_are_some() -> None:
    model = _heads("exact")
    session = OnnxRuntimeSession(lowered(trace(model, _call(2, 300.0)), "ratio").proto)
    found = session(_call(2, 301.0))  # its second time is a row
    for name, values in zip(("plain", "tokens"), list(found.values())[:2], strict=True):
        row = feature_table(model).lookup(name, torch.tensor([250.0]))[0].numpy()
        np.testing.assert_array_equal(values[1], row)
        assert np.abs(values[0] - row).max() > 0.1


@pytest.mark.parametrize("rows", [[500.0], [100.0, 700.0]], ids=["one row", "two rows"])
@pytest.mark.parametrize("outside", ["nearest", "linear", "exact"])
def test_tables_of_hardly_any_rows(outside: Any, rows: list[float]) -> None:
    model = _heads(outside, rows)
    graph = lowered(trace(model, _call(None, 300.0)), "ratio")
    session = OnnxRuntimeSession(graph.proto)
    for time in (0.0, 399.0, *rows, 900.0):
        with torch.no_grad():
            expected = model(**_call(None, time))
        for found, value in zip(session(_call(None, time)).values(), expected, strict=True):
            np.testing.assert_allclose(found, value.numpy(), rtol=1e-5, atol=1e-6)


def test_in_half_precision() -> None:
    model = _heads("linear").half()
    call = {"sample": noise(2, 5).half(), "timestep": torch.tensor(300.0)}
    for lowering in LOWERINGS:
        session = OnnxRuntimeSession(lowered(trace(model, call), lowering).proto)
        for time in TIMES:
            call["timestep"] = torch.tensor(time)
            with torch.no_grad():
                expected = model(**call)
            for found, value in zip(session(call).values(), expected, strict=True):
                assert found.dtype == np.float16
                np.testing.assert_array_equal(found, value.numpy())


class Many(nn.Module):
    """A row of heads."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(2, 3 + i) for i in range(heads))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        h = timestep.reshape(-1, 1).to(sample).expand(sample.shape[0], 2)
        return torch.cat([head(h) for head in self.heads], 1) + sample.sum()


def test_the_number_of_nodes_does_not_grow_with_the_layers() -> None:
    counts = []
    for heads in (2, 9):
        model = Many(heads).eval()
        table = make_table({f"heads.{i}": torch.randn(4, 3 + i) for i in range(heads)}, ROWS)
        install_features(model, table, {}, "timestep")
        graph = lowered(trace(model, _call(None, 300.0)), "ratio")
        kinds = [node.op_type for node in graph.proto.graph.node]
        assert kinds.count("Split") == 1
        assert len([i for i in graph.proto.graph.initializer if i.data_type == onnx.TensorProto.INT8 and i.dims]) == 1
        counts.append(len(kinds))
    assert counts[0] == counts[1]


UNET = SMALL_UNET


def _unet(high_precision: Any = ()) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    full = UNET.make().eval()
    return mtq.quantize(copy.deepcopy(full), fast_config(high_precision=high_precision), UNET.forward_loop()), full


@pytest.fixture(scope="module")
def unets() -> tuple[nn.Module, nn.Module]:
    """A UNet of which everything is quantized, the time MLP and the heads too; and in full precision."""
    return _unet()


def _table_of(model: nn.Module, full: nn.Module, outside: Any) -> tuple[FeatureTable, dict[str, tuple[int, ...]]]:
    times = tdq.scale_table(model).timesteps.tolist()
    return unet_table(full, UNET.data()[0], outside, 8, times)


def _of_the_block(names: Any) -> list[str]:
    return [name for name in names if "time_emb" in name and not name.endswith("/feature")]


def _inputs(time: float) -> dict[str, Tensor]:
    return UNET.inputs(2, torch.tensor(time), 0)


@pytest.fixture(scope="module")
def without_features(unets: Any) -> Lowered:
    return lowered(trace(unets[0], _inputs(600.0)), "ratio")


@pytest.fixture(scope="module")
def with_features(unets: Any) -> tuple[nn.Module, dict[str, Lowered]]:
    """The UNet with the temporal features of its full precision at the calibrated times."""
    model = copy.deepcopy(unets[0])
    install_features(model, *_table_of(model, unets[1], "linear"), "timestep")
    graph = trace(model, _inputs(600.0))
    return model, {name: lowered(graph, name) for name in LOWERINGS}


def test_time_mlp_and_heads_are_gone_from_the_file(
    unets: Any, without_features: Lowered, with_features: Any, tmp_path: Path
) -> None:
    model, full = with_features[0], unets[1]
    table = feature_table(model)
    before = report_of(without_features.context, tmp_path, "ratio", ())
    after = export_onnx(model, tmp_path / "after.onnx", _inputs(600.0))

    assert before.features == ()
    assert before.features_form == ""
    assert set(after.features) == set(head_names(model)) == set(table.features)
    assert after.features_form.startswith("table of outputs, 4 times, ")
    assert after.skipped == before.skipped
    gone = {f"{name}.{q}_quantizer" for name in (*head_names(model), *UPSTREAM) for q in ("input", "weight")}
    assert set(before.quantized) - set(after.quantized) == gone
    protos = [without_features.proto, onnx.load(after.path)]
    assert protos[1].graph == with_features[1]["ratio"].proto.graph
    for proto, there in zip(protos, (True, False), strict=True):
        names = [i.name for i in proto.graph.initializer] + [o for node in proto.graph.node for o in node.output]
        assert bool(_of_the_block(names)) == there
        assert any(node.op_type in ("Sin", "Cos") for node in proto.graph.node) == there
    sizes = [sum(i.ByteSize() for i in proto.graph.initializer) for proto in protos]
    weights = sum(full.get_submodule(n).weight.numel() for n in (*head_names(full), *UPSTREAM))
    assert sizes[0] - sizes[1] > weights - table.nbytes  # one byte per weight: they were INT8


def test_whether_the_parameters_are_there_makes_no_difference() -> None:
    model = _heads("linear")
    graph = lowered(trace(model, _call(None, 300.0)), "ratio").proto
    assert free_modules(model) > 0
    assert lowered(trace(model, _call(None, 300.0)), "ratio").proto.graph == graph.graph


def _tiny(**fields: Any) -> nn.Module:
    def forward_loop(model: nn.Module) -> None:
        for time in ROWS:
            model(noise(2, 3, 8, 8), torch.tensor(time))

    torch.manual_seed(0)
    return mtq.quantize(TinyDenoiser().eval(), fast_config(**fields), forward_loop)


def test_exact_keeps_the_layers_and_their_quantizers() -> None:
    model = _tiny(high_precision=())
    install_features(model, make_table({"time_embedding": torch.randn(4, 8)}, ROWS, "exact"), {}, "timestep")
    graph = lowered(trace(model, {"sample": noise(2, 3, 8, 8), "timestep": torch.tensor(1.0)}), "ratio")
    assert graph.context.features == ["time_embedding"]
    assert "time_embedding.input_quantizer" in graph.context.low_precision
    assert graph.context.skipped == {}
    session = OnnxRuntimeSession(graph.proto)
    for time in (250.0, 437.0):
        call = {"sample": noise(2, 3, 8, 8), "timestep": torch.tensor(time)}
        with torch.no_grad():
            expected = model(**call).numpy()
        np.testing.assert_allclose(session(call)["output"], expected, rtol=0, atol=1e-5)


def test_where_no_scale_depends_on_time() -> None:
    model = _tiny(bins=1)
    assert bool(tdq.scale_table(model).is_static.all())
    install_features(model, make_table({"time_embedding": torch.randn(4, 8)}, ROWS), {}, "timestep")
    for lowering in LOWERINGS:
        session = OnnxRuntimeSession(
            lowered(trace(model, {"sample": noise(2, 3, 8, 8), "timestep": torch.tensor(1.0)}), lowering).proto
        )
        results = []
        for time in ROWS:
            call = {"sample": noise(2, 3, 8, 8), "timestep": torch.tensor(time)}
            with torch.no_grad():
                expected = model(**call).numpy()
            results.append(session(call)["output"])
            np.testing.assert_allclose(results[-1], expected, rtol=0, atol=1e-5)
        assert len({result.tobytes() for result in results}) == len(ROWS)


def test_tables_of_different_times_are_refused(unets: Any, tmp_path: Path) -> None:
    model, full = copy.deepcopy(unets[0]), unets[1]
    install_features(model, *unet_table(full, UNET.data()[0], times=[20.0, 300.0]), "timestep")
    with pytest.raises(TdqError, match="not those of the scales"):
        export_onnx(model, tmp_path / "unet.onnx", UNET.data()[0])
    assert not list(tmp_path.iterdir())


def test_a_batch_that_times_cannot_be_matched_with_is_refused() -> None:
    class Odd(Heads):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.plain(sample[:, :3])

    model = Odd().eval()
    install_features(model, make_table({"plain": torch.randn(4, 5)}, ROWS), {}, "timestep")
    call = {"sample": noise(3, 5), "timestep": torch.tensor([1.0, 2.0])}
    with pytest.raises(TdqError, match="cannot be matched"):
        lowered(trace(model, call), "ratio")


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_the_unet_looks_up_what_torch_looks_up(with_features: Any, lowering: str) -> None:
    model, graphs = with_features
    table = feature_table(model)
    names = {name: f"{name}/feature" for name in table.features}
    session = OnnxRuntimeSession(add_outputs(graphs[lowering].proto, list(names.values())))
    assert len(names) == 5
    for time in (0.0, 199.0, 333.0, 500.5, 800.0, 1200.0):
        results = session(_inputs(time))
        for name, output in names.items():
            expected = table.lookup(name, torch.tensor([time])).numpy()
            np.testing.assert_array_equal(results[output], np.repeat(expected, 2, 0))


def test_one_row_serves_scales_and_features(with_features: Any) -> None:
    _, graphs = with_features
    graph = graphs["ratio"].proto.graph
    assert [node.op_type for node in graph.node].count("ReduceSum") == 1
    assert len([node for node in graph.node if "time/row" in node.output]) == 1
    assert {node.output[0] for node in graph.node if "time/row" in node.input} == {"time/table_row", "features/nearest"}


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_codes_of_the_unet_follow_the_definition(with_features: Any, lowering: str) -> None:
    model, graphs = with_features
    compared, mismatched = codes_by_definition(graphs[lowering], model, _inputs(333.0), 333.0)
    assert compared > 10_000
    assert mismatched == 0


def test_lowerings_of_the_unet_agree_in_float64(with_features: Any) -> None:
    _, graphs = with_features
    inputs = {name: value.numpy() for name, value in _inputs(333.0).items()}
    reference, ratio = (run_double(graphs[name].proto, inputs)["output"] for name in LOWERINGS)
    assert np.abs(reference).max() > 0.1
    assert np.abs(ratio - reference).max() < 1e-12


def _sqnr(result: np.ndarray[Any, Any], exact: np.ndarray[Any, Any]) -> float:
    return float(10 * np.log10(np.square(exact).sum() / np.square(result - exact).sum()))


def test_quantization_noise_of_the_unet_is_that_of_torch(unets: Any, with_features: Any) -> None:
    model, graphs = with_features
    found: dict[str, list[float]] = {name: [] for name in ("torch", *LOWERINGS)}
    sessions = {name: OnnxRuntimeSession(graphs[name].proto) for name in LOWERINGS}
    for time in (0.0, 200.0, 400.0, 600.0, 800.0):
        inputs = _inputs(time)
        with torch.no_grad():
            exact = unets[1](**inputs).sample.numpy()
            found["torch"].append(_sqnr(model(**inputs).sample.numpy(), exact))
        for name, session in sessions.items():
            found[name].append(_sqnr(session(inputs)["output"], exact))
    for name in LOWERINGS:
        assert np.abs(np.subtract(found[name], found["torch"])).max() < 0.25
    assert np.mean(found["torch"]) > 15  # 21 dB: every layer of a random model is quantized


def test_openvino_agrees(unets: Any, with_features: Any, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from modelopt_tdq.runtime.sessions.openvino import OpenVinoSession

    _, graphs = with_features
    proto = add_outputs(graphs["ratio"].proto, [f"{name}/feature" for name in graphs["ratio"].context.features])
    onnx.save(proto, tmp_path / "unet.onnx")
    openvino, onnxruntime = OpenVinoSession(tmp_path / "unet.onnx", num_threads=1), OnnxRuntimeSession(proto)
    for time in (0.0, 333.0, 1200.0):
        inputs = _inputs(time)
        found, expected = list(openvino(inputs).values()), list(onnxruntime(inputs).values())
        assert len(found) == len(expected) == 6
        for value, wanted in zip(found[1:], expected[1:], strict=True):
            np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
        with torch.no_grad():
            exact = unets[1](**inputs).sample.numpy()
        assert abs(_sqnr(found[0], exact) - _sqnr(expected[0], exact)) < 0.25


def test_tensorrt_rtx_needs_fewer_kernels(without_features: Lowered, with_features: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    reports = []
    for graph in (without_features, with_features[1]["ratio"]):
        onnx.save(graph.proto, tmp_path / "unet.onnx")
        reports.append(tdq.build_engine(tmp_path / "unet.onnx", tmp_path / "unet.engine"))
        fused = [layer for layer in reports[-1].layers if any("features/" in node for node in layer.onnx_nodes)]
        assert len(fused) == len(reports) - 1  # the whole lookup is one kernel
    assert reports[1].kernels < reports[0].kernels, [report.kernels for report in reports]
