"""Exported graphs in ONNX Runtime at all its optimization levels, and behind graph simplifiers: the same numbers."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import onnx
import pytest
import torch
from support.denoisers import ATTENTION_PRODUCTS, one_row
from support.export import LOWERINGS, lowered, trace
from support.models import FAMILIES, fast_config, noise
from support.noise import SAME, expected_and_noise, rms
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession

LEVELS: tuple[Any, ...] = ("none", "basic", "extended", "all")

#: Levels that differ from "none"; "all" adds only layouts of convolutions to "extended".
OPTIMIZED: tuple[Any, ...] = ("basic", "all")

FP8 = (4, 3)


@dataclass(frozen=True)
class Case:
    """One graph: what torch says, and the quantization noise."""

    proto: onnx.ModelProto
    inputs: dict[str, Any]
    expected: np.ndarray[Any, Any]
    noise: float

    def error(self, level: Any, proto: onnx.ModelProto | None = None) -> float:
        """Distance from torch, in quantization noise."""
        session = OnnxRuntimeSession(self.proto if proto is None else proto, optimization=level, num_threads=1)
        found = session({name: self.inputs[name] for name in session.inputs})
        return rms(next(iter(found.values())) - self.expected) / self.noise


def cases(model: nn.Module, inputs: dict[str, Any]) -> dict[tuple[str, str], Case]:
    """Both lowerings of a model whose scales depend on time, and of the same model with one row."""
    graph = trace(model, inputs)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    found = {(low, "over time"): lowered(graph, low, model).proto for low in LOWERINGS}
    results = {"over time": expected_and_noise(model, inputs)}
    with one_row(model):
        found |= {(low, "static"): lowered(graph, low, model).proto for low in LOWERINGS}
        results["static"] = expected_and_noise(model, inputs)
    return {key: Case(proto, tensors, *results[key[1]]) for key, proto in found.items()}


@pytest.fixture(scope="module", params=["dit", "sd3", "unet_condition"])
def family(request: pytest.FixtureRequest) -> dict[tuple[str, str], Case]:
    torch.manual_seed(0)
    family = FAMILIES[request.param]
    config = fast_config()
    if request.param != "dit":
        cfg = {"num_bits": 8, "axis": None}
        config["quant_cfg"] += [{"quantizer_name": rule, "cfg": cfg} for rule in ATTENTION_PRODUCTS]
    model = mtq.quantize(family.make().eval(), config, family.forward_loop())
    return cases(model, family.inputs(2, torch.tensor(450.0), 50))


@pytest.mark.parametrize("scales", ["over time", "static"])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_numbers_at_every_level(family: Any, lowering: str, scales: str) -> None:
    case = family[lowering, scales]
    errors = {level: case.error(level) for level in LEVELS}
    assert max(errors.values()) < SAME, errors


@pytest.mark.parametrize("simplifier", ["onnxslim", "onnxsim"])
def test_numbers_behind_a_simplifier(family: Any, simplifier: str) -> None:
    module = pytest.importorskip(simplifier)
    for key, case in family.items():
        simplified = module.slim(case.proto) if simplifier == "onnxslim" else module.simplify(case.proto)[0]
        for level in OPTIMIZED:
            assert case.error(level, simplified) < SAME, (key, level)


@pytest.mark.parametrize("threads", [1, 2])
def test_numbers_in_openvino(family: Any, threads: int, tmp_path: Path) -> None:
    openvino = pytest.importorskip("modelopt_tdq.runtime.sessions.openvino")
    pytest.importorskip("openvino")
    for key, case in family.items():
        onnx.save(case.proto, tmp_path / "m.onnx")
        session = openvino.OpenVinoSession(tmp_path / "m.onnx", num_threads=threads)
        found = next(iter(session({name: case.inputs[name] for name in session.inputs}).values()))
        assert rms(found - case.expected) / case.noise < SAME, key


class Chain(nn.Module):
    """Layers whose results are quantized again, with nothing but ``between`` in between."""

    def __init__(self, layers: list[nn.Module], between: nn.Module | None = None) -> None:
        super().__init__()
        self.layers, self.between = nn.ModuleList(layers), between or nn.Identity()

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        for layer in self.layers:
            sample = self.between(layer(sample))
        return sample


def _convolutions(bias: bool = True) -> list[nn.Module]:
    return [nn.Conv2d(8, 16, 3, padding=1, bias=bias), nn.Conv2d(16, 16, 1, bias=bias), nn.Conv2d(16, 8, 1)]


def _linears(bias: bool = True) -> list[nn.Module]:
    return [nn.Linear(16, 32, bias=bias), nn.Linear(32, 32, bias=bias), nn.Linear(32, 16)]


CHAINS = {
    "conv": lambda: (Chain(_convolutions()), noise(4, 8, 12, 12)),
    "conv, relu": lambda: (Chain(_convolutions(), nn.ReLU()), noise(4, 8, 12, 12)),
    "conv without bias": lambda: (Chain(_convolutions(False)), noise(4, 8, 12, 12)),
    "conv, transposed": lambda: (
        Chain([nn.ConvTranspose2d(8, 16, 2, stride=2), nn.Conv2d(16, 8, 1)]),
        noise(4, 8, 8, 8),
    ),
    "vectors": lambda: (Chain(_linears()), noise(256, 16)),
    "vectors without bias": lambda: (Chain(_linears(False)), noise(256, 16)),
    "tokens": lambda: (Chain(_linears()), noise(4, 64, 16)),
    "tokens without bias": lambda: (Chain(_linears(False)), noise(4, 64, 16)),
}


@pytest.mark.parametrize("bits", [8, 4, FP8], ids=str)
@pytest.mark.parametrize("chain", CHAINS)
def test_layers_whose_results_are_quantized_again(chain: str, bits: Any) -> None:
    """At "basic" already, ONNX Runtime rounds their biases, which flips one code in a few hundred."""
    torch.manual_seed(0)
    model, sample = CHAINS[chain]()
    config = fast_config(weight_bits=bits, activation_bits=bits, high_precision=())
    mtq.quantize(model.eval(), config, lambda m: [m(sample * s, torch.tensor(t)) for s, t in ((1.0, 0.0), (3.0, 9.0))])
    for key, case in cases(model, {"sample": sample, "timestep": torch.tensor(0.0)}).items():
        for level in ("none", *OPTIMIZED):
            assert case.error(level) < SAME, (key, level)


@pytest.mark.parametrize("operands", ["weight", "input"])
@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize("chain", ["conv", "conv without bias", "vectors without bias", "tokens"])
def test_layers_with_one_quantized_operand(chain: str, axis: int | None, operands: str) -> None:
    """From "extended" on, ONNX Runtime quantizes the other one as well."""
    torch.manual_seed(0)
    model, sample = CHAINS[chain]()
    cfg = {"num_bits": 8, "axis": axis if operands == "weight" else None}
    rules = [{"quantizer_name": "*", "enable": False}, {"quantizer_name": f"*{operands}_quantizer", "cfg": cfg}]
    algorithm = "max" if operands == "weight" else fast_config()["algorithm"]
    inputs = {"sample": sample, "timestep": torch.tensor(0.0)}
    mtq.quantize(model.eval(), {"quant_cfg": rules, "algorithm": algorithm}, lambda m: m(**inputs))
    for lowering in LOWERINGS:
        case = Case(lowered(trace(model, inputs), lowering).proto, inputs, *expected_and_noise(model, inputs))
        for level in ("none", *OPTIMIZED):
            assert case.error(level) < SAME, (lowering, level)


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
    torch.manual_seed(0)
    config = fast_config(weight_bits=4, activation_bits=8, high_precision=())
    cfg = {"num_bits": 8, "axis": None}
    config["quant_cfg"] += [{"quantizer_name": rule, "cfg": cfg} for rule in ATTENTION_PRODUCTS]
    inputs = {"sample": noise(2, 12, 16), "timestep": torch.tensor(0.0)}
    model = mtq.quantize(Attention().eval(), config, lambda m: m(**inputs))
    path = tdq.export_onnx(model, tmp_path / "m.onnx", inputs, pack_weights=pack).path
    proto = onnx.load(path)
    assert [entry.version for entry in proto.opset_import] == [20 if pack == "none" else 21]
    case = Case(proto, inputs, *expected_and_noise(model, inputs))
    errors = {level: case.error(level) for level in LEVELS}
    assert max(errors.values()) < SAME, errors


def test_the_upstream_reproduction_still_reproduces() -> None:
    """If this fails, ONNX Runtime has mended something: see what the graphs need no longer."""
    import sys

    folder = Path(__file__).parents[2] / "benchmarks" / "upstream"
    sys.path.insert(0, str(folder))
    try:
        reproduction = importlib.import_module("onnxruntime_qdq")
    finally:
        sys.path.remove(str(folder))
    plain = reproduction.run(reproduction.linear(opset=20), "ORT_ENABLE_ALL")
    assert not isinstance(plain, str)
    model = reproduction.convolution(True, True)
    levels = [reproduction.run(model, level) for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC")]
    assert np.abs(levels[0] - levels[1]).max() > 0.9 * reproduction.Y_SCALE
