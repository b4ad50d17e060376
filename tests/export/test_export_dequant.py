"""Codes turned back by scales and offsets of their own: every combination of constant and temporal, and padding."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import oracle
from support.double import run_double
from support.export import LOWERINGS, lowered, trace
from support.models import FAMILIES, noise, quantized
from support.precisions import integer_kernels
from support.tables import with_dequantization
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.export.lookup import reference_scale
from modelopt_tdq.export.onnx_export import MarkerGraph
from modelopt_tdq.export.spec import ActivationSpec
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession

TIMES = [0.0, 400.0, 999.0]
LAYERS = ("padded", "linear", "product")


class Small(nn.Module):
    """A convolution that pads, a linear layer, and a matrix product of two activations."""

    def __init__(self) -> None:
        from diffusers.models.attention_processor import Attention, AttnProcessor

        super().__init__()
        self.padded = nn.Conv2d(8, 6, 3, padding=1)
        self.linear = nn.Linear(8, 6)
        self.product = Attention(8, heads=2, dim_head=4, processor=AttnProcessor())  # folds heads into the batch
        with torch.no_grad():
            for layer in (self.product.to_q, self.product.to_k, self.product.to_v):
                layer.weight.copy_(torch.randint(-16, 17, layer.weight.shape) / 16)  # exact sums

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        tokens = sample.flatten(2).transpose(1, 2)
        return self.padded(sample), self.linear(tokens), self.product(tokens)


def _sample(batch: int) -> Tensor:
    return torch.round(noise(batch, 8, 6, 6, seed=5) * 16) / 16


@pytest.fixture(scope="module", params=[1, 2], ids=["one time", "a time per sample"])
def small(request: pytest.FixtureRequest) -> tuple[Small, MarkerGraph, Tensor]:
    import modelopt.torch.quantization as mtq

    torch.manual_seed(0)
    fast = {"statistic": "max", "weights": "max", "protect_steps": False, "progress": False}
    config = tdq.make_config(**fast)
    bmm = [f"*product.{operand}_bmm_quantizer" for operand in "qk"]
    config["quant_cfg"] += [{"quantizer_name": name, "cfg": {"num_bits": 8, "axis": None}} for name in bmm]
    config["quant_cfg"].append({"quantizer_name": "*product.to_*", "enable": False})

    def forward_loop(model: nn.Module) -> None:
        for time in TIMES:
            model(_sample(2) * (1 + time), torch.tensor(time))

    model = mtq.quantize(Small().eval(), config, forward_loop)
    time = torch.tensor([600.0, 7.0]) if request.param == 2 else torch.tensor(600.0)
    return model, trace(model, {"sample": _sample(2), "timestep": time}, dynamic_batch=request.param == 2), time


def _columns(model: nn.Module, temporal: tuple[bool, ...], shifts: tuple[bool, bool], bits: Any) -> tdq.ScaleTable:
    """Random columns; zero stays zero in a convolution that pads, and goes anywhere elsewhere.

    Args:
        model: Whose quantizers get them.
        temporal: Whether s, o, s', o' depend on time.
        shifts: Whether there is an o, an o'.
        bits: Of the codes.
    """
    quantizers = tdq.temporal_quantizers(model)
    for quantizer in quantizers.values():
        quantizer.num_bits = bits
    generator = torch.Generator().manual_seed(3)
    shape = (len(TIMES), len(quantizers))
    largest = oracle.code_limits(bits)[1]

    def column(values: Tensor, moves: bool) -> Tensor:
        return values if moves else values[:1].expand(shape).clone()

    scale = column(2.5 / largest * 3 ** torch.rand(shape, generator=generator), temporal[0])
    offset = column(torch.randn(shape, generator=generator), temporal[1]) * shifts[0]
    own = column(2.5 / largest * 3 ** torch.rand(shape, generator=generator), temporal[2])
    own_offset = column(torch.randn(shape, generator=generator), temporal[3]) * shifts[1]
    padded = list(quantizers).index("padded.input_quantizer")
    if shifts[1]:
        code = torch.from_numpy(
            np.concatenate(
                [
                    oracle.codes(np.zeros(1), s, o, bits)
                    for s, o in zip(scale[:, padded], offset[:, padded], strict=True)
                ]
            )
        )
        own_offset[:, padded] = -code * own[:, padded]
    table = tdq.ScaleTable(torch.tensor(TIMES), scale, tuple(quantizers), offset, own, {}, own_offset)
    tdq.set_scale_table(model, table)
    return table


COMBINATIONS = list(product([False, True], repeat=4))


#: In other formats than INT8: none, all, and what moves scales or offsets.
QUICK = [(False,) * 4, (True,) * 4, (True, False, False, True), (False, True, True, False)]


def _formats() -> list[Any]:
    found = []
    for temporal, (name, bits) in product(COMBINATIONS, {"int8": 8, "int4": 4, "fp8": (4, 3)}.items()):
        letters = "".join("kt"[int(v)] for v in temporal)
        marks = () if bits == 8 or temporal in QUICK else pytest.mark.slow
        found.append(pytest.param(temporal, bits, id=f"{letters}-{name}", marks=marks))
    return found


@pytest.mark.parametrize(("temporal", "bits"), _formats())
def test_equals_torch_whatever_depends_on_time(small: Any, temporal: tuple[bool, ...], bits: Any) -> None:
    model, graph, time = small
    for shifts in ((True, True), (True, False)):
        _columns(model, temporal, shifts, bits)
        graphs = {name: lowered(graph, name, model) for name in LOWERINGS}
        batches = (2, 3) if graph.dynamic_batch else (2,)
        for batch in batches:
            times = torch.linspace(1000.0, 0.0, batch) if time.dim() else time
            inputs = {"sample": _sample(batch), "timestep": times}
            with torch.no_grad():
                expected = model(**inputs)
            for lowering, exported in graphs.items():
                found = OnnxRuntimeSession(exported.proto)(inputs)
                for name, want, got in zip(LAYERS, expected, found.values(), strict=True):
                    assert np.abs(got - want.numpy()).max() / want.abs().max() < 3e-6, (lowering, name, shifts)
        inputs = {"sample": _sample(2).numpy(), "timestep": time.numpy()}
        if bits != 8:
            continue
        reference, ratio = (run_double(exported.proto, inputs) for exported in graphs.values())
        for name, want, got in zip(LAYERS, reference.values(), ratio.values(), strict=True):
            assert np.abs(got - want).max() / np.abs(want).max() < 2e-6, (name, shifts)


def _names(model: nn.Module, graph: MarkerGraph) -> dict[str, set[str]]:
    """Of the lowered graph's tensors: what stands behind "<layer>/" or "<quantizer>/", by layer."""
    found: dict[str, set[str]] = {layer: set() for layer in LAYERS}
    for node in lowered(graph, "ratio", model).proto.graph.node:
        layer, _, suffix = node.output[0].partition("/")
        if layer.partition(".")[0] in found:
            found[layer.partition(".")[0]].add(suffix)
    return found


def test_there_are_no_more_nodes_than_it_takes(small: Any) -> None:
    model, graph, _ = small
    s, o, own, own_offset = 1, 2, 4, 8
    expected = {
        0: set(),
        s: {"quotient"},
        o: set(),
        own: {"scaled"},
        own_offset: {"offset_sum"},
        s | own: {"quotient", "scaled"},
        s | o | own | own_offset: {"quotient", "scaled", "offset_sum"},
    }
    for mask, wanted in expected.items():
        _columns(model, tuple(bool(mask & bit) for bit in (s, o, own, own_offset)), (True, True), 8)
        for layer in ("linear", "padded"):
            found = _names(model, graph)[layer] & {"quotient", "scaled", "offset_sum"}
            # the offset of "padded" turns zero's code back, and so moves with whatever moves that
            assert found - {"offset_sum"} == wanted - {"offset_sum"}
            assert layer == "padded" or found == wanted
    _columns(model, (True, True, True, False), (True, False), 8)
    found = _names(model, graph)["padded"]
    assert "centered" in found
    assert not found & {"padded", "offset_sum"}  # zeros of the padding are zeros of the values


def test_padding_needs_zero_to_stay_zero(small: Any) -> None:
    model, graph, _ = small
    table = _columns(model, (True,) * 4, (True, True), 8)
    assert table.dequant_offset is not None
    moved = table.dequant_offset.clone()
    column = table.names.index("padded.input_quantizer")
    assert "padded" in _names(model, graph)["padded"]
    moved[1, column] += 1e-3
    wrong = tdq.ScaleTable(table.timesteps, table.scale, table.names, table.offset, table.dequant_scale, {}, moved)
    tdq.set_scale_table(model, wrong)
    lowered(graph, "reference", model)  # pads in float
    with pytest.raises(tdq.TdqError, match=r"zero has no code.*dequantize offset") as error:
        lowered(graph, "ratio", model)
    assert error.value.value == "padded.input_quantizer"


_number = st.floats(-3, 3, width=32)


@given(st.sampled_from([8, 4, (4, 3)]), st.floats(0.015625, 4, width=32), _number, st.floats(0.015625, 4, width=32))
def test_zero_has_a_code_says_what_quantization_does_to_zero(bits: Any, s: float, o: float, own: float) -> None:
    def spec(back: float) -> ActivationSpec:
        rows = [np.array([value], np.float32) for value in (s, o, own, back)]
        return ActivationSpec("q", bits, *rows)

    code = float(oracle.codes(np.zeros(1), s, o, bits)[0])
    exact = float(-np.float32(code) * np.float32(own))
    assert spec(exact).zero_has_a_code
    assert not spec(exact + own / 4).zero_has_a_code
    if exact:
        assert not spec(0.0).zero_has_a_code


@given(st.lists(st.floats(2.0**-20, 2.0**10, width=32), min_size=1, max_size=4), st.floats(2.0**-20, 2.0**10, width=32))
def test_the_reference_scale_is_that_of_the_values(own: list[float], s: float) -> None:
    dequant_scale = np.array(own, np.float32)
    spec = ActivationSpec("q", 8, np.full(len(own), s, np.float32), None, dequant_scale)
    ratio = dequant_scale / reference_scale(spec)
    assert 1 <= ratio.min() < 2
    assert (ratio * reference_scale(spec) == dequant_scale).all()


@pytest.fixture(scope="module")
def denoiser() -> nn.Module:
    model = quantized(asymmetric=True)
    tdq.set_scale_table(model, with_dequantization(tdq.scale_table(model)))
    return model


def test_openvino_agrees_with_onnx_runtime(denoiser: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from modelopt_tdq.runtime.sessions.openvino import OpenVinoSession

    inputs = {"sample": noise(2, 3, 8, 8, seed=3), "timestep": torch.tensor(600.0)}
    path = tdq.export_onnx(denoiser, tmp_path / "ratio.onnx", inputs).path
    session = OpenVinoSession(path, num_threads=1)
    for time in (600.0, 20.0):
        feeds = {**inputs, "timestep": time}
        found, expected = session(feeds)["output"], OnnxRuntimeSession(path)(feeds)["output"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    kernels = integer_kernels(session)
    assert kernels.count("Convolution i8") == 2
    assert kernels.count("FullyConnected i8") == 1


def test_compare_model_sees_no_fault(denoiser: nn.Module) -> None:
    pytest.importorskip("polygraphy")
    from modelopt_tdq.compare import compare_model

    comparison = compare_model(denoiser, FAMILIES["plain"].data(), backends=("torch", "onnxruntime"), progress=False)
    assert comparison.passed
    assert not comparison.layers
    assert all(count > 1000 for count in comparison.compared_codes.values())
