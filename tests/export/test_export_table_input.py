"""The table as an input of the graph: any table of the model, with any number of rows, through one file."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.export import lowered, set_table, trace
from support.models import SMALL_UNET, fast_config
from support.temporal import unet_table
from support.zoo import ROWS, quantized_zoo, sample

import modelopt_tdq as tdq
from modelopt_tdq.core.schedule import row_index
from modelopt_tdq.export import engine_table, plugin_free
from modelopt_tdq.export.onnx_export import lower
from modelopt_tdq.export.read import read_quantization
from modelopt_tdq.export.table_input import EDGES_INPUT, TABLE_INPUT
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession
from modelopt_tdq.temporal_features.runtime import install_features

OTHER_ROWS = [3.0, 77.0, 200.0, 500.0, 600.0, 800.0, 1000.0]
SAME_TENSOR = [f"images.{name}.input_quantizer" for name in ("plain", "padded", "grouped")]


@pytest.fixture(scope="module")
def zoo() -> tuple[Any, Any]:
    model = quantized_zoo()
    return model, trace(model, {"sample": sample(), "timestep": torch.tensor(0.0)})


def with_table_input(zoo: Any) -> onnx.ModelProto:
    model, graph = zoo
    return lowered(graph, "ratio", model, table_input=True).proto


def assert_equal(proto: onnx.ModelProto, zoo: Any, times: list[float]) -> None:
    """The graph with the model's table as input, and the graph that holds it: every output and every code."""
    model, graph = zoo
    constants = OnnxRuntimeSession(lowered(graph, "ratio", model).proto, codes=True)
    session, table = OnnxRuntimeSession(proto, codes=True), engine_table(proto, model)
    for time in [*times, 125.0, 126.0, -5.0, 5000.0]:
        inputs = {"sample": sample(seed=3), "timestep": torch.tensor(time)}
        expected, found = constants(inputs), session({**inputs, **table})
        assert expected.keys() == found.keys()
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=f"{name} at {time}")


@pytest.mark.parametrize(("offset", "dequant"), [(False, False), (True, False), (True, True)])
def test_any_table_through_one_graph(zoo: Any, offset: bool, dequant: bool) -> None:
    model, _ = zoo
    set_table(model, ROWS, offset=offset, dequant=dequant)
    proto = with_table_input(zoo)
    assert_equal(proto, zoo, ROWS)
    # other rows, more of them, and scales far below those of the export: ratios below 1, exact all the same
    set_table(model, OTHER_ROWS, offset=offset, dequant=dequant, seed=5, base=0.002)
    assert (engine_table(proto, model)[TABLE_INPUT] > 0).any()
    assert_equal(proto, zoo, OTHER_ROWS)
    table = set_table(model, [500.0], offset=offset, dequant=dequant, seed=6)
    inputs = engine_table(proto, table)
    assert inputs[TABLE_INPUT].shape[0] == 1
    np.testing.assert_array_equal(inputs[EDGES_INPUT], [np.inf])


def test_inputs_of_the_graph(zoo: Any) -> None:
    model, _ = zoo
    set_table(model, ROWS)
    proto = with_table_input(zoo)
    shapes = OnnxRuntimeSession(proto).shapes
    table = engine_table(proto, model)
    assert shapes[TABLE_INPUT] == ("tdq_rows", table[TABLE_INPUT].shape[1])
    assert shapes[EDGES_INPUT] == ("tdq_rows",)
    assert table[TABLE_INPUT].dtype == table[EDGES_INPUT].dtype == np.float32
    assert engine_table(proto, tdq.scale_table(model)).keys() == table.keys()


def test_scales_that_do_not_move_are_columns_too(zoo: Any) -> None:
    model, _ = zoo
    table = set_table(model, ROWS)
    still = table.scale.clone()
    still[:, 1:] = still[:1, 1:]
    tdq.set_scale_table(model, dataclasses.replace(table, scale=still))
    proto = with_table_input(zoo)
    set_table(model, OTHER_ROWS, seed=7)
    assert_equal(proto, zoo, OTHER_ROWS)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=8, unique=True), st.floats(-2e6, 2e6, width=32))
def test_edges_are_those_of_the_schedule(times: list[float], time: float) -> None:
    timesteps = torch.tensor(sorted(times))
    table = tdq.ScaleTable(timesteps, torch.ones(len(times), 1), ("q",))
    ends = engine_table(_tiny(), table)[EDGES_INPUT]
    row = int((np.float32(time) > ends).sum())
    assert row == int(row_index(torch.tensor([time]), timesteps))


def _tiny(**changes: Any) -> onnx.ModelProto:
    """No graph, but the description of one with quantizer "q"."""
    import json

    column = {"quantity": "ratio", "quantizers": ["q"], "s_ref": 1e-30}
    description = {"schema": 1, "names": ["q"], "columns": [column], "num_bits": {"q": 8}, "zero_has_a_code": []}
    proto = onnx.ModelProto()
    entry = proto.metadata_props.add()
    entry.key, entry.value = "modelopt_tdq.table", json.dumps({**description, **changes})
    return proto


def _table(scale: float = 1.0, offset: float | None = None, name: str = "q", **metadata: Any) -> tdq.ScaleTable:
    shift = None if offset is None else torch.tensor([[offset]])
    return tdq.ScaleTable(torch.tensor([1.0]), torch.tensor([[scale]]), (name,), shift, None, metadata)


@pytest.mark.parametrize(
    ("changes", "table", "message"),
    [
        ({}, _table(name="other"), r"names = \['other'\]: the engine has no such quantizers"),
        ({"names": ["p", "q"]}, _table(), r"names = \['p'\]: the table lacks"),
        ({}, _table(num_bits={"q": 4}), "num_bits = 4: the table was made for this format, but q of the engine has 8"),
        ({}, _table(offset=1.0), "offset = 'q': the engine has no offset"),
        ({}, _table(scale=1e30), "too large for the engine"),
        ({"schema": 2}, _table(), "schema 2"),
    ],
)
def test_tables_that_do_not_fit(changes: dict[str, Any], table: tdq.ScaleTable, message: str) -> None:
    with pytest.raises(tdq.TdqError, match=message):
        engine_table(_tiny(**changes), table)


def test_offset_that_leaves_zero_without_a_code() -> None:
    columns = [{"quantity": name, "quantizers": ["q"]} for name in ("scale", "offset", "dequant_offset")]
    proto = _tiny(columns=columns, zero_has_a_code=["q"])
    found = engine_table(proto, _table(scale=0.5, offset=1.0))
    np.testing.assert_array_equal(found[TABLE_INPUT], [[0.5, 1.0, 1.0]])
    with pytest.raises(tdq.TdqError, match="zero has no code"):
        engine_table(proto, _table(scale=0.5, offset=1.1))


def test_quantizers_of_one_tensor_share_a_column(zoo: Any) -> None:
    model, _ = zoo
    table = set_table(model, ROWS)
    scale = table.scale.clone()
    columns = [table.names.index(name) for name in SAME_TENSOR]
    scale[:, columns] = scale[:, columns[:1]]
    shared = dataclasses.replace(table, scale=scale)
    tdq.set_scale_table(model, shared)
    proto = with_table_input(zoo)
    assert engine_table(proto, shared)[TABLE_INPUT].shape[1] == 2 * len(table.names) - 4
    assert_equal(proto, zoo, ROWS)
    with pytest.raises(tdq.TdqError, match="share a column of the engine, and differ"):
        engine_table(proto, table)


def test_temporal_features_keep_rows_of_their_own() -> None:
    torch.manual_seed(0)
    full = SMALL_UNET.make().eval()
    model = mtq.quantize(copy.deepcopy(full), fast_config(), SMALL_UNET.forward_loop())
    call, times = SMALL_UNET.data()[0], tdq.scale_table(model).timesteps.tolist()
    install_features(model, *unet_table(full, call, "linear", 8, times), "timestep")
    graph = trace(model, call)
    forms = [lowered(graph, "ratio"), lowered(graph, "ratio", table_input=True), lowered(graph, "plugin")]
    assert all(form.context.features for form in forms)
    constants, session = (OnnxRuntimeSession(form.proto, codes=True) for form in forms[:2])
    twin = OnnxRuntimeSession(plugin_free(forms[2].proto), codes=True)
    # the same scales at twice as many rows: half of the table's rows are no rows of the features
    table = tdq.scale_table(model)
    finer = engine_table(forms[1].proto, table.resample([*times, *(np.array(times[:-1]) + 1e-3)]))
    same = engine_table(forms[1].proto, table)
    for time in [*times, 111.0, 450.5, 2000.0]:
        inputs = {**call, "timestep": torch.tensor(time)}
        expected = constants(inputs)
        for found in (session({**inputs, **same}), twin(inputs)):
            for name in expected:
                np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
        found = session({**inputs, **finer})
        assert all(np.isfinite(value).all() for value in found.values())


def test_model_without_a_table_input(zoo: Any) -> None:
    model, graph = zoo
    set_table(model, ROWS)
    with pytest.raises(tdq.TdqError, match=r"its table is no input.*table_input=True"):
        engine_table(lowered(graph, "ratio", model).proto, model)


@pytest.mark.parametrize("lowering", ["reference", "plugin"])
def test_other_lowerings(zoo: Any, lowering: str) -> None:
    set_table(zoo[0], ROWS)
    with pytest.raises(tdq.TdqError, match="has no table input"):
        lower(dataclasses.replace(zoo[1], spec=read_quantization(zoo[0])), lowering, table_input=True)


def test_nothing_depends_on_time(zoo: Any) -> None:
    set_table(zoo[0], [500.0])
    with pytest.raises(tdq.TdqError, match="no scale of this model depends on time"):
        with_table_input(zoo)


def test_tensorrt_rtx_builds_it(zoo: Any, tmp_path: Any) -> None:
    pytest.importorskip("tensorrt_rtx")
    model, graph = zoo
    set_table(model, ROWS)
    reports = []
    for name, proto in {"constant": lowered(graph, "ratio", model).proto, "input": with_table_input(zoo)}.items():
        onnx.save(proto, tmp_path / f"{name}.onnx")
        engine = tmp_path / f"{name}.engine"
        reports.append(tdq.build_engine(tmp_path / f"{name}.onnx", engine, allow_float=True))  # ConvTranspose
    constant, table = (sum(map(r.low_precision, r.quantized)) for r in reports)
    assert constant == table > 10
    # for the whole engine: a count over an open number of rows, and its sizes on the host
    assert reports[1].kernels - reports[0].kernels <= 4
