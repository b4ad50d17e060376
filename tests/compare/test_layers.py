from pathlib import Path

import numpy as np
import onnx
import pytest
from support.models import FAMILIES, quantized

import modelopt_tdq as tdq
from modelopt_tdq.compare.layers import codes_by_quantizer, given_codes, returning_codes, with_given_codes
from modelopt_tdq.export import export_onnx
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession

DATA = FAMILIES["plain"].data()
FEED = {name: tensor.numpy() for name, tensor in DATA[0].items()}
LAYERS = [f"{layer}.input_quantizer" for layer in ("conv1", "mix", "conv2")]


@pytest.mark.parametrize("bits", [8, (4, 3)], ids=["int8", "fp8"])
def test_a_layer_sees_the_given_codes_and_answers_with_its_own(tmp_path: Path, bits: object) -> None:
    path = export_onnx(quantized(weight_bits=bits, activation_bits=bits), tmp_path / "m.onnx", DATA[0]).path
    graph = onnx.load(path)
    results = OnnxRuntimeSession(returning_codes(graph))(FEED)
    own = codes_by_quantizer(results.items())
    assert list(own) == LAYERS
    assert {codes.fp8 for codes in own.values()} == {bits == (4, 3)}
    assert all(codes.values.dtype == np.float32 for codes in own.values())
    assert len(np.unique(own[LAYERS[0]].values)) > 50
    cut = with_given_codes(graph, graph)
    onnx.checker.check_model(cut, full_check=True)
    session = OnnxRuntimeSession(cut)
    assert session.shapes[f"{LAYERS[0]}/codes:given"] == (2, 8, 8, 8)

    given = given_codes(results)
    same = session({**FEED, **given})
    assert set(same) == set(results)
    for name in same:
        np.testing.assert_array_equal(same[name], results[name])
    zeros = {f"{LAYERS[1]}/codes:given": np.zeros_like(own[LAYERS[1]].values)}
    changed = codes_by_quantizer(session({**FEED, **given, **zeros}).items())
    np.testing.assert_array_equal(changed[LAYERS[0]].values, own[LAYERS[0]].values)
    np.testing.assert_array_equal(changed[LAYERS[1]].values, own[LAYERS[1]].values)
    assert not np.array_equal(changed[LAYERS[2]].values, own[LAYERS[2]].values)
    assert len(graph.graph.input) == 2  # the original is untouched


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, onnx.ModelProto]:
    """Both lowerings of a model whose layers have offsets, and so pad explicitly."""
    model, folder = quantized(asymmetric=True), tmp_path_factory.mktemp("padded")
    files = {lowering: folder / f"{lowering}.onnx" for lowering in ("reference", "ratio")}
    export_onnx(model, files["ratio"], DATA[0], reference_path=files["reference"])
    return {lowering: onnx.load(file) for lowering, file in files.items()}


def test_a_layer_that_pads_keeps_its_own_border(padded: dict[str, onnx.ModelProto]) -> None:
    reference = OnnxRuntimeSession(returning_codes(padded["reference"]))(FEED)
    plain = OnnxRuntimeSession(returning_codes(padded["ratio"]))(FEED)
    codes = f"{LAYERS[2]}/codes:int8"
    assert (reference[codes].shape, plain[codes].shape) == ((2, 8, 8, 8), (2, 8, 10, 10))
    assert np.abs(plain[codes][0, 0, 0]).min() > 0  # the code of zero, which is not zero
    session = OnnxRuntimeSession(with_given_codes(padded["ratio"], padded["reference"]))
    answer = session({**FEED, **given_codes(reference)})
    np.testing.assert_array_equal(answer[codes], plain[codes])
    np.testing.assert_allclose(answer["output"], reference["output"], rtol=0, atol=1e-6)


def test_codes_that_only_one_of_the_graphs_has_are_not_given(tmp_path: Path) -> None:
    graph = onnx.load(export_onnx(quantized(), tmp_path / "m.onnx", DATA[0]).path)
    other = onnx.ModelProto.FromString(
        graph.SerializeToString().replace(b"mix.input_quantizer", b"mix.input_quantized")
    )
    session = OnnxRuntimeSession(with_given_codes(graph, other))
    assert set(session.inputs) == {*FEED, f"{LAYERS[0]}/codes:given", f"{LAYERS[2]}/codes:given"}
    results = OnnxRuntimeSession(returning_codes(other))(FEED)
    given = {name: codes for name, codes in given_codes(results).items() if name in session.inputs}
    answer = session({**FEED, **given})
    assert list(codes_by_quantizer(answer.items())) == [LAYERS[0], LAYERS[2]]
    np.testing.assert_array_equal(answer["output"], results["output"])


def test_graphs_of_different_models(tmp_path: Path) -> None:
    graph = onnx.load(export_onnx(quantized(), tmp_path / "m.onnx", DATA[0]).path)
    other = onnx.ModelProto.FromString(graph.SerializeToString().replace(b"input_quantizer", b"input_quantized"))
    with pytest.raises(tdq.TdqError, match="no quantizer in common with the reference"):
        with_given_codes(graph, other)


def test_given_codes_leave_tensorrt_its_low_precision_kernels(
    padded: dict[str, onnx.ModelProto], tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    onnx.save(with_given_codes(padded["ratio"], padded["reference"]), tmp_path / "layers.onnx")
    report = tdq.build_engine(tmp_path / "layers.onnx", tmp_path / "layers.engine", compute_capabilities=("8.9",))
    assert [report.low_precision(layer) for layer in report.quantized] == [True] * len(LAYERS)
