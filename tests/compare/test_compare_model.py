import copy
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from support.models import FAMILIES, TinyDenoiser, quantized

import modelopt_tdq as tdq
from modelopt_tdq.fake_quant import quantize

pytest.importorskip("onnxruntime")
pytest.importorskip("polygraphy")

from polygraphy.comparator import Comparator

from modelopt_tdq.compare import StepComparator, compare_model, render, session_runner, torch_runner
from modelopt_tdq.compare.runners import OUTPUT, call_model
from modelopt_tdq.export import export_onnx
from modelopt_tdq.runtime.onnxruntime import OnnxRuntimeSession

DATA = FAMILIES["plain"].data()
FEEDS = [{name: tensor.numpy() for name, tensor in call.items()} for call in DATA]


def text(comparison: object) -> str:
    console = Console(file=StringIO(), width=160)
    console.print(render(comparison))
    return console.file.getvalue()


@pytest.fixture(scope="module")
def model() -> TinyDenoiser:
    torch.manual_seed(0)
    return quantized()


@pytest.fixture(scope="module")
def graphs(model: TinyDenoiser, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("graphs")
    return {form: export_onnx(model, folder / f"{form}.onnx", DATA[0], lowering=form).path for form in LOWERINGS}


LOWERINGS = ("reference", "ratio")


def faulty(model: TinyDenoiser, row: int, column: int, factor: float, folder: Path) -> tuple[str, Path]:
    """The lowered graph of a model with one wrong entry in its table; and the quantizer it belongs to."""
    table = tdq.scale_table(model)
    scale = table.scale.clone()
    scale[row, column] *= factor
    wrong = copy.deepcopy(model)
    tdq.set_scale_table(wrong, tdq.ScaleTable(table.timesteps, scale, table.names, table.offset))
    return table.names[column], export_onnx(wrong, folder / "faulty.onnx", DATA[0]).path


def test_all_backends_agree_with_the_reference(model: TinyDenoiser, graphs: dict[str, Path]) -> None:
    pytest.importorskip("openvino")
    comparison = compare_model(
        model, DATA, reference_path=graphs["reference"], ratio_path=graphs["ratio"], progress=False
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
    model: TinyDenoiser, graphs: dict[str, Path], tmp_path: Path
) -> None:
    for column in (0, 2):
        name, path = faulty(model, 2, column, 1.02, tmp_path)  # row 2 is time 600
        comparison = compare_model(
            model,
            DATA,
            backends=["onnxruntime"],
            reference_path=graphs["reference"],
            ratio_path=path,
            progress=False,
        )
        assert not comparison.passed
        assert comparison.faults[0].difference.name == name
        assert {fault.time for fault in comparison.faults} == {600.0}
    shown = text(comparison)
    assert name in shown
    assert "FAILED" in shown


def test_a_wrong_row_is_worse_than_the_quantization_noise(
    model: TinyDenoiser, graphs: dict[str, Path], tmp_path: Path
) -> None:
    table = tdq.scale_table(model)
    scale = table.scale.clone()
    scale[1] *= 4
    wrong = copy.deepcopy(model)
    tdq.set_scale_table(wrong, tdq.ScaleTable(table.timesteps, scale, table.names))
    path = export_onnx(wrong, tmp_path / "wrong.onnx", DATA[0]).path
    comparison = compare_model(
        model,
        DATA,
        backends=["onnxruntime"],
        layers=False,
        reference_path=graphs["reference"],
        ratio_path=path,
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


def test_attention_and_times_per_sample() -> None:
    family = FAMILIES["unet"]
    model = quantized(family.make().eval(), [tuple(call.values()) for call in family.data()])
    data = [{**call, "timestep": torch.stack([call["timestep"], torch.tensor(20.0)])} for call in family.data()]
    comparison = compare_model(model, data[:2], backends=["torch", "onnxruntime"], progress=False)
    assert comparison.passed


def test_the_torch_runner_returns_codes_of_the_definition(model: TinyDenoiser) -> None:
    seen = {}
    handle = model.conv2.input_quantizer.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    results = call_model(model, FEEDS[1], codes=True)
    handle.remove()
    table = tdq.scale_table(model)
    scale = table.scale[2, table.names.index("conv2.input_quantizer")]  # time 600
    expected = quantize(seen["x"], scale, None, 8).numpy()
    np.testing.assert_array_equal(results["conv2.input_quantizer/codes"], expected)
    zero = {"conv2.input_quantizer/codes": np.zeros_like(expected)}
    given = call_model(model, FEEDS[1], codes=True, given=zero)
    np.testing.assert_array_equal(given["conv2.input_quantizer/codes"], expected)
    assert not np.array_equal(given[OUTPUT], results[OUTPUT])
    assert not model.conv2.input_quantizer._forward_hooks


def test_runners_and_comparison_work_inside_polygraphy(model: TinyDenoiser, graphs: dict[str, Path]) -> None:
    reference = session_runner("reference", OnnxRuntimeSession(graphs["reference"], codes=True), FEEDS[0])
    ours = torch_runner(model, FEEDS[0], codes=True)
    results = Comparator.run([reference, ours], data_loader=FEEDS)
    exact = [call_model(_unquantized(model), feed)[OUTPUT] for feed in FEEDS]
    accuracy = Comparator.compare_accuracy(results, compare_func=StepComparator(exact))
    assert bool(accuracy)
    outputs = [dict(step) for step in results["torch"]]
    assert set(outputs[0]) >= {OUTPUT, "conv2.input_quantizer/codes"}
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
