"""Codes, value by value: oracle = torch = ONNX Runtime on both lowerings, on the values where they could differ."""

from __future__ import annotations

from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import pytest
import torch
from support import oracle
from support.export import LOWERINGS, Lowered, lowered, trace
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.core.fake_quant import quantize
from modelopt_tdq.core.schedule import row_index
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession, add_outputs

BITS: tuple[Any, ...] = (8, 6, 4, 3, (4, 3))
ROWS = [0.0, 1.0, 40.0, 333.0, 500.0, 999.0]

#: Every row, half-way between rows, just beside that, between rows, and outside the table.
TIMES = [*ROWS, 0.5, 20.5, float(np.nextafter(np.float32(20.5), np.float32(21))), 187.0, 2000.0, -3.0]

#: (bits, offset?, a scale and offset of its own to turn codes back?) of each quantizer.
KINDS = [(bits, False, False) for bits in BITS] + [(bits, True, False) for bits in BITS]
KINDS += [(8, False, True), (8, True, True), (4, True, True), ((4, 3), True, True)]
VALUES = 90_000


class Probe(nn.Module):
    """One quantizer of each kind, all of the same values."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv1d(1, 1, 1) for _ in KINDS])

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(sample) for layer in self.layers)


def _table() -> tdq.ScaleTable:
    generator = torch.Generator().manual_seed(1)
    scale = 0.03 * 8 ** torch.rand(len(ROWS), len(KINDS), generator=generator)
    scale[::2] = 2.0 ** torch.round(torch.log2(scale[::2]))  # powers of two have exact ties
    offset = torch.zeros_like(scale)
    for column, (bits, shifted, _) in enumerate(KINDS):
        if shifted:
            low, high = oracle.code_limits(bits)
            offset[:, column] = scale[:, column] * torch.randint(low, high, (len(ROWS),), generator=generator)
    offset[1] *= 1.37  # no padding here, so an offset may be anything
    own = torch.tensor([dequant for *_, dequant in KINDS])
    dequant_scale = torch.where(own, 0.05 * 3 ** torch.rand(scale.shape, generator=generator), scale)
    dequant_offset = torch.where(own, torch.randn(scale.shape, generator=generator), offset)
    names = [f"layers.{i}.input_quantizer" for i in range(len(KINDS))]
    return tdq.ScaleTable(torch.tensor(ROWS), scale, names, offset, dequant_scale, {}, dequant_offset)


def _values(scale: Tensor, offset: Tensor) -> Tensor:
    """Ties and their neighbours, saturation, zeros, subnormals, and the rest at random."""
    generator = torch.Generator().manual_seed(2)
    half = torch.arange(-140, 140) + 0.5
    ties = (half.unsqueeze(1) * scale + offset).flatten()
    ties8 = (torch.from_numpy(oracle.E4M3[:-1] + np.diff(oracle.E4M3) / 2).float().unsqueeze(1) * scale).flatten()
    ties = torch.cat([ties, ties8, -ties8])
    beside = [torch.nextafter(ties, torch.full_like(ties, bound)) for bound in (-torch.inf, torch.inf)]
    extreme = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-40, -1e-39, 1.2e-38, 3e38, -3e38, 448.0, 464.0, 480.0, 1e6])
    fixed = torch.cat([ties, *beside, extreme, -extreme])
    spread = torch.tensor([0.01, 0.3, 3.0, 30.0, 300.0]).repeat_interleave((VALUES - len(fixed)) // 5 + 1)
    rest = torch.randn(VALUES - len(fixed), generator=generator) * spread[: VALUES - len(fixed)]
    return torch.cat([fixed, rest])


@pytest.fixture(scope="module")
def probe() -> nn.Module:
    torch.manual_seed(0)
    model = Probe().eval()
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for index, (bits, *_) in enumerate(KINDS):
        rules.append({"quantizer_name": f"*layers.{index}.input_quantizer", "cfg": {"num_bits": bits, "axis": None}})
    algorithm = {"method": "tdq", "statistic": "max", "weights": "keep", "protect_steps": False, "progress": False}

    def forward_loop(quantized: nn.Module) -> None:
        for time in (0.0, 999.0):
            quantized(torch.randn(1, 1, 64), torch.tensor(time))

    mtq.quantize(model, {"quant_cfg": rules, "algorithm": algorithm}, forward_loop)
    tdq.set_scale_table(model, _table())
    return model


@pytest.fixture(scope="module")
def sessions(probe: nn.Module) -> dict[str, OnnxRuntimeSession]:
    graph = trace(probe, {"sample": torch.zeros(1, 1, VALUES), "timestep": torch.tensor(0.0)})
    graphs: dict[str, Lowered] = {name: lowered(graph, name) for name in LOWERINGS}
    found = {name: OnnxRuntimeSession(graph.proto, codes=True) for name, graph in graphs.items()}
    names = [f"layers.{i}.input_quantizer" for i in range(len(KINDS))]
    watched = [tensor for name in names for tensor in (f"{name}/codes", _value_of(name))]
    found["reference"] = OnnxRuntimeSession(add_outputs(graphs["reference"].proto, watched))
    return found


def _value_of(name: str) -> str:
    """The tensor that holds what a quantizer passes on in the reference graph."""
    _, shifted, dequant = KINDS[int(name.split(".")[1])]
    return f"{name}/value" if shifted or dequant else f"{name}/dequantized"


@pytest.mark.parametrize("time", TIMES)
def test_codes_are_equal_everywhere(probe: nn.Module, sessions: dict[str, OnnxRuntimeSession], time: float) -> None:
    """Twelve times, fourteen quantizers, 90,000 values: 15.1 million codes from each side."""
    table = tdq.scale_table(probe)
    row = oracle.row(time, table.timesteps.numpy())
    assert int(row_index(torch.tensor([time]), table.timesteps)) == row
    assert table.offset is not None
    assert table.dequant_scale is not None
    assert table.dequant_offset is not None
    x = _values(table.scale[row], table.offset[row])
    assert x.shape == (VALUES,)
    found = {name: session({"sample": x.reshape(1, 1, -1), "timestep": time}) for name, session in sessions.items()}
    seen: dict[str, Tensor] = {}
    hooks = [
        probe.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: seen.update({name: out.flatten()}))
        for name in table.names
    ]
    with torch.no_grad():
        probe(x.reshape(1, 1, -1), torch.tensor(time))
    for hook in hooks:
        hook.remove()
    for column, name in enumerate(table.names):
        bits = KINDS[column][0]
        scale, offset = table.scale[row, column], table.offset[row, column]
        expected = oracle.codes(x.numpy(), float(scale), float(offset), bits)
        low, high = oracle.code_limits(bits)
        assert expected.min() == low
        assert expected.max() == high
        in_torch = quantize(x, scale, offset, bits).numpy()
        np.testing.assert_array_equal(in_torch, expected)
        back = float(table.dequant_scale[row, column]), float(table.dequant_offset[row, column])
        values = oracle.values(expected, *back)
        np.testing.assert_array_equal(seen[name].numpy(), values)
        np.testing.assert_array_equal(found["reference"][_value_of(name)].flatten(), values)
        for lowering in LOWERINGS:
            codes = found[lowering][f"{name}/codes"].flatten()
            np.testing.assert_array_equal(codes, expected, err_msg=f"{lowering} {name} {bits}")


def test_the_values_hold_what_they_should() -> None:
    table = _table()
    assert table.offset is not None
    x = _values(table.scale[0], table.offset[0])
    quotient = (x.double() / table.scale[0, 0].double()).numpy()
    assert (np.abs(quotient - np.trunc(quotient)) == 0.5).sum() > 200  # exact ties
    assert ((x != 0) & (x.abs() < torch.finfo(torch.float32).tiny)).sum() > 3  # subnormals
    assert (np.abs(quotient) > 1e6).sum() > 3
