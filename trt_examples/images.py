"""Images of the same seed by several pipelines, side by side, and how far apart they are."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from modelopt_tdq.core.metrics import psnr_db
from modelopt_tdq.lab.report.plots import image_grid


@dataclass(frozen=True)
class Images:
    """Label to images [N, 3, H, W] in [-1, 1]; N is the number of frames of a video."""

    rows: Mapping[str, torch.Tensor]

    def psnr(self, reference: str, label: str) -> float:
        """In dB."""
        return psnr_db(self.rows[reference], self.rows[label])

    def error(self, reference: str, label: str) -> float:
        """Mean squared error."""
        return float((self.rows[reference].double() - self.rows[label].double()).square().mean())

    def save(self, path: Path) -> Path:
        """At most 8 of each, one row per label."""
        return image_grid({label: images[:: -(-len(images) // 8)] for label, images in self.rows.items()}, path)

    def __str__(self) -> str:
        return "\n".join(f"{b} against {a}: {self.psnr(a, b):.1f} dB PSNR" for a, b in pairwise(self.rows))


def compared(pipelines: Mapping[str, Callable[[], Any]], call: Mapping[str, Any], seed: int) -> Images:
    """The images of each pipeline from the same noise; one pipeline is in memory at a time."""
    rows = {}
    for label, make in pipelines.items():
        pipeline = make()
        pipeline.set_progress_bar_config(desc=label)
        rows[label] = _sampled(pipeline, call, seed)
        del pipeline
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return Images(rows)


def _sampled(pipeline: Any, call: Mapping[str, Any], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    wanted = {"output_type": "pt"} if "output_type" in inspect.signature(pipeline.__call__).parameters else {}
    found = pipeline(**call, generator=generator, **wanted)[0]
    images = torch.as_tensor(found).float().cpu()
    return images.flatten(0, -4) * 2 - 1  # [B, C, H, W], or [B, F, C, H, W] for a video
