"""Arguments in lists, mappings and objects, and arguments that are no tensors, from torch to a swapped denoiser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from diffusers import UNet2DConditionModel
from support.models import noise
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq import TdqError

_RESIDUALS = [(8, 8), (8, 8)]


def _call(seed: int, time: float, strength: float = 0.2) -> dict[str, Any]:
    """One call as ControlNet's pipelines make it."""
    return {
        "sample": noise(1, 4, 8, 8, seed=seed),
        "timestep": torch.tensor([time]),
        "encoder_hidden_states": torch.ones(1, 3, 8),
        "down_block_additional_residuals": [torch.full((1, c, s, s), strength) for c, s in _RESIDUALS],
        "mid_block_additional_residual": torch.full((1, 8, 8, 8), strength),
    }


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    ).eval()
    config = tdq.make_config(progress=False, protect_steps=False, weights="max")
    return mtq.quantize(model, config, lambda m: [m(**_call(i, t)) for i, t in enumerate((900.0, 500.0, 100.0))])


@torch.no_grad()
def test_tensors_in_a_list_are_inputs_of_the_engine(unet: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "unet.onnx"
    tdq.export_onnx(unet, path, _call(0, 500.0))
    session = tdq.open_session(path)
    assert {f"down_block_additional_residuals.{i}" for i in range(2)} < set(session.inputs)
    engine = tdq.EngineDenoiser(session, unet)
    for strength in (0.2, 3.0):  # what it was exported with, and another
        call = _call(8, 500.0, strength)  # in which no code lies within float rounding of the next
        expected = unet(**call).sample
        found = engine(call.pop("sample"), call.pop("timestep"), **call).sample
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    fewer = _call(7, 500.0)
    fewer["down_block_additional_residuals"] = fewer["down_block_additional_residuals"][:1]
    with pytest.raises(TdqError, match="did not pass") as raised:
        engine(**fewer)
    assert raised.value.value == ["down_block_additional_residuals.1"]


class Conditional(nn.Module):
    """Takes numbers, flags, words and nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        extra: dict[str, Any] | None = None,
        strength: float = 1.0,
        flag: bool = False,
        kind: str = "soft",
        return_dict: bool = True,
    ) -> tuple[Tensor]:
        x = sample * strength
        for item in (extra or {}).get("images", []):
            x = x + item
        x = self.a(-x if flag else x)
        return (torch.tanh(x) if kind == "soft" else x,)


@torch.no_grad()
def test_another_value_of_what_is_part_of_the_graph_is_refused_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    times = (900.0, 500.0, 100.0)
    config = tdq.make_config(progress=False, protect_steps=False, high_precision=())
    model = mtq.quantize(
        Conditional().eval(),
        config,
        lambda m: [m(noise(2, 8, seed=i), torch.tensor(t), strength=0.5) for i, t in enumerate(times)],
    )
    x, t, extra = noise(2, 8, seed=9), torch.tensor(500.0), {"images": [noise(2, 8), noise(2, 8, seed=1)], "scale": 2}
    tdq.export_onnx(model, tmp_path / "m.onnx", {"sample": x, "timestep": t, "extra": extra, "strength": 0.5})
    session: Any = tdq.open_session(tmp_path / "m.onnx")
    engine = tdq.EngineDenoiser(session, model)
    assert set(session.inputs) == {"sample", "timestep", "extra.images.0", "extra.images.1"}

    def run(**changes: Any) -> Tensor:
        call = {"sample": x, "timestep": t, "extra": extra, "strength": 0.5, "return_dict": False, **changes}
        return engine(**call)[0]

    expected = model(x, t, extra, 0.5)[0]
    torch.testing.assert_close(run(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(run(flag=False, kind="soft"), expected, rtol=1e-5, atol=1e-6)  # the defaults
    other = {"images": [noise(2, 8, seed=3), noise(2, 8, seed=4)], "scale": 2}
    torch.testing.assert_close(run(extra=other), model(x, t, other, 0.5)[0], rtol=1e-5, atol=1e-6)
    for name, changes in {
        "strength": {"strength": 1.0},
        "flag": {"flag": True},
        "kind": {"kind": "hard"},
        "extra.scale": {"extra": {**extra, "scale": 3}},
    }.items():
        with pytest.raises(TdqError, match="part of its graph") as raised:
            run(**changes)
        assert raised.value.field == name
    with pytest.raises(TdqError) as raised:  # left out, it is 1.0, and the engine has 0.5
        engine(x, t, extra, return_dict=False)
    assert raised.value.field == "strength"
