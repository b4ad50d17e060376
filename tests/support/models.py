"""Tiny random models of the families that mtq.quantize has to take, and data to calibrate them with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.model.timestep import find_timestep
from trt_examples.dit import dit
from trt_examples.flux import flux
from trt_examples.sd3 import sd3
from trt_examples.stable_diffusion import stable_diffusion

#: Times of a short sampling schedule, in the order in which a sampler visits them.
TIMES = (900.0, 600.0, 300.0, 20.0)


class TinyDenoiser(nn.Module):
    """A plain torch module: convolutions, a linear, a skip connection and a time embedding."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.time_embedding = nn.Linear(2, channels)
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.mix = nn.Linear(channels, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor | float, context: Tensor | None = None) -> Tensor:
        t = torch.as_tensor(timestep).to(sample).reshape(-1, 1) / 1000
        h = self.conv_in(sample) * (0.2 + t[:, :, None, None])
        h = h + self.time_embedding(torch.cat([t, t.square()], 1))[:, :, None, None]
        h = h + self.conv1(torch.nn.functional.silu(h))
        h = h + self.mix(torch.nn.functional.silu(h).movedim(1, -1)).movedim(-1, 1)
        if context is not None:
            h = h * context[:, :, None, None]
        return self.conv_out(self.conv2(torch.nn.functional.silu(h)))


class SigmaDenoiser(TinyDenoiser):
    """The same, with its time in an argument of another name, as in k-diffusion."""

    def forward(self, sample: Tensor, sigma: Tensor | float) -> Tensor:  # type: ignore[override]
        return super().forward(sample, sigma)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float32, the same for the same arguments."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def calls(
    samples: int = 4, batch: int = 2, times: Sequence[float] = TIMES, seed: int = 0, order: Sequence[int] | None = None
) -> list[tuple[Tensor, Tensor]]:
    """(sample [batch, 3, 8, 8], time []) pairs: the same samples, whatever the batch size and their order."""
    found = []
    order = range(samples) if order is None else order
    for step, time in enumerate(times):
        data = torch.cat([noise(1, 3, 8, 8, seed=seed + 1000 * step + i) for i in order])
        found += [(part, torch.tensor(time)) for part in data.split(batch)]
    return found


def loop(data: Sequence[tuple[Tensor, Tensor]]) -> Callable[[nn.Module], None]:
    """A forward_loop over ``data``."""

    def forward_loop(model: nn.Module) -> None:
        for sample, time in data:
            model(sample, time)

    return forward_loop


def at(model: nn.Module, time: Any) -> AbstractContextManager[None]:
    """Parts of ``model`` may run by themselves meanwhile, at this time or these times."""
    timestep = find_timestep(model)
    assert timestep is not None
    return timestep.at(torch.as_tensor(time, dtype=torch.float32).reshape(-1))


def fast_config(**fields: Any) -> dict[str, Any]:
    """The INT8 preset with statistics that take no second look at the model and the weights, and no corrections."""
    fast = {"statistic": "max", "weights": "max", "protect_steps": False, "progress": False}
    if fields.get("method", "tdq") in ("tdq", "tdq_reconstruct", "tdq_temporal"):
        fast["correction"] = "none"
    return tdq.make_config(**{**fast, **fields})


def quantized(model: nn.Module | None = None, data: Sequence[Any] | None = None, **fields: Any) -> nn.Module:
    """A calibrated TinyDenoiser, or ``model``."""
    torch.manual_seed(0)
    model = TinyDenoiser().eval() if model is None else model
    return mtq.quantize(model, fast_config(**fields), loop(calls() if data is None else data))


@dataclass(frozen=True)
class Family:
    """One kind of diffusion model: how to make it and how to call it."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int, Tensor, int], dict[str, Any]]

    def data(self, batch: int = 2, times: Sequence[float] = TIMES, seed: int = 0) -> list[dict[str, Any]]:
        """Keyword arguments of one call per time."""
        return [self.inputs(batch, torch.tensor(t), seed + i) for i, t in enumerate(times)]

    def forward_loop(self, batch: int = 2) -> Callable[[nn.Module], None]:
        """Calls the model once per time."""

        def run(model: nn.Module) -> None:
            for arguments in self.data(batch):
                model(**arguments)

        return run


def _unet() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def _small_unet() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )


def unet_condition() -> nn.Module:
    """The denoiser of the example, with a second level."""
    blocks: dict[str, Any] = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    model: nn.Module = stable_diffusion.tiny_denoiser(**blocks)
    return model


def _cogvideox() -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        patch_size=2,
        max_text_seq_length=5,
    )


def _plain_inputs(batch: int, time: Tensor, seed: int) -> dict[str, Any]:
    return {"sample": noise(batch, 3, 8, 8, seed=seed), "timestep": time}


def _unet_condition_inputs(batch: int, time: Tensor, seed: int) -> dict[str, Any]:
    """A batch for classifier-free guidance: every latent twice, without and with its text."""
    latent, text = noise(batch, 4, 8, 8, seed=seed), noise(batch, 5, 16, seed=seed + 100)
    return {
        "sample": torch.cat([latent, latent]),
        "timestep": time,
        "encoder_hidden_states": torch.cat([torch.zeros_like(text), text]),
    }


def _dit_inputs(batch: int, time: Tensor, seed: int) -> dict[str, Any]:
    labels = torch.arange(seed, seed + batch) % 10
    return {"hidden_states": noise(batch, 4, 8, 8, seed=seed), "timestep": time.expand(batch), "class_labels": labels}


def _cogvideox_inputs(batch: int, time: Tensor, seed: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 2, 4, 8, 8, seed=seed),
        "encoder_hidden_states": noise(batch, 5, 16, seed=seed + 100),
        "timestep": time.expand(batch),
    }


def _sd3_inputs(batch: int, time: Tensor, seed: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 4, 8, 8, seed=seed),
        "timestep": time.expand(batch),
        "encoder_hidden_states": noise(batch, 5, 16, seed=seed + 100),
        "pooled_projections": noise(batch, 16, seed=seed + 200),
    }


def _flux_inputs(batch: int, time: Tensor, seed: int, guidance: bool) -> dict[str, Any]:
    row, column = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    return {
        "hidden_states": noise(batch, 16, 4, seed=seed),
        "timestep": time.expand(batch) / 1000,
        "encoder_hidden_states": noise(batch, 5, 16, seed=seed + 100),
        "pooled_projections": noise(batch, 16, seed=seed + 200),
        "guidance": torch.full((batch,), 3.5) if guidance else None,
        "img_ids": torch.stack([torch.zeros(16), row.flatten(), column.flatten()], 1),
        "txt_ids": torch.zeros(5, 3),
    }


FAMILIES = {
    "plain": Family(TinyDenoiser, _plain_inputs),
    "unet": Family(_unet, _plain_inputs),
    "unet_condition": Family(unet_condition, _unet_condition_inputs),
    "dit": Family(lambda: dit.tiny_denoiser(classes=10), _dit_inputs),
    "sd3": Family(sd3.tiny_denoiser, _sd3_inputs),
    "flux": Family(lambda: flux.tiny_denoiser(guidance=False), lambda b, t, s: _flux_inputs(b, t, s, False)),
    "flux_guidance": Family(flux.tiny_denoiser, lambda b, t, s: _flux_inputs(b, t, s, True)),
    "cogvideox": Family(_cogvideox, _cogvideox_inputs),
}

#: One level, with attention in the middle: to be exported in half the time of the other UNet.
SMALL_UNET = Family(_small_unet, _plain_inputs)

#: The denoiser of the example as it is, for the same reason.
SMALL_UNET_CONDITION = Family(stable_diffusion.tiny_denoiser, _unet_condition_inputs)
