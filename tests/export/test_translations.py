"""What torch's exporter has no ONNX operators for: translated, computed beforehand or taken apart; the same values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import noise
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex

from modelopt_tdq.export.constant_operators import without_constant_operator
from modelopt_tdq.export.plain_attention import in_plain_attention
from modelopt_tdq.export.translations import cast_concatenated, translations
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession


class Sorted(nn.Module):
    def forward(self, x: Tensor, places: Tensor) -> tuple[Tensor, ...]:
        stable = torch.sort(places, stable=True, dim=0)
        return *x.sort(-1), *x.sort(0, descending=True), *stable, places.argsort(stable=True, dim=1, descending=True)


@pytest.mark.parametrize("dynamic", [False, True])
def test_sort(dynamic: bool, tmp_path: Path) -> None:
    inputs = noise(3, 5), torch.tensor([[2, 1, 2, 0, 1], [0, 1, 0, 0, 7], [2, 1, 1, 0, 1]])
    sizes: Any = ({1: torch.export.Dim.DYNAMIC},) * 2 if dynamic else None
    program = torch.export.export(Sorted(), inputs, dynamic_shapes=sizes, strict=False)
    exported = torch.onnx.export(
        program, dynamo=True, opset_version=20, custom_translation_table=translations(), verbose=False
    )
    assert exported is not None
    exported.save(tmp_path / "m.onnx")
    session = OnnxRuntimeSession(tmp_path / "m.onnx")
    given = (torch.cat([value.flip(1), value], 1) for value in inputs) if dynamic else (v.flip(1) for v in inputs)
    given = tuple(given)
    found = session({name: value.numpy() for name, value in zip(session.inputs, given, strict=True)})
    for one, other in zip(session.outputs, Sorted()(*given), strict=True):
        assert torch.equal(torch.from_numpy(found[one]), other)


class Joined(nn.Module):
    """Half precision beside float32, as SDXL joins the text and the sizes of the image."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return torch.concat([x, y, x], -1), torch.concat([y, x], 0).to(x.dtype), torch.cat([y, x, x], -1)


def test_concat_of_several_types(tmp_path: Path) -> None:
    inputs = noise(2, 3).half(), noise(2, 3, seed=1)
    exported = torch.onnx.export(torch.export.export(Joined(), inputs), dynamo=True, optimize=False, verbose=False)
    assert exported is not None
    cast_concatenated(exported.model)
    exported.save(tmp_path / "m.onnx")
    session = OnnxRuntimeSession(tmp_path / "m.onnx")
    found = session({name: value.numpy() for name, value in zip(session.inputs, inputs, strict=True)})
    for name, expected in zip(session.outputs, Joined()(*inputs), strict=True):
        assert torch.equal(torch.from_numpy(found[name]), expected)


class Orthogonal(nn.Module):
    """Makes its weight orthogonal in every call, as the motion encoder of Wan-Animate does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(noise(6, 3))
        self.shift = nn.Parameter(noise(3, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        rotation, stretch = torch.linalg.qr(self.weight + 1e-8)
        return x @ rotation @ stretch + self.shift


class OfInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.qr(x)[0]


def test_an_operator_of_weights_alone_is_computed_beforehand() -> None:
    name, module = "aten.linalg_qr.default", Orthogonal().eval()
    with torch.no_grad():
        program = torch.export.export(module, (noise(2, 6),), strict=False)
        found = without_constant_operator(program, name, (noise(2, 6),), None)
        assert found is not None
        assert name in {str(node.target) for node in program.graph.nodes}
        assert name not in {str(node.target) for node in found.graph.nodes}
        assert "shift" in found.state_dict
        assert torch.allclose(found.module()(noise(2, 6, seed=3)), module(noise(2, 6, seed=3)), atol=1e-6)
        assert without_constant_operator(program, "aten.linalg_inv.default", (noise(2, 6),), None) is None
        of_input = torch.export.export(OfInput(), (noise(4, 3),), strict=False)
        assert without_constant_operator(of_input, name, (noise(4, 3),), None) is None


class Flexible(nn.Module):
    """Hides what comes later by code, and what is far away by a score."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = flex.create_block_mask(lambda b, h, q, k: q >= k, None, None, 256, 256, device="cpu")

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def score(value: Tensor, b: Tensor, h: Tensor, place: Tensor, other: Tensor) -> Tensor:
            return value - 0.01 * (place - other)

        found = flex.flex_attention(q, k, v, score_mod=score, block_mask=self.hidden, scale=0.3)
        assert isinstance(found, Tensor)
        return found


def test_flex_attention_is_plain() -> None:
    inputs = tuple(noise(1, 2, 256, 16, seed=seed) for seed in range(3))
    with torch.no_grad():
        program = torch.export.export(Flexible().eval(), inputs, strict=False)
        found = in_plain_attention(program, inputs, None)
        assert "flex_attention" in str(program.graph)
        assert "flex_attention" not in str(found.graph)
        others = tuple(noise(1, 2, 256, 16, seed=seed) for seed in range(3, 6))
        places = torch.arange(256.0)
        distance = places[:, None] - places
        scores = (others[0] @ others[1].transpose(-1, -2)) * 0.3 - 0.01 * distance
        expected = torch.softmax(scores.masked_fill(distance < 0, -torch.inf), -1) @ others[2]
        assert torch.allclose(found.module()(*others), expected, atol=1e-5)
        plain = torch.export.export(OfInput(), inputs[:1], strict=False)
        assert in_plain_attention(plain, inputs[:1], None) is plain
