"""What one model family adds to the five steps: which pipeline it is, how it is called, and a tiny one of its kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


def _prompt(prompt: str) -> dict[str, Any]:
    return {"prompt": prompt}


@dataclass(frozen=True)
class Family:
    """One kind of pipeline.

    Attributes:
        name: Of the family, and of its default output folder.
        pipeline: Class in diffusers.
        model: Hub id of the usual model.
        denoiser: Name of the component to quantize.
        tiny: Makes a pipeline of the same kind from small random parts, without text encoders.
        tiny_call: Its arguments in place of prompt number i.
        prompts: For calibration, and the first of them for images, where the user passes none.
        call: The pipeline's arguments for one prompt.
        settings: Further arguments of every call of the real pipeline.
        sized: Whether the pipeline takes a height and a width.
        steps: Of the images, where the user does not say.
    """

    name: str
    pipeline: str
    model: str
    denoiser: str
    tiny: Callable[[], Any]
    tiny_call: Callable[[int], dict[str, Any]]
    prompts: Sequence[str]
    call: Callable[[str], dict[str, Any]] = _prompt
    settings: Mapping[str, Any] = field(default_factory=dict)
    sized: bool = True
    steps: int = 30


#: Different subjects, styles and lengths: what activations depend on.
PROMPTS = (
    "a photo of a cat on a wooden table",
    "an oil painting of a harbour at sunset, by an impressionist",
    "a close-up portrait of an old fisherman, dramatic light, 85mm",
    "a red bicycle",
    "isometric voxel art of a castle in the clouds",
    "a bowl of ramen, top view, food photography",
    "a wide shot of a snowy mountain range under the milky way, long exposure, highly detailed",
    "a watercolour of a fox in an autumn forest",
)
