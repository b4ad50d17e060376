"""Every kind of layer that export knows, side by side: each one's input is the input of the model."""

from __future__ import annotations

from typing import Any

import modelopt.torch.quantization as mtq
import torch
from torch import Tensor, nn

import modelopt_tdq as tdq

ROWS = [0.0, 250.0, 500.0, 999.0]

#: Layers whose quantized operands are products of activations.
ATTENTIONS = ("attention", "attention_bmm")


class Zoo(nn.Module):
    """Outputs one tensor per layer, in the order of ``names``."""

    def __init__(self) -> None:
        from diffusers.models.attention_processor import Attention, AttnProcessor

        super().__init__()
        self.images = nn.ModuleDict(
            {
                "plain": nn.Conv2d(8, 6, 1),
                "padded": nn.Conv2d(8, 6, 3, padding=1),
                "strided": nn.Conv2d(8, 6, (3, 5), stride=2, padding=(2, 1), bias=False),
                "grouped": nn.Conv2d(8, 6, 3, padding=1, groups=2),
                "depthwise": nn.Conv2d(8, 16, 3, padding=1, groups=8),
                "dilated": nn.Conv2d(8, 6, 3, padding=2, dilation=2),
                "same": nn.Conv2d(8, 6, 4, padding="same"),
                "reflected": nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"),
                "transposed": nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1),
                "transposed_grouped": nn.ConvTranspose2d(8, 6, 3, groups=2, bias=False),
            }
        )
        self.volumes = nn.ModuleDict({"conv3d": nn.Conv3d(8, 6, (1, 3, 3), padding=(0, 1, 1))})
        self.sequences = nn.ModuleDict(
            {"conv1d": nn.Conv1d(8, 6, 3, padding=1), "conv1d_bare": nn.Conv1d(8, 6, 2, bias=False)}
        )
        self.tokens = nn.ModuleDict({"linear3d": nn.Linear(8, 6), "linear3d_bare": nn.Linear(8, 6, bias=False)})
        self.vectors = nn.ModuleDict({"linear2d": nn.Linear(8, 6), "linear2d_bare": nn.Linear(8, 6, bias=False)})
        self.twice = nn.Linear(8, 6)
        self.attention = Attention(8, heads=2, dim_head=4)
        self.attention_bmm = Attention(8, heads=2, dim_head=4, processor=AttnProcessor())
        with torch.no_grad():
            for attention in (self.attention, self.attention_bmm):
                for layer in (attention.to_q, attention.to_k, attention.to_v):
                    # sums of sixteenths are exact, so that no code of a product depends on the order of a sum
                    layer.weight.copy_(torch.randint(-16, 17, layer.weight.shape) / 16)

    @property
    def names(self) -> list[str]:
        groups = ("images", "volumes", "sequences", "tokens", "vectors")
        return [f"{g}.{n}" for g in groups for n in getattr(self, g)] + ["twice", "twice", *ATTENTIONS]

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        sequence = sample.flatten(2)
        tokens = sequence.transpose(1, 2)
        vector = sample[:, :, 0, 0]
        return (
            *(layer(sample) for layer in self.images.values()),
            *(layer(sample.unsqueeze(2)) for layer in self.volumes.values()),
            *(layer(sequence) for layer in self.sequences.values()),
            *(layer(tokens) for layer in self.tokens.values()),
            *(layer(vector) for layer in self.vectors.values()),
            self.twice(tokens),
            self.twice(vector),
            self.attention(tokens),
            self.attention_bmm(tokens),
        )


def sample(batch: int = 2, seed: int = 0) -> Tensor:
    """[B, 8, 6, 6] multiples of 1/16."""
    generator = torch.Generator().manual_seed(seed)
    return torch.round(torch.randn(batch, 8, 6, 6, generator=generator) * 16) / 16


def quantized_zoo(dtype: torch.dtype = torch.float32, algorithm: Any = None, **fields: Any) -> Zoo:
    """A calibrated Zoo: all layers, and the products of both attentions but for the softmax."""
    torch.manual_seed(0)
    model = Zoo().eval().to(dtype)
    fast = {"statistic": "max", "weights": "max", "protect_steps": False, "progress": False, "conv_transpose": True}
    config = tdq.make_config(**{**fast, **fields})
    config["quant_cfg"] += [
        {"quantizer_name": f"*{name}.{operand}_bmm_quantizer", "cfg": {"num_bits": 8, "axis": None}}
        for name in ATTENTIONS
        for operand in "qkv"
    ]
    config["quant_cfg"].append({"quantizer_name": "*attention*.to_*", "enable": False})
    if algorithm is not None:
        config["algorithm"] = algorithm

    def forward_loop(quantized: nn.Module) -> None:
        for index, time in enumerate(ROWS):
            quantized(sample(seed=index).to(dtype), torch.tensor(time))

    return mtq.quantize(model, config, forward_loop)
