"""The terrain model: a converged denoiser of height maps, conditioned on sigma and on a difficulty.

A U-Net with 10.5 M parameters and 255 layers, distilled as a consistency model: it predicts the clean map, from almost
nothing but noise at once, or over several sigmas. Its weights come from the PyPI package
``adaptive-terrain-diffusion`` (MIT), which holds them as an ONNX file for ONNX Runtime; here they are put into torch,
so that the model can be quantized. It is the one reference model that is converged.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modelopt_tdq.core.files import write_text
from modelopt_tdq.errors import MissingExtraError, TdqError, require

__all__ = ["DIFFICULTIES", "INSTALL", "TerrainScheduler", "TerrainUNet", "load_terrain", "terrain_file"]

#: Without its dependencies: it asks for onnxruntime-gpu, which overwrites the files of onnxruntime.
INSTALL = "pip install --no-deps adaptive-terrain-diffusion==0.4.2"
_CURE = f"Run {INSTALL} (its dependencies would clash with onnxruntime)"

#: Sigma at the start and at the end of a trajectory, in units of the maps, whose own deviation is about 0.5.
SIGMA_MAX, SIGMA_MIN = 80.0, 0.08

#: Of the classes 0 to 4, from flat (0) to rough (1); in an order in which a few samples cover the range already.
DIFFICULTIES = (0.1, 0.9, 0.5, 0.3, 0.7)

_SIGMA_DATA, _SIGMA_LEAST = 0.5, 0.002  # of the training, as in Song et al. 2023 (consistency models), appendix C
_GROUPS = 32
_HEAD = 32

#: Files of a saved model, by the names that diffusers and ModelOpt give them, and what its config holds for __init__.
_CONFIG, _WEIGHTS, _STATE = "config.json", "diffusion_pytorch_model.safetensors", "modelopt_state.pth"
_ARGUMENTS = ("sample_size", "channels", "attention", "blocks", "embedding")


class _ResBlock(nn.Module):
    """Two convolutions; the embedding scales and shifts what the second one sees."""

    def __init__(self, inputs: int, outputs: int, embedding: int, resample: str | None = None) -> None:
        super().__init__()
        self.resample = resample
        self.in_layers = nn.Sequential(nn.GroupNorm(_GROUPS, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, 1, 1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * outputs))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(_GROUPS, outputs), nn.SiLU(), nn.Identity(), nn.Conv2d(outputs, outputs, 3, 1, 1)
        )
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample is None:
            return x
        return F.avg_pool2d(x, 2) if self.resample == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        norm, activation, convolution = self.in_layers
        hidden = convolution(self._resampled(activation(norm(x))))
        scale, shift = self.emb_layers(embedding)[:, :, None, None].chunk(2, 1)
        norm, activation, _, convolution = self.out_layers
        hidden = convolution(activation(norm(hidden) * (1.0 + scale) + shift))
        result: Tensor = self.skip_connection(self._resampled(x)) + hidden
        return result


class _Attention(nn.Module):
    """Self-attention over the pixels, in heads of 32 channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(_GROUPS, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        heads = self.qkv(self.norm(x)).unflatten(1, (3, -1, _HEAD)).flatten(4)  # [B, 3, heads, 32, pixels]
        query, key, value = heads.transpose(3, 4).unbind(1)
        found = F.scaled_dot_product_attention(query, key, value)
        result: Tensor = x + self.proj_out(found.transpose(2, 3).reshape(x.shape))
        return result


class _Block(nn.ModuleList):
    """Layers one after the other, which all take the embedding."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, embedding)
        return x


class TerrainUNet(nn.Module):
    """The denoiser, called as a class-conditional model of diffusers is.

    Layers have the names of the file with the weights, except the first, the last, and the embeddings, whose names say
    what they are to :data:`modelopt_tdq.high_precision.HIGH_PRECISION`.

    Args:
        sample_size: Height and width of the maps.
        channels: Of each resolution, the finest first; multiples of 32.
        attention: For each resolution, whether its blocks attend.
        blocks: At each resolution on the way down; one more on the way up.
        embedding: Channels of the embedding.
    """

    difficulties: Tensor
    frequencies: Tensor

    def __init__(
        self,
        sample_size: int = 128,
        channels: Sequence[int] = (32, 32, 64, 96, 128),
        attention: Sequence[bool] = (False, False, True, True, True),
        blocks: int = 4,
        embedding: int = 128,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "sample_size": sample_size,
            "channels": list(channels),
            "attention": list(attention),
            "blocks": blocks,
            "embedding": embedding,
        }
        width = channels[0]
        self.register_buffer("difficulties", torch.tensor(DIFFICULTIES), persistent=False)
        self.register_buffer("frequencies", torch.logspace(0, -4, width // 2 + 1)[:-1])  # of the phases of log sigma
        self.time_embedding = _embedder(2 * (width // 2), embedding)
        self.difficulty_embedding = _embedder(1, embedding)
        self.conv_in = nn.Conv2d(1, width, 3, 1, 1)
        down, up = nn.ModuleDict(), nn.ModuleDict()
        waiting, last = [width], width

        def block(inputs: int, outputs: int, attends: bool) -> list[nn.Module]:
            layers: list[nn.Module] = [_ResBlock(inputs, outputs, embedding)]
            return [*layers, _Attention(outputs)] if attends else layers

        levels = list(zip(channels, attention, strict=True))
        for level, (count, attends) in enumerate(levels):
            for _ in range(blocks):
                down[str(len(waiting))] = _Block(block(last, count, attends))
                waiting.append(count)
                last = count
            if level + 1 < len(levels):
                down[str(len(waiting))] = _Block([_ResBlock(last, last, embedding, "down")])
                waiting.append(last)
        self.input_blocks = down
        self.middle_block = _Block(
            [_ResBlock(last, last, embedding), _Attention(last), _ResBlock(last, last, embedding)]
        )
        for level, (count, attends) in reversed(list(enumerate(levels))):
            for number in range(blocks + 1):
                layers = block(last + waiting.pop(), count, attends)
                if level and number == blocks:
                    layers.append(_ResBlock(count, count, embedding, "up"))
                up[str(len(up))] = _Block(layers)
                last = count
        self.output_blocks = up
        self.norm_out = nn.GroupNorm(_GROUPS, last)
        self.conv_out = nn.Conv2d(last, 1, 3, 1, 1)
        self.config |= {"in_channels": 1, "num_class_embeds": len(DIFFICULTIES)}

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The clean maps.

        Args:
            sample: [B, 1, H, W] clean maps, in [-1, 1], plus sigma times standard normal noise.
            timestep: [], [1] or [B], sigma > 0.
            class_labels: [B] int64, of :data:`DIFFICULTIES`.

        Returns:
            [B, 1, H, W] in [-1, 1].

        Raises:
            TdqError: There are no labels.
        """
        if class_labels is None:
            raise TdqError("class_labels", None, "the terrain model needs a difficulty for each map", "Pass [B] int64")
        sigma = timestep.to(sample).reshape(-1)
        phase = (250.0 * sigma.log())[:, None] * self.frequencies
        difficulty = self.difficulties[class_labels].to(sample.dtype)[:, None]
        embedding = self.time_embedding(torch.cat([phase.cos(), phase.sin()], 1))
        embedding = embedding + self.difficulty_embedding(difficulty)
        sigma = sigma[:, None, None, None]
        spread = (sigma.square() + _SIGMA_DATA**2).sqrt()
        x: Tensor = self.conv_in(sample / spread)
        waiting = [x]
        for block in self.input_blocks.values():
            x = block(x, embedding)
            waiting.append(x)
        x = self.middle_block(x, embedding)
        for block in self.output_blocks.values():
            x = block(torch.cat([x, waiting.pop()], 1), embedding)
        x = self.conv_out(F.silu(self.norm_out(x)))
        excess = sigma - _SIGMA_LEAST
        kept = _SIGMA_DATA**2 / (excess.square() + _SIGMA_DATA**2)
        return (kept * sample + (_SIGMA_DATA * excess / spread) * x).clamp(-1.0, 1.0)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the weights, the config, and ModelOpt's state if it is quantized, as a model of diffusers does."""
        import modelopt.torch.opt as mto

        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        content = {"_class_name": type(self).__name__, **self.config}
        write_text(target / _CONFIG, json.dumps(content, indent=1) + "\n")
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, str(target / _WEIGHTS))
        if mto.ModeloptStateManager.is_converted(self):
            torch.save(mto.modelopt_state(self), target / _STATE)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], subfolder: str | None = None) -> TerrainUNet:
        """Read what :meth:`save_pretrained` wrote.

        Raises:
            OSError: A file is missing.
            ValueError: The config is not one of this model.
        """
        import modelopt.torch.opt as mto

        source = Path(folder) / (subfolder or "")
        config = json.loads((source / _CONFIG).read_text())
        model = cls(**{name: config[name] for name in _ARGUMENTS})
        if (source / _STATE).is_file():
            mto.restore_from_modelopt_state(model, modelopt_state_path=str(source / _STATE))
        model.load_state_dict(load_file(str(source / _WEIGHTS)))
        return model


def _embedder(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.SiLU(), nn.Linear(outputs, outputs))


@dataclass
class Step:
    """What a scheduler's step gives, as in diffusers."""

    prev_sample: Tensor


class TerrainScheduler:
    """Multistep sampling of a consistency model (Song et al. 2023, algorithm 1): x = x0 + sigma_next * noise.

    The noise is a function of the noise that the trajectory of a sample starts from: a quantized model gets the same
    as full precision, other samples get other noise.
    """

    init_noise_sigma = SIGMA_MAX

    def __init__(self) -> None:
        self.timesteps = torch.empty(0)
        self._generators: list[torch.Generator] = []

    def set_timesteps(self, steps: int) -> None:
        """Begin trajectories of ``steps`` sigmas, [S] float32 in ``timesteps``, with equal ratios."""
        self.timesteps = torch.logspace(0, 1, steps, base=SIGMA_MIN / SIGMA_MAX) * SIGMA_MAX

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """The sample itself: the model scales it."""
        return sample

    def step(self, prediction: Tensor, timestep: Tensor, sample: Tensor) -> Step:
        """Noise the predicted clean maps anew, for the next sigma; the last ones are the result.

        Args:
            prediction: [B, 1, H, W] clean maps.
            timestep: [] of ``timesteps``; trajectories begin at the first.
            sample: [B, 1, H, W] what the model saw.
        """
        number = int((self.timesteps - timestep.cpu()).abs().argmin())
        if number == 0:
            self._generators = [_generator(one) for one in sample]
        if number + 1 == len(self.timesteps):
            return Step(prediction)
        shape = prediction.shape[1:]
        fresh = torch.stack([torch.randn(shape, generator=generator) for generator in self._generators])
        return Step(prediction + self.timesteps[number + 1].to(prediction) * fresh.to(prediction))


def _generator(start: Tensor) -> torch.Generator:
    """Seeded from the values of one sample."""
    digest = hashlib.sha256(start.detach().float().cpu().numpy().tobytes()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def terrain_file() -> Path:
    """The ONNX file with the weights.

    Raises:
        MissingExtraError: The package that holds it is not installed.
    """
    found = find_spec("terrain_diffusion")  # not imported: that would need its dependencies
    for folder in (found and found.submodule_search_locations) or ():
        file = Path(folder) / "weights" / "terrain_consistency_unet_difficulty100.onnx"
        if file.is_file():
            return file
    raise MissingExtraError("model", "terrain", "the package with its weights is not installed", _CURE)


def load_terrain(file: str | os.PathLike[str] | None = None, **config: Any) -> TerrainUNet:
    """The model in eval mode.

    Args:
        file: With the weights; by default that of the installed package.
        **config: Of :class:`TerrainUNet`, if it is another than that of the package.

    Raises:
        MissingExtraError: The package, or the extra ``onnx``, is not installed.
        TdqError: The file holds another model.
    """
    onnx = require("onnx", "onnx")
    source = terrain_file() if file is None else Path(file)
    model = TerrainUNet(**config)
    try:
        weights = _weights(onnx.load(str(source)).graph, model)
        model.load_state_dict(weights)
    except (IndexError, KeyError, RuntimeError, StopIteration) as error:
        problem = f"not the weights of version 0.4.2 ({type(error).__name__}: {error})"
        raise TdqError("model", str(source), problem, _CURE) from error
    return model.eval()


#: Of a layer of the model, by how its name begins: how its name in the file does.
_NAMES = {
    "time_embedding.": "network.time_embed.",
    "difficulty_embedding.": "network.label_emb.",
    "conv_in.": "network.input_blocks.0.0.",
    "conv_out.": "network.out.2.",
}


def _name_in_file(name: str) -> str:
    for ours, theirs in _NAMES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return f"network.{name}"


def _weights(graph: Any, model: TerrainUNet) -> dict[str, Tensor]:
    """The state dict. Convolutions and linear layers keep their names in the graph; group norms have lost theirs."""
    from onnx import numpy_helper

    constants = {each.name: each for each in graph.initializer}

    def constant(name: str) -> Tensor:
        return torch.from_numpy(numpy_helper.to_array(constants[name]).copy())

    readers = {name: node for node in reversed(graph.node) for name in node.input}
    found: dict[str, Tensor] = {}
    normalizations = iter(node for node in graph.node if node.op_type == "InstanceNormalization")
    for name, module in model.named_modules():
        if isinstance(module, nn.GroupNorm):  # modules are in the order of the graph
            scaled = readers[readers[next(normalizations).output[0]].output[0]]  # behind a Reshape
            shifted = readers[scaled.output[0]]
            found[f"{name}.weight"] = constant(scaled.input[1]).flatten()
            found[f"{name}.bias"] = constant(shifted.input[1]).flatten()
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            for parameter in ("weight", "bias"):
                found[f"{name}.{parameter}"] = constant(_name_in_file(f"{name}.{parameter}"))
    angle = readers[next(node for node in graph.node if node.op_type == "Log").output[0]]  # times 250
    phase = readers[readers[angle.output[0]].output[0]]  # behind an Unsqueeze
    return found | {"frequencies": constant(phase.input[1]).flatten()}
