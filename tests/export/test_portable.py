"""Exported graphs in ONNX Runtime at all its optimization levels, and behind graph simplifiers: the same numbers."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from support.denoisers import ATTENTION_PRODUCTS, one_row, quantized_denoiser
from support.export import LOWERINGS, lowered, trace
from support.models import TIMES, fast_config, noise, quantized
from support.noise import SAME, Expected, expected
from support.slow import slow_but
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.export.graph import GraphEditor
from modelopt_tdq.export.portable import portable
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession

LEVELS: tuple[Any, ...] = ("none", "basic", "extended", "all")

#: Levels that differ from "none"; "all" adds only layouts of convolutions to "extended".
OPTIMIZED: tuple[Any, ...] = ("basic", "all")

FP8 = (4, 3)


@dataclass(frozen=True)
class Case:
    """One graph, and what torch says."""

    proto: onnx.ModelProto
    inputs: dict[str, Any]
    expected: Expected

    def error(self, level: Any, proto: onnx.ModelProto | None = None) -> float:
        """Distance from torch, in quantization noise."""
        session = OnnxRuntimeSession(self.proto if proto is None else proto, optimization=level, num_threads=1)
        return self.expected.error(list(session({name: self.inputs[name] for name in session.inputs}).values()))

    def errors(self, levels: tuple[Any, ...] = LEVELS) -> dict[str, float]:
        """By level."""
        return {level: self.error(level) for level in levels}


def cases(model: nn.Module, inputs: dict[str, Any]) -> dict[tuple[str, str], Case]:
    """Both lowerings of a model whose scales depend on time, and of the same model with one row."""
    graph = trace(model, inputs)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    found = {(low, "over time"): lowered(graph, low, model).proto for low in LOWERINGS}
    results = {"over time": expected(model, inputs)}
    with one_row(model):
        found |= {(low, "static"): lowered(graph, low, model).proto for low in LOWERINGS}
        results["static"] = expected(model, inputs)
    return {key: Case(proto, tensors, results[key[1]]) for key, proto in found.items()}


def attention_too(config: dict[str, Any]) -> dict[str, Any]:
    """``config``, with the products of attention."""
    rules = [{"quantizer_name": rule, "cfg": {"num_bits": 8, "axis": None}} for rule in ATTENTION_PRODUCTS]
    return {**config, "quant_cfg": [*config["quant_cfg"], *rules]}


@pytest.fixture(scope="module", params=slow_but(("dit", "sd3"), "sd3"))
def family(request: pytest.FixtureRequest) -> dict[tuple[str, str], Case]:
    denoiser = quantized_denoiser(request.param, attention=request.param == "sd3")
    return cases(denoiser.model, denoiser.inputs)


@pytest.mark.parametrize("scales", ["over time", "static"])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_numbers_at_every_level(family: Any, lowering: str, scales: str) -> None:
    errors = family[lowering, scales].errors()
    assert max(errors.values()) < SAME, errors


@pytest.mark.parametrize("simplifier", ["onnxslim", "onnxsim"])
def test_numbers_behind_a_simplifier(family: Any, simplifier: str) -> None:
    module = pytest.importorskip(simplifier)
    for key, case in family.items():
        simplified = module.slim(case.proto) if simplifier == "onnxslim" else module.simplify(case.proto)[0]
        assert case.error("all", simplified) < SAME, key


@pytest.mark.parametrize("threads", [1, 2])
def test_numbers_in_openvino(family: Any, threads: int, tmp_path: Path) -> None:
    """Of the reference lowering, too, which OpenVINO would compute with activations that it quantizes itself."""
    pytest.importorskip("openvino")
    from modelopt_tdq.runtime.sessions.openvino import OpenVinoSession

    for key, case in family.items():
        onnx.save(case.proto, tmp_path / "m.onnx")
        session = OpenVinoSession(tmp_path / "m.onnx", num_threads=threads)
        found = session({name: case.inputs[name] for name in session.inputs})
        assert case.expected.error(list(found.values())) < SAME, key


class Chains(nn.Module):
    """Chains of layers whose results are quantized again, with nothing or a ReLU in between; one output per chain."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(layers)]
        self.images = nn.ModuleDict(
            {
                "conv": nn.Sequential(*convolutions),
                "bare": nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(layers))),
                "relu": nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()) for _ in range(layers))),
                "transposed": nn.Sequential(*(nn.ConvTranspose2d(8, 8, 1) for _ in range(layers))),
            }
        )
        self.matrices = nn.ModuleDict(
            {
                "linear": nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers))),
                "bare": nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(layers))),
                "relu": nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(layers))),
            }
        )

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        tokens = sample.flatten(2).transpose(1, 2)
        vectors = sample.permute(0, 2, 3, 1).reshape(-1, 8)
        images = [chain(sample) for chain in self.images.values()]
        return (*images, *(chain(value) for chain in self.matrices.values() for value in (tokens, vectors)))


@pytest.mark.parametrize("bits", [8, 4, FP8], ids=str)
def test_layers_whose_results_are_quantized_again(bits: Any) -> None:
    """At "basic" already, ONNX Runtime rounds their biases, which flips one code in a few hundred."""
    torch.manual_seed(0)
    model, sample = Chains().eval(), noise(4, 8, 12, 12)
    config = fast_config(weight_bits=bits, activation_bits=bits, high_precision=())
    mtq.quantize(model, config, lambda m: [m(sample * s, torch.tensor(t)) for s, t in ((1.0, 0.0), (3.0, 9.0))])
    for key, case in cases(model, {"sample": sample, "timestep": torch.tensor(0.0)}).items():
        errors = case.errors(("none", "basic"))
        if key[1] == "static" and bits == FP8 and tuple(map(int, ort.__version__.split(".")[:2])) < (1, 32):
            with pytest.raises(tdq.TdqError, match=r"1\.32.*FP8"):
                case.error("all")
        else:
            errors["all"] = case.error("all")
        assert max(errors.values()) < SAME, (key, errors)


@pytest.mark.parametrize("operand", ["weight", "input"])
def test_layers_with_one_quantized_operand(operand: str) -> None:
    """ONNX Runtime quantizes the other one as well: weights from "basic" on, activations from "extended" on."""
    torch.manual_seed(0)
    model, sample = Chains().eval(), noise(4, 8, 12, 12)
    rules = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": f"*{operand}_quantizer", "cfg": {"num_bits": 8, "axis": None}},
    ]
    if operand == "weight":  # of some, a scale per channel
        rules.append({"quantizer_name": "*relu*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}})
    inputs = {"sample": sample, "timestep": torch.tensor(0.0)}
    mtq.quantize(model, {"quant_cfg": rules, "algorithm": "max"}, lambda m: m(**inputs))
    graph = trace(model, inputs)
    for lowering in LOWERINGS:
        case = Case(lowered(graph, lowering).proto, inputs, expected(model, inputs))
        errors = case.errors(("none", *OPTIMIZED))
        assert max(errors.values()) < SAME, (lowering, errors)


class Attention(nn.Module):
    """Products of activations that are moved around between their quantizers and the product; weights of 4 bits."""

    def __init__(self) -> None:
        from diffusers.models.attention_processor import Attention

        super().__init__()
        self.attention = Attention(16, heads=2, dim_head=8)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        out: Tensor = self.attention(sample)
        return out


@pytest.mark.parametrize("pack", ["none", "cast", "direct"])
def test_opset_of_packed_weights(pack: Any, tmp_path: Path) -> None:
    """Only the opset from 21 on has INT4, and ONNX Runtime refuses what it makes of codes that are moved around."""
    config = attention_too(fast_config(weight_bits=4, activation_bits=8, high_precision=()))
    inputs = {"sample": noise(2, 12, 16), "timestep": torch.tensor(0.0)}

    def forward_loop(model: nn.Module) -> None:
        for time in (0.0, 9.0):
            model(inputs["sample"], torch.tensor(time))

    model = mtq.quantize(Attention().eval(), config, forward_loop)
    path = tdq.export_onnx(model, tmp_path / "m.onnx", inputs, pack_weights=pack).path
    proto = onnx.load(path)
    assert [entry.version for entry in proto.opset_import] == [20 if pack == "none" else 21]
    errors = Case(proto, inputs, expected(model, inputs)).errors()
    assert max(errors.values()) < SAME, errors


class Rows(nn.Module):
    """Layers in a row, of vectors: as those that make modulations of a transformer from the embedded time."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        widths = (96, 8, 12, 24)
        layers = [nn.Linear(a, b, bias=bias) for a, b in itertools.pairwise(widths)]
        self.layers = nn.Sequential(layers[0], layers[1], nn.GELU(), layers[2])

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        out: Tensor = self.layers(sample)
        return out


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_layers_in_a_row_in_openvino(bias: bool, rows: int, tmp_path: Path) -> None:
    """OpenVINO makes one kernel of them, which returns garbage or finds no registers, where a thread has few rows."""
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    model, sample = Rows(bias).eval(), noise(rows, 96)
    config = fast_config(high_precision=())
    mtq.quantize(model, config, lambda m: [m(sample * s, torch.tensor(t)) for s, t in ((1.0, 0.0), (3.0, 9.0))])
    for key, case in cases(model, {"sample": sample, "timestep": torch.tensor(0.0)}).items():
        onnx.save(case.proto, tmp_path / "m.onnx")
        assert max(case.errors(("none", *OPTIMIZED)).values()) < SAME, key
        for threads in (1, 2):
            session = tdq.OpenVinoSession(tmp_path / "m.onnx", num_threads=threads)
            found = session({name: case.inputs[name] for name in session.inputs})
            assert case.expected.error(list(found.values())) < SAME, (key, threads)
        kernels = [kernel for kernel in session.executed_precisions().values() if "FullyConnected" in kernel]
        assert kernels == ["FullyConnected i8"] * 3, key


def _upstream(name: str) -> Any:
    import sys

    folder = Path(__file__).parents[2] / "benchmarks" / "upstream"
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


def test_the_reproduction_for_openvino_still_reproduces() -> None:
    """If this fails, OpenVINO has mended something: see what the graphs need no longer."""
    pytest.importorskip("openvino")
    reproduction = _upstream("openvino_one_thread")
    found = reproduction.difference(reproduction.graph((24, 12, 24)), 1)
    assert found[0] > 0.1
    assert found[1] == 0
    assert "registers" in reproduction.difference(reproduction.graph((96, 8, 12), 3, biased=True), 1)
    for sizes, rows, biased in (((24, 12, 24), 1, False), ((96, 8, 12), 3, True)):
        model = reproduction.graph(sizes, rows, biased=biased, apart=True)
        difference, kernels = reproduction.difference(model, 1)
        assert difference < 1e-6
        assert kernels == 2


def test_the_upstream_reproduction_still_reproduces() -> None:
    """If this fails, ONNX Runtime has mended something: see what the graphs need no longer."""
    reproduction = _upstream("onnxruntime_qdq")
    plain = reproduction.run(reproduction.linear(opset=20), "ORT_ENABLE_ALL")
    assert not isinstance(plain, str)
    model = reproduction.convolution(True, True)
    levels = [reproduction.run(model, level) for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC")]
    assert np.abs(levels[0] - levels[1]).max() > 0.9 * reproduction.Y_SCALE


class Masked(nn.Module):
    """Fills a mask by another, as HunyuanVideo does."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        mask = (sample > 0).masked_fill(sample.abs() > 1, True)
        mask = torch.where(sample < -1.5, sample < -2, mask)
        return self.mix(torch.where(mask, sample, sample * timestep.reshape(-1, 1) / 100))


def test_a_choice_between_truth_values(tmp_path: Path) -> None:
    data = [(noise(4, 8, seed=i) * 2, torch.tensor(time)) for i, time in enumerate(TIMES)]
    model = quantized(Masked().eval(), data)
    sample, time = data[1]
    tdq.export_onnx(model, tmp_path / "m.onnx", {"sample": sample, "timestep": time})
    session = OnnxRuntimeSession(tmp_path / "m.onnx")
    found = session({"sample": sample.numpy(), "timestep": time.numpy()})[session.outputs[0]]
    with torch.no_grad():
        assert np.allclose(found, model(sample, time).numpy(), atol=1e-5)


def _portable(nodes: list[onnx.NodeProto], inputs: list[Any], outputs: list[Any], opset: int = 20) -> onnx.ModelProto:
    graph = onnx.helper.make_graph(nodes, "graph", inputs, outputs)
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=9)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    portable(model, GraphEditor(model.graph))
    return ir.to_proto(model)


def test_numbers_of_truth_values_are_and_and_or() -> None:
    make, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    nodes = [
        make("Mul", ["a", "b"], ["both"]),
        make("Add", ["both", "c"], ["some"]),
        make("Max", ["a", "b", "c"], ["any"]),
        make("Min", ["a", "some"], ["out"]),
    ]
    truth = onnx.TensorProto.BOOL
    inputs = [info(name, truth, [8]) for name in "abc"]
    outputs = [info(name, truth, [8]) for name in ("out", "any")]
    # ONNX does not have them, so shape inference gives no types
    graph = onnx.helper.make_graph(nodes, "graph", inputs, outputs)
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9))
    for node in model.graph:
        node.outputs[0].dtype = ir.DataType.BOOL
    portable(model, GraphEditor(model.graph))
    a, b, c = np.array(list(itertools.product([False, True], repeat=3))).T
    found = OnnxRuntimeSession(ir.to_proto(model))({"a": a, "b": b, "c": c})
    assert np.array_equal(found["any"], a | b | c)
    assert np.array_equal(found["out"], a & ((a & b) | c))


def test_bfloat16_inside_a_model_of_another_type_is_float32_that_is_rounded() -> None:
    make, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    number, half = onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16
    nodes = [
        make("Cast", ["x"], ["rounded"], to=half),
        make("Mul", ["rounded", "rounded"], ["square"]),
        make("Transpose", ["square"], ["turned"]),
        make("MatMul", ["turned", "rounded"], ["product"]),
        make("Cast", ["product"], ["out"], to=number),
    ]
    arguments = nodes, [info("x", number, [4, 4])], [info("out", number, [4, 4])]
    x = noise(4, 4)
    found = OnnxRuntimeSession(_portable(*arguments))({"x": x.numpy()})["out"]
    rounded = x.bfloat16()
    assert torch.equal(torch.from_numpy(found), (rounded.square().T @ rounded).float())
    of_another_type = _portable(*arguments, opset=22)  # that of models in bfloat16
    assert [node.op_type for node in of_another_type.graph.node] == [node.op_type for node in nodes]
