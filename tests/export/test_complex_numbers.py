"""Complex numbers inside a model, as of rotary embeddings: in real ones, the same values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from support.models import TIMES, fast_config, noise, quantized
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.export.complex_numbers import in_real_numbers

#: From z [2, 3, 4] and w [2, 3, 4], complex, to complex numbers or real ones.
OPERATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda z, w: z * w,
    "product with real numbers": lambda z, w: w.real * z * 2,
    "product with a complex number": lambda z, w: z * (1 + 2j),
    "sum": lambda z, w: z + w - z * w,
    "negative": lambda z, w: -z,
    "polar": lambda z, w: torch.polar(z.abs(), w.real) * z,
    "complex": lambda z, w: torch.complex(z.real, w.imag),
    "broadcast": lambda z, w: torch.complex(z.real, w.imag[:1, :1]),
    "conjugate": lambda z, w: z.conj() * w,
    "magnitude": lambda z, w: (z * w).abs(),
    "unsqueeze": lambda z, w: z.unsqueeze(-1) * w.unsqueeze(-2),
    "squeeze": lambda z, w: z[:1].squeeze(0) * w[:, :, :1].squeeze(-1)[0, 0],
    "transpose": lambda z, w: z.transpose(-1, 0) * w.transpose(0, 2),
    "permute": lambda z, w: z.permute(2, -3, 1),
    "slice": lambda z, w: z[:, 1:, ::2] * w[..., 1:, :2],
    "select": lambda z, w: z.select(-1, 2) * w[:, :, 1],
    "narrow": lambda z, w: z.narrow(-1, 1, 2),
    "index": lambda z, w: z[torch.tensor([1, 0, 1])],
    "index of a later dimension": lambda z, w: z[:, torch.tensor([2, 0])],
    "index_select": lambda z, w: z.index_select(-1, torch.tensor([3, 0])),
    "split": lambda z, w: torch.cat(z.split([1, 3], -1)[::-1], -1),
    "chunk": lambda z, w: z.chunk(2, 2)[1] * w.chunk(2, -1)[0],
    "unbind": lambda z, w: torch.stack(z.unbind(1), -1),
    "flatten": lambda z, w: z.flatten(1).unflatten(-1, (4, 3)) * w.flatten(-2).unflatten(1, (4, 3)),
    "reshape": lambda z, w: z.reshape(6, 4).view(3, 2, -1),
    "expand": lambda z, w: z[:, :1].expand(-1, 5, -1),
    "repeat": lambda z, w: z.repeat(1, 2, 1),
    "pad_sequence": lambda z, w: nn.utils.rnn.pad_sequence([z[0, :2], w[1]], batch_first=True),
    "cast": lambda z, w: (z.to(torch.complex128) * w).to(torch.complex64),
    "from real numbers": lambda z, w: z.real.to(torch.complex64) * w,
    "sizes": lambda z, w: z * z.shape[-1],
    "quotient": lambda z, w: z / (w + 3) + w / 2,
    "exponential": lambda z, w: torch.exp(z * 0.5) + torch.exp(1j * w.real),
    "sum with real numbers": lambda z, w: z + w.real - 2,
    "gather": lambda z, w: z.gather(1, torch.tensor([[[2, 0, 1, 1]], [[0, 2, 2, 1]]])) * w[:, :1],
    "where": lambda z, w: torch.where(z.real > 0, z, w),
    "masked_fill": lambda z, w: z.masked_fill(w.real > 0, 1 + 2j),
    "written in place": lambda z, w: _written(torch.zeros(2, 5, 4, dtype=torch.complex64), z, w),
    "written into what is like another": lambda z, w: _written(z.new_zeros(2, 5, 4), z, w) + torch.zeros_like(z[:, :1]),
    "written at places": lambda z, w: torch.zeros_like(z).index_put_((torch.tensor([1]),), w[:1]) * z,
    "in a region of another precision": lambda z, w: _in_a_region(z.real, w),
    "changed in place": lambda z, w: z.clone().mul_(w).add_(1),
}


def _written(numbers: Tensor, z: Tensor, w: Tensor) -> Tensor:
    for row in range(2):
        numbers[row, 1:4] = z[row]
        numbers[row, 0, :2] = w[row, 0, 2:]
    numbers[:, 4] = 1.5
    return numbers


def _in_a_region(x: Tensor, w: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        turned = torch.view_as_real(torch.polar(torch.ones_like(x), x))[..., 0]
        made = torch.polar(turned, x)
    return made * w


class Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("turn", torch.polar(torch.ones(4), torch.arange(4.0)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        made = self.function(torch.view_as_complex(x) * self.turn, torch.view_as_complex(y))
        return torch.view_as_real(made.resolve_conj()) if made.is_complex() else made


@pytest.mark.parametrize("name", OPERATORS)
def test_the_same_values_without_a_complex_number(name: str) -> None:
    module, tensors = Applied(OPERATORS[name]), (noise(2, 3, 4, 2), noise(2, 3, 4, 2, seed=1))
    program = torch.export.export(module, tensors, strict=False)
    real = in_real_numbers(program, tensors, None)
    values: list[Any] = [node.meta["val"] for node in real.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    assert values
    assert not any(value.is_complex() for value in values)
    others = noise(2, 3, 4, 2, seed=2), noise(2, 3, 4, 2, seed=3)
    assert torch.allclose(real.module()(*others), module(*others), atol=1e-5)


def test_what_is_not_known_and_what_is_real_stays() -> None:
    tensors = noise(2, 3, 4, 2), noise(2, 3, 4, 2, seed=1)
    unknown = torch.export.export(Applied(lambda z, w: torch.linalg.inv(z[:, :, :3]).real), tensors, strict=False)
    assert in_real_numbers(unknown, tensors, None) is unknown
    plain = torch.export.export(nn.Linear(2, 2), tensors[:1], strict=False)
    assert in_real_numbers(plain, tensors[:1], None) is plain


class Turning(nn.Module):
    """Takes the rotation as complex numbers, as Lumina-Next does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, sample: Tensor, timestep: Tensor, turn: Tensor) -> Tensor:
        h = self.first(sample * (1 + timestep.reshape(-1, 1, 1) / 100))
        turned = torch.view_as_complex(h.unflatten(-1, (4, 2)).contiguous()) * turn
        return self.second(torch.view_as_real(turned).flatten(-2))


def test_complex_inputs_are_real_and_imaginary_parts(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")

    def turn(seed: int) -> Tensor:
        return torch.view_as_complex(noise(5, 4, 2, seed=seed))

    torch.manual_seed(0)
    calls = [
        {"sample": noise(2, 5, 8, seed=i), "timestep": torch.tensor(t), "turn": turn(i)} for i, t in enumerate(TIMES)
    ]
    model = mtq.quantize(Turning().eval(), fast_config(high_precision=()), lambda m: [m(**call) for call in calls])
    tdq.export_onnx(model, tmp_path / "m.onnx", calls[1])
    session = tdq.open_session(tmp_path / "m.onnx")
    assert session.shapes["turn"] == (5, 4, 2)
    given = {**calls[1], "turn": turn(9)}
    with torch.no_grad():
        expected = model(**given)
    for feeds in (given, {name: value.numpy() for name, value in given.items()}):
        assert torch.allclose(torch.from_numpy(session(feeds)["output"]), expected, atol=1e-5)
    found = tdq.EngineDenoiser(session, model)(**given)
    assert torch.allclose(found[0], expected, atol=1e-5)


class Rotated(nn.Module):
    """Rotary embeddings as Qwen-Image has them: a table of complex numbers, of which rows are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        angles = torch.outer(torch.arange(16.0), 1 / 10 ** torch.arange(4.0))
        self.table = torch.polar(torch.ones_like(angles), angles)  # an attribute, no buffer

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        rows = self.table[torch.arange(sample.shape[1])].unsqueeze(0)
        h = self.first(sample * (1 + timestep.reshape(-1, 1, 1) / 100))
        turned = torch.view_as_complex(h.unflatten(-1, (4, 2)).contiguous()) * rows
        return self.second(torch.view_as_real(turned).flatten(-2))


@pytest.mark.parametrize("dynamic", [False, True])
def test_exported(dynamic: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession

    torch.manual_seed(0)
    model = quantized(Rotated().eval(), [(noise(2, 5, 8, seed=i), torch.tensor(t)) for i, t in enumerate(TIMES)])
    sample = {"sample": noise(2, 5, 8, seed=9), "timestep": torch.tensor(TIMES[1])}
    tdq.export_onnx(model, tmp_path / "m.onnx", sample, dynamic_batch=dynamic)
    session = OnnxRuntimeSession(tmp_path / "m.onnx")
    given = noise(3 if dynamic else 2, 5, 8, seed=11)
    found = session({"sample": given.numpy(), "timestep": sample["timestep"].numpy()})[session.outputs[0]]
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(found), model(given, sample["timestep"]), atol=1e-5)
