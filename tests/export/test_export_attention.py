"""Attention whose two products take codes on both sides, all four of them with scales that depend on time."""

from __future__ import annotations

from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import pytest
import torch
from support.double import run_double
from support.export import LOWERINGS, Lowered, codes_by_definition, lowered, trace
from support.models import TIMES, fast_config, noise
from torch import Tensor, nn

pytest.importorskip("diffusers")


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        from diffusers.models.attention_processor import Attention, AttnProcessor

        super().__init__()
        # the plain processor: its softmax is a tensor that ModelOpt quantizes
        self.attention = Attention(16, heads=2, dim_head=8, processor=AttnProcessor())

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        out: Tensor = self.attention(sample * (0.3 + timestep / 1000))
        return out


@pytest.fixture(scope="module")
def exported() -> tuple[nn.Module, dict[str, Any], dict[str, Lowered]]:
    torch.manual_seed(0)
    config = fast_config()
    products = ("*[qkv]_bmm_quantizer", "*softmax_quantizer")
    config["quant_cfg"] += [{"quantizer_name": rule, "cfg": {"num_bits": 8, "axis": None}} for rule in products]

    def forward_loop(model: nn.Module) -> None:
        for index, time in enumerate(TIMES):
            model(noise(2, 12, 16, seed=index), torch.tensor(time))

    model = mtq.quantize(SelfAttention().eval(), config, forward_loop)
    inputs = {"sample": noise(2, 12, 16, seed=9), "timestep": torch.tensor(500.0)}
    graph = trace(model, inputs)
    return model, inputs, {name: lowered(graph, name) for name in LOWERINGS}


def test_both_products_take_codes(exported: Any) -> None:
    _, _, graphs = exported
    assert graphs["ratio"].context.skipped == {}
    operands = {f"attention.{name}_quantizer" for name in ("q_bmm", "k_bmm", "softmax", "v_bmm")}
    assert operands <= set(graphs["ratio"].context.low_precision)
    nodes = graphs["ratio"].proto.graph.node
    producer = {output: node for node in nodes for output in node.output}
    products = [node for node in nodes if node.op_type == "MatMul"]
    assert len(products) == 6
    moves = ("Transpose", "Reshape", "Mul", "Cast")

    def source(name: str) -> str:
        node = producer[name]
        return source(node.input[0]) if node.op_type in moves else str(node.op_type)

    assert {source(name) for node in products for name in node.input} == {"DequantizeLinear"}
    # one correction behind each product, by the product of both ratios
    multiplied = [node.name for node in nodes if node.op_type == "Mul" and node.name.startswith("node/attention/ratio")]
    assert len(multiplied) == 2


def test_one_tensor_is_quantized_once_for_q_k_and_v(exported: Any) -> None:
    """Three quantizers, one scale: as many Div nodes as quantizers, which equal inputs let every backend merge."""
    _, _, graphs = exported
    divisions = [
        n for n in graphs["ratio"].proto.graph.node if n.op_type == "Div" and "/to_" in n.name.replace(".", "/")
    ]
    inputs = {tuple(node.input) for node in divisions if "to_out" not in node.name}
    assert len(inputs) == 1


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_codes_follow_the_definition(exported: Any, lowering: str) -> None:
    model, inputs, graphs = exported
    compared, mismatched = codes_by_definition(graphs[lowering], model, inputs, 500.0)
    assert compared > 2000
    assert mismatched == 0


def test_lowerings_agree_in_float64(exported: Any) -> None:
    _, inputs, graphs = exported
    arrays = {name: value.numpy() for name, value in inputs.items()}
    reference, ratio = (run_double(graphs[name].proto, arrays)["output"] for name in LOWERINGS)
    assert np.abs(ratio - reference).max() < 1e-11 * np.abs(reference).max()
