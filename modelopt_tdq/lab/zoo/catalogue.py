"""All entries, and the classes that have none."""

from __future__ import annotations

from collections.abc import Mapping

from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.zoo import (
    audio,
    controlnets,
    image_transformers,
    joint_transformers,
    packed_transformers,
    priors,
    unets,
    video_transformers,
    wan,
)
from modelopt_tdq.lab.zoo.entry import Entry

__all__ = ["ENTRIES", "SKIPPED", "find_entry"]

_FILES = (
    unets,
    image_transformers,
    packed_transformers,
    video_transformers,
    wan,
    joint_transformers,
    audio,
    priors,
    controlnets,
)

#: By name of the class.
ENTRIES: Mapping[str, Entry] = {entry.name: entry for module in _FILES for entry in module.ENTRIES}

#: Classes with a time in their signature that have no entry, and why.
SKIPPED: Mapping[str, str] = {
    "CosmosControlNetModel": "its forward resizes a mask by torchvision, which nothing else here needs",
    "TransformerTemporalModel": "its blocks take the time and never read it",
    "WanAnimate2Transformer3DModel": (
        "its denoising pass needs the cache that a pass at another time has filled, and a mask from torch.compile"
    ),
}


def find_entry(name: str) -> Entry:
    """The entry of this class.

    Raises:
        TdqError: There is none.
    """
    if name not in ENTRIES:
        problem = SKIPPED.get(name, "the zoo has no such class")
        raise TdqError("name", name, problem, f"Choose one of {', '.join(ENTRIES)}")
    return ENTRIES[name]
