"""Models with a time for each token or frame, in which none knows of the others: each is as if all had its time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from torch import Tensor, nn

from modelopt_tdq.lab.zoo.video_transformers import ENTRIES as VIDEO_ENTRIES
from modelopt_tdq.lab.zoo.wan import ENTRIES as WAN_ENTRIES
from support.models import fast_config, noise

ZOO = (*WAN_ENTRIES, *VIDEO_ENTRIES)
TIMES = (0.0, 300.0, 600.0, 900.0)


class Tokens(nn.Module):
    """[B, N, 8] at times [B], [B, N]: a linear layer, one over tokens in a plane, one over all tokens of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 12)
        self.point = nn.Conv1d(12, 12, 1)
        self.flat = nn.Linear(12, 8)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        time = timestep.float().reshape(timestep.shape[0], -1, 1) / 1000
        h = torch.nn.functional.gelu(self.first(sample * (0.1 + 3 * time)))
        h = self.point((h * (2 - time)).transpose(1, 2)).transpose(1, 2)
        return self.flat(torch.nn.functional.silu(h).flatten(0, 1)).reshape(sample.shape)


class Frames(nn.Module):
    """[B, 4, F, 4, 4] at times [B], [B, F]: frames in a dimension, in the batch, and as tokens of patches of 2 x 2."""

    def __init__(self) -> None:
        super().__init__()
        self.volume = nn.Conv3d(4, 6, (1, 3, 3), padding=(0, 1, 1))
        self.image = nn.Conv2d(6, 4, 3, padding=1)
        self.patches = nn.Linear(16, 16)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        time = timestep.float().reshape(timestep.shape[0], 1, -1, 1, 1) / 1000
        batch, _, frames = sample.shape[:3]
        h = self.volume(sample * (0.1 + 3 * time))
        h = self.image(torch.nn.functional.silu(h).transpose(1, 2).flatten(0, 1))  # [B F, 4, 4, 4]
        h = h.unflatten(2, (2, 2)).unflatten(4, (2, 2)).permute(0, 2, 4, 1, 3, 5)  # [B F, 2, 2, 4, 2, 2]
        h = self.patches(h.reshape(batch, frames * 4, 16))
        h = h.reshape(batch, frames, 2, 2, 4, 2, 2).permute(0, 4, 1, 2, 5, 3, 6)
        return h.reshape(batch, 4, frames, 4, 4)


SHAPES: dict[type[nn.Module], tuple[int, ...]] = {Tokens: (5, 8), Frames: (4, 3, 4, 4)}


def sample(kind: type[nn.Module], batch: int = 2, seed: int = 0) -> Tensor:
    """The data of a call."""
    return noise(batch, *SHAPES[kind], seed=seed)


def different(kind: type[nn.Module], batch: int = 2, seed: int = 0, among: Sequence[float] = TIMES) -> Tensor:
    """Times [batch, N], those of a sample not all the same."""
    parts = SHAPES[kind][1 if kind is Frames else 0]
    picked = torch.randint(len(among), (batch, parts), generator=torch.Generator().manual_seed(seed))
    picked[:, 0], picked[:, 1] = 0, len(among) - 1
    return torch.tensor(among)[picked]


def quantized(kind: type[nn.Module], forward_loop: Callable[[nn.Module], None] | None = None, **fields: Any) -> Any:
    """Calibrated with one time per call, if not by another loop."""

    def one_time(model: nn.Module) -> None:
        for seed, time in enumerate(TIMES):
            model(sample(kind, seed=seed), torch.tensor([time]))

    torch.manual_seed(0)
    model = kind().eval()
    return mtq.quantize(model, fast_config(**fields), one_time if forward_loop is None else forward_loop)


def token_by_token(model: nn.Module, x: Tensor, times: Tensor) -> Tensor:
    """What the model gives where every token or frame is taken from a call in which all have its time."""
    with torch.no_grad():
        output = torch.full_like(x, torch.nan)
        for time in times.unique().tolist():
            one = model(x, torch.tensor([time]))
            mask = times == time  # [B, N]
            mask = mask[:, None, :, None, None] if x.dim() == 5 else mask[:, :, None]
            output = torch.where(mask, one, output)
    return output


def video_call(name: str, times: Tensor, seed: int = 0) -> dict[str, Any]:
    """Arguments of a call of a tiny model of diffusers' class ``name``, at the times [B, 2] of its two frames."""
    entry = next(entry for entry in ZOO if entry.name == name)
    inputs = entry.inputs(len(times), 500.0, seed)
    inputs["timestep"] = times
    if name == "WanTransformer3DModel":  # those of tokens, 4 x 4 in a frame
        inputs["timestep"] = times.repeat_interleave(16, 1)
    elif name == "SkyReelsV2Transformer3DModel":
        inputs["enable_diffusion_forcing"] = True
    elif name == "CosmosTransformer3DModel":
        inputs["timestep"] = times.reshape(-1, 1, 2, 1, 1)
    else:
        inputs["r_timestep"] = times / 2
    return inputs


#: Samples in a call: SkyReels' class adds the numbers of frames per second to one sample only.
VIDEOS = {
    "WanTransformer3DModel": 2,
    "SkyReelsV2Transformer3DModel": 1,
    "AnyFlowTransformer3DModel": 2,
    "CosmosTransformer3DModel": 2,
}


def quantized_video(name: str, **fields: Any) -> Any:
    """Calibrated on calls in which all frames have one time, as text-to-video has."""

    def forward_loop(model: nn.Module) -> None:
        for time in TIMES:
            model(**video_call(name, torch.full((VIDEOS[name], 2), time)))

    entry = next(entry for entry in ZOO if entry.name == name)
    return mtq.quantize(entry.build(), fast_config(**fields), forward_loop)
