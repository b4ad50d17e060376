"""Where the bundled model lies: inside the installed package, or in the source checkout."""

from __future__ import annotations

from pathlib import Path

from modelopt_tdq.errors import TdqError

__all__ = ["bundled_model"]


def bundled_model() -> Path:
    """Folder of the bundled CIFAR-10 denoiser: a diffusers ``UNet2DModel``, its scheduler in ``scheduler/``.

    Raises:
        TdqError: It was left out of this installation.
    """
    here = Path(__file__).resolve().parent
    places = (here / "model", here.parents[2] / "trt_examples" / "ddim_cifar10" / "model")
    for place in places:
        if (place / "diffusion_pytorch_model.safetensors").is_file():
            return place
    raise TdqError(
        "model", str(places[0]), "the bundled model is not installed", "Install modelopt-tdq again, or pass --model"
    )
