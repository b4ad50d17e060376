import copy
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from rich.console import Console
from support.export import lowered, trace
from support.models import FAMILIES, SMALL_UNET, TIMES, TinyDenoiser, quantized

import modelopt_tdq as tdq
from modelopt_tdq.core.fake_quant import quantize

pytest.importorskip("onnxruntime")
pytest.importorskip("polygraphy")

from polygraphy.comparator import Comparator

from modelopt_tdq.compare import (
    COMPARED,
    WITHOUT_ENGINE,
    ComparedBackend,
    PrintedComparator,
    StepComparator,
    compare_model,
    render,
    returning_codes,
    session_runner,
    torch_runner,
)
from modelopt_tdq.compare.runners import call_model
from modelopt_tdq.export import export_onnx
from modelopt_tdq.export.onnx_export import MarkerGraph
from modelopt_tdq.export.outputs import OUTPUT
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession

DATA = FAMILIES["plain"].data()
FEEDS = [{name: tensor.numpy() for name, tensor in call.items()} for call in DATA]


def text(comparison: object) -> str:
    console = Console(file=StringIO(), width=160)
    console.print(render(comparison))
    return console.file.getvalue()


LOWERINGS = ("reference", "ratio")


@pytest.fixture(scope="module")
def model() -> TinyDenoiser:
    torch.manual_seed(0)
    return quantized()


@pytest.fixture(scope="module")
def traced(model: TinyDenoiser) -> MarkerGraph:
    return trace(model, DATA[0])


@pytest.fixture(scope="module")
def graphs(model: TinyDenoiser, traced: MarkerGraph, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return written(model, traced, tmp_path_factory.mktemp("graphs"))


def written(model: TinyDenoiser, traced: MarkerGraph, folder: Path) -> dict[str, Path]:
    """Both lowerings as files."""
    for form in LOWERINGS:
        onnx.save(lowered(traced, form, model).proto, folder / f"{form}.onnx")
    return {form: folder / f"{form}.onnx" for form in LOWERINGS}


def faulty(
    model: TinyDenoiser, traced: MarkerGraph, row: int, column: Any, factor: float, folder: Path
) -> tuple[Any, Path]:
    """The lowered graph of a model with one wrong entry in its table; and the quantizer it belongs to."""
    table = tdq.scale_table(model)
    scale = table.scale.clone()
    scale[row, column] *= factor
    tdq.set_scale_table(model, tdq.ScaleTable(table.timesteps, scale, table.names, table.offset))
    try:
        onnx.save(lowered(traced, "ratio", model).proto, folder / "faulty.onnx")
    finally:
        tdq.set_scale_table(model, table)
    return table.names[column], folder / "faulty.onnx"


@pytest.mark.parametrize(("rounding", "noted"), [("nearest", 0), ("compensated", 1)])
def test_tells_of_weights_that_full_precision_has_rounded_as_well(rounding: str, noted: int) -> None:
    model = quantized(weight_bits=4, rounding=rounding)
    comparison = compare_model(model, DATA[:1], backends=["torch"], layers=False, progress=False)
    assert sum("3 weights are the values of their codes" in note for note in comparison.notes) == noted


def test_all_backends_agree_with_the_reference(model: TinyDenoiser, graphs: dict[str, Path]) -> None:
    pytest.importorskip("openvino")
    comparison = compare_model(
        model, DATA, reference_path=graphs["reference"], lowered_path=graphs["ratio"], progress=False
    )
    assert comparison.passed
    assert [(s.backend, s.time) for s in comparison.steps[:4]] == [
        ("torch", 900.0),
        ("onnxruntime", 900.0),
        ("openvino", 900.0),
        ("torch", 600.0),
    ]
    assert len(comparison.steps) == 3 * len(DATA)
    assert set(comparison.compared_codes) == {"torch", "onnxruntime"}
    layers = len(tdq.scale_table(model).names)
    assert layers == 3
    per_step = layers * 2 * 8 * 8 * 8  # [2, 8, 8, 8] each
    assert comparison.compared_codes["onnxruntime"] == per_step * len(DATA)
    assert "passed" in text(comparison)


def test_a_wrong_entry_of_the_table_is_found_with_its_layer_and_time(
    model: TinyDenoiser, traced: MarkerGraph, graphs: dict[str, Path], tmp_path: Path
) -> None:
    for column in (0, 2):
        name, path = faulty(model, traced, 2, column, 1.02, tmp_path)  # row 2 is time 600
        comparison = compare_model(
            model,
            DATA,
            backends=["onnxruntime"],
            reference_path=graphs["reference"],
            lowered_path=path,
            progress=False,
        )
        assert not comparison.passed
        assert comparison.faults[0].name == name
        assert {fault.time for fault in comparison.faults} == {600.0}
    shown = text(comparison)
    assert f"First faulty layer: {name} in onnxruntime, at time 600 (step 1): " in shown
    assert "Allowed: " in shown
    assert shown.rstrip().endswith("FAILED")


@pytest.mark.parametrize("bits", [8, (4, 3)], ids=["int8", "fp8"])
def test_a_wrong_scale_is_found_in_any_layer_at_any_time(tmp_path: Path, bits: object) -> None:
    model = quantized(weight_bits=bits, activation_bits=bits)
    traced = trace(model, DATA[0])
    reference = written(model, traced, tmp_path)["reference"]
    for row, column, factor in ((0, 0, 1.01), (3, 1, 0.95), (1, 2, 2.0)):
        name, path = faulty(model, traced, row, column, factor, tmp_path)
        comparison = compare_model(
            model, DATA, backends=["onnxruntime"], reference_path=reference, lowered_path=path, progress=False
        )
        assert comparison.faults[0].name == name
        assert {fault.time for fault in comparison.faults} == {sorted(TIMES)[row]}


def test_a_wrong_scale_behind_the_last_codes_is_found_in_the_output(
    model: TinyDenoiser, traced: MarkerGraph, graphs: dict[str, Path], tmp_path: Path
) -> None:
    table = tdq.scale_table(model)
    dequant = table.scale.clone()
    dequant[1, table.names.index("conv2.input_quantizer")] *= 1.01
    wrong = copy.deepcopy(model)
    tdq.set_scale_table(wrong, tdq.ScaleTable(table.timesteps, table.scale, table.names, None, dequant))
    path = tmp_path / "wrong.onnx"
    onnx.save(lowered(traced, "ratio", wrong).proto, path)
    comparison = compare_model(
        model,
        DATA,
        backends=["onnxruntime"],
        reference_path=graphs["reference"],
        lowered_path=path,
        progress=False,
    )
    assert all(step.difference for step in comparison.steps)  # less than the quantization noise
    assert [(fault.name, fault.time) for fault in comparison.faults] == [(OUTPUT, 300.0)]
    assert not comparison.passed
    assert "First faulty layer: output in onnxruntime, at time 300 (step 2): difference 4" in text(comparison)


def test_the_twin_of_a_graph_with_the_plugin(
    model: TinyDenoiser, traced: MarkerGraph, graphs: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "plugin.onnx"
    onnx.save(lowered(traced, "plugin", model).proto, path)
    comparison = compare_model(
        model,
        DATA[:1],
        backends=["onnxruntime"],
        reference_path=graphs["reference"],
        lowered_path=path,
        progress=False,
    )
    assert comparison.passed
    assert comparison.compared_codes["onnxruntime"] > 0
    assert "plugin.onnx needs the TensorRT plugin: its plugin-free twin was run" in text(comparison)
    assert [file.name for file in tmp_path.iterdir()] == ["plugin.onnx"]


def test_a_quantizer_that_a_graph_lacks_is_named(model: TinyDenoiser, graphs: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "other.onnx"
    path.write_bytes(graphs["ratio"].read_bytes().replace(b"mix.input_quantizer", b"mix.input_quantized"))
    comparison = compare_model(
        model,
        DATA[:1],
        backends=["onnxruntime"],
        reference_path=graphs["reference"],
        lowered_path=path,
        progress=False,
    )
    assert "onnxruntime: the codes of mix.input_quantizer were not compared" in text(comparison)
    assert comparison.passed


def test_a_table_that_is_an_input_gets_the_models(model: TinyDenoiser, graphs: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    path = export_onnx(model, tmp_path / "table.onnx", DATA[0], table_input=True).path
    backends = ["onnxruntime", "openvino"]
    files = {"reference_path": graphs["reference"], "lowered_path": path}
    assert compare_model(model, DATA, backends=backends, progress=False, **files).passed
    table = tdq.scale_table(model)
    scale = table.scale.clone()
    scale[2, 1] *= 1.05
    wrong = copy.deepcopy(model)  # its torch side is judged by the reference, whose table is another
    tdq.set_scale_table(wrong, tdq.ScaleTable(table.timesteps, scale, table.names))
    comparison = compare_model(wrong, DATA, backends=backends, progress=False, **files)
    assert (comparison.faults[0].name, comparison.faults[0].time) == (table.names[1], 600.0)


def test_a_backend_is_a_line_in_a_mapping(
    model: TinyDenoiser,
    traced: MarkerGraph,
    graphs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, path = faulty(model, traced, 2, slice(None), 4.0, tmp_path)
    backend = ComparedBackend(OnnxRuntimeSession, layers=False)
    monkeypatch.setattr("modelopt_tdq.compare.model.COMPARED", {**COMPARED, "another": backend})
    comparison = compare_model(
        model,
        DATA,
        backends=["onnxruntime", "another"],
        lowered_path=graphs["ratio"],
        files={"another": path},
        progress=False,
    )
    assert {(step.backend, step.time) for step in comparison.steps if not step.difference} == {("another", 600.0)}
    assert set(comparison.compared_codes) == {"onnxruntime"}
    needs_one = ComparedBackend(OnnxRuntimeSession, layers=False, engine=True)
    monkeypatch.setattr("modelopt_tdq.compare.model.COMPARED", {**COMPARED, "another": needs_one})
    with pytest.raises(tdq.TdqError, match="another runs an engine"):
        compare_model(model, DATA, backends=["another"], files={"openvino": path})


def test_providers_of_onnx_runtime(model: TinyDenoiser, graphs: dict[str, Path]) -> None:
    """One that is there, and one that is not: what was found is kept, and what to install is said."""
    backends = ["onnxruntime:cpu", "onnxruntime:tensorrt_rtx"]
    comparison = compare_model(model, DATA, backends=backends, lowered_path=graphs["ratio"], progress=False)
    assert {step.backend for step in comparison.steps} == {"onnxruntime:cpu"}
    assert all(step.difference for step in comparison.steps)
    (failure,) = comparison.failures
    assert failure.backend == "onnxruntime:tensorrt_rtx"
    assert "onnxruntime-rtx" in str(failure.error)
    assert not set(WITHOUT_ENGINE) & set(backends)
    with pytest.raises(tdq.TdqError, match=r"not known.*onnxruntime:cuda"):
        compare_model(model, DATA, backends=["onnxruntime:metal"])


def test_what_is_printed_in_polygraphy(capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    exact = list(rng.normal(size=(2, 100)))
    references = [
        {"output": a + 0.01 * rng.normal(size=100), "a/codes:int8": np.zeros(1000), "b/codes:int8": np.zeros(1000)}
        for a in exact
    ]
    wrong = {**references[1], "b/codes:int8": np.ones(1000)}
    compare = PrintedComparator(exact, [900.0, 0.5])
    assert all(compare(references[0], references[0]).values())
    assert [bool(v) for v in compare(references[1], wrong).values()] == [True, True, False]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Allowed: ")
    assert lines[1].startswith("step 0, time 900 | passed | output: difference ")
    assert lines[2] == "step 0, time 900 | 2 layers, 0 faulty: 0 of 2000 codes differ"
    assert lines[4:] == [
        "step 1, time 0.5 | FAILED | b: 1000 of 1000 codes differ, by 1 step at most (allowed: 3, by 1 step)",
        "FIRST FAULTY LAYER: b, step 1, time 0.5",
        "step 1, time 0.5 | 2 layers, 1 faulty: 1000 of 2000 codes differ",
    ]


def test_a_wrong_row_is_worse_than_the_quantization_noise(
    model: TinyDenoiser, traced: MarkerGraph, graphs: dict[str, Path], tmp_path: Path
) -> None:
    _, path = faulty(model, traced, 1, slice(None), 4.0, tmp_path)
    comparison = compare_model(
        model,
        DATA,
        backends=["onnxruntime"],
        layers=False,
        reference_path=graphs["reference"],
        lowered_path=path,
        progress=False,
    )
    assert {step.time for step in comparison.steps if not step.difference} == {300.0}
    assert not comparison.faults
    assert not comparison.passed


@pytest.mark.parametrize("fields", [{"asymmetric": True}, {"bits": (4, 3)}, {"bits": 4}], ids=["offset", "fp8", "int4"])
def test_offsets_fp8_and_four_bits(fields: dict[str, object]) -> None:
    bits = fields.pop("bits", 8)
    model = quantized(weight_bits=8 if bits == 4 else bits, activation_bits=bits, **fields)
    comparison = compare_model(model, DATA[:2], backends=["torch", "onnxruntime"], progress=False)
    assert comparison.passed
    assert comparison.compared_codes["torch"] == comparison.compared_codes["onnxruntime"] > 0


def test_attention_and_times_per_sample(tmp_path: Path) -> None:
    calls = SMALL_UNET.data()
    model = quantized(SMALL_UNET.make().eval(), [tuple(call.values()) for call in calls])
    data = [{**call, "timestep": torch.stack([call["timestep"], torch.tensor(20.0)])} for call in calls]
    files = written(model, trace(model, data[0]), tmp_path)
    comparison = compare_model(
        model,
        data[:2],
        backends=["torch", "onnxruntime"],
        reference_path=files["reference"],
        lowered_path=files["ratio"],
        progress=False,
    )
    assert comparison.passed


def test_the_torch_runner_returns_codes_of_the_definition(model: TinyDenoiser) -> None:
    seen = {}
    handle = model.conv2.input_quantizer.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    results = call_model(model, FEEDS[1], codes=True)
    handle.remove()
    table = tdq.scale_table(model)
    scale = table.scale[2, table.names.index("conv2.input_quantizer")]  # time 600
    expected = quantize(seen["x"], scale, None, 8).numpy()
    np.testing.assert_array_equal(results["conv2.input_quantizer/codes:int8"], expected)
    zero = {"conv2.input_quantizer/codes:given": np.zeros_like(expected)}
    given = call_model(model, FEEDS[1], codes=True, given=zero)
    np.testing.assert_array_equal(given["conv2.input_quantizer/codes:int8"], expected)
    assert not np.array_equal(given[OUTPUT], results[OUTPUT])
    assert not model.conv2.input_quantizer._forward_hooks


def test_runners_and_comparison_work_inside_polygraphy(model: TinyDenoiser, graphs: dict[str, Path]) -> None:
    session = OnnxRuntimeSession(returning_codes(onnx.load(graphs["reference"])))
    reference = session_runner("reference", session, FEEDS[0])
    ours = torch_runner(model, FEEDS[0], codes=True)
    results = Comparator.run([reference, ours], data_loader=FEEDS)
    exact = [call_model(_unquantized(model), feed)[OUTPUT] for feed in FEEDS]
    accuracy = Comparator.compare_accuracy(results, compare_func=StepComparator(exact))
    assert bool(accuracy)
    outputs = [dict(step) for step in results["torch"]]
    assert set(outputs[0]) >= {OUTPUT, "conv2.input_quantizer/codes:int8"}
    outputs[2][OUTPUT] = outputs[2][OUTPUT] * 1.3
    worse = StepComparator(exact)(results["reference"][2], outputs[2])
    assert not worse[OUTPUT]
    assert all(worse[name] for name in worse if name != OUTPUT)


def _unquantized(model: TinyDenoiser) -> TinyDenoiser:
    plain = TinyDenoiser().eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "quantizer" not in k})
    return plain


def test_the_step_is_found_by_its_full_precision_output() -> None:
    exact = [np.random.default_rng(k).normal(size=(2, 3)) for k in range(5)]
    comparator = StepComparator(exact)
    assert [comparator.step(e * 1.05) for e in exact] == [0, 1, 2, 3, 4]
    with pytest.raises(tdq.TdqError, match="not near the full-precision output of any step"):
        comparator.step(np.random.default_rng(9).normal(size=(2, 3)) * 2)
    with pytest.raises(tdq.TdqError, match="not near"):
        comparator.step(exact[0][:1])
    with pytest.raises(tdq.TdqError, match="one of the results lacks it"):
        comparator({"output": exact[0]}, {"other": exact[0]})


def test_what_cannot_be_compared(model: TinyDenoiser) -> None:
    with pytest.raises(tdq.TdqError, match="Use some of torch, onnxruntime, openvino"):
        compare_model(model, DATA, backends=["tensorflow"])
    with pytest.raises(tdq.TdqError, match="one call per time step"):
        compare_model(model, [])


def test_a_model_in_bfloat16_is_refused_by_name(model: TinyDenoiser) -> None:
    inputs = {**DATA[0], "sample": DATA[0]["sample"].bfloat16()}
    with pytest.raises(tdq.TdqError, match="nothing in bfloat16") as error:
        compare_model(model, [inputs])
    assert error.value.value == "sample"
