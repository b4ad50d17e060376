"""Small random parts of pipelines: what runs offline, in seconds, on a CPU."""

from __future__ import annotations

from typing import Any

import torch

TEXT, WIDTH, SIZE = 5, 16, 8  # tokens of a prompt, width of their embeddings, height and width of an image


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(make: Any, **config: Any) -> Any:
    """A random model, the same every time, in eval mode and without layers of zeros, behind which nothing shows."""
    torch.manual_seed(0)
    model = make(**config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(parameter.any()):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def autoencoder(latent_channels: int = 4) -> Any:
    """Keeps the size: one pixel per latent."""
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=latent_channels, shift_factor=0.0
    ).eval()


def text(number: int) -> dict[str, Any]:
    """In place of prompt ``number``: its embeddings [1, TEXT, WIDTH]."""
    return {"prompt_embeds": noise(1, TEXT, WIDTH, seed=10 * number + 1)}


def negative_text(number: int) -> dict[str, Any]:
    return {"negative_prompt_embeds": noise(1, TEXT, WIDTH, seed=10 * number + 2)}


def pooled(number: int) -> dict[str, Any]:
    return {"pooled_prompt_embeds": noise(1, WIDTH, seed=10 * number + 3)}


def negative_pooled(number: int) -> dict[str, Any]:
    return {"negative_pooled_prompt_embeds": noise(1, WIDTH, seed=10 * number + 4)}


def size() -> dict[str, Any]:
    return {"height": SIZE, "width": SIZE}
