"""What an interrupted reconstruction leaves in ``cache_dir``: its settings, and every finished block."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.place import execution_device
from modelopt_tdq.reconstruction import files, fingerprint
from modelopt_tdq.reconstruction.config import TdqReconstructConfig
from modelopt_tdq.reconstruction.learn import BlockParts
from modelopt_tdq.reconstruction.samples import Samples

__all__ = ["BlockResult", "Progress"]


@dataclass(frozen=True)
class BlockResult:
    """How the reconstruction of one block went.

    Attributes:
        name: Of the block.
        layers: Its quantized layers.
        error_before: Mean squared error of its output, calibrated; over the samples.
        error_after: The same, reconstructed.
        kept: Whether the reconstruction is used; else the block stays as calibrated.
        note: Why it was not reconstructed, if it was not.
    """

    name: str
    layers: tuple[str, ...]
    error_before: float
    error_after: float
    kept: bool
    note: str = ""


#: What a difference of the computed numbers means, by their name.
_MEANINGS = {
    "calibrated": ("forward_loop", "it calibrates other scales than in the run that is to be resumed"),
    "zero points": ("forward_loop", "it calibrates other zero points than in the run that is to be resumed"),
    "times": ("forward_loop", "it records other times than in the run that is to be resumed"),
    "samples": ("forward_loop", "it records other samples than in the run that is to be resumed"),
    "output": ("model", "it predicts something else, in full precision, than in the run that is to be resumed"),
}


class Progress:
    """Finished blocks on disk.

    Args:
        folder: ``cache_dir``.
        model: Calibrated; its weights untouched.
        config: Of the run.
        calibrated: [K, Q] scales at the start.
        samples: Of the run.
        blocks: Names, in order.

    Raises:
        TdqError: The folder holds a run with other settings, formats, samples, versions or another model, or is
            damaged.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        config: TdqReconstructConfig,
        calibrated: Tensor,
        samples: Samples,
        blocks: list[str],
    ) -> None:
        self.folder = folder
        start = fingerprint.settings(model, config, samples, blocks)
        numbers = fingerprint.computed(model, calibrated, samples)
        stem = folder / "run"
        if not files.is_complete(stem):
            files.write(stem, numbers, start)
            return
        tensors, was = files.read(stem, torch.device("cpu"))
        self._compare(start, was)
        name = fingerprint.difference(numbers, tensors)
        if name is not None:
            weights = ("model", f"{name.removeprefix('quantizer/')} differs from that of the run that is to be resumed")
            field, problem = _MEANINGS.get(name, weights)
            raise TdqError(
                field, str(folder), problem, "Use the model, data and seeds of that run, or another `cache_dir`"
            )

    def _compare(self, now: dict[str, Any], was: dict[str, Any]) -> None:
        cure = "Resume with the settings of that run, or pass another `cache_dir`"

        def refuse(field: str, value: Any, before: Any) -> None:
            raise TdqError(field, value, f"the run in {self.folder} was started with {before!r}", cure)

        def same(kind: str, field: str = "") -> None:
            before = was.get(kind, {})
            for name in {**now[kind], **before}:
                value = now[kind].get(name)
                if before.get(name) != value:
                    refuse(field or name, f"{name}: {value}" if field else value, before.get(name))

        same("versions", "cache_dir")
        same("config")
        model = was.get("model", {})
        for name, other in (("weights", "other weights"), ("layers", "other layers, or layers of other settings")):
            if now["model"][name] != model.get(name):
                raise TdqError("model", name, f"the run in {self.folder} was started on a model with {other}", cure)
        same("formats", "quant_cfg")
        if now["blocks"] != was.get("blocks"):
            raise TdqError("model", "blocks", f"the run in {self.folder} was started with other blocks", cure)
        if now["calls"] != was.get("calls"):
            raise TdqError(
                "forward_loop",
                "calls",
                f"the run in {self.folder} recorded calls of other arguments, shapes or types",
                cure,
            )

    def chunks(self, number: int) -> Path:
        """Folder for the chunks of a block."""
        return self.folder / f"block-{number:04d}-chunks"

    def _stem(self, number: int) -> Path:
        return self.folder / f"block-{number:04d}"

    def save(self, number: int, parts: BlockParts, result: BlockResult) -> None:
        """Write a finished block; its chunks are gone."""
        tensors = {f"up/{name}": q._up for name, (_, q) in parts.weights.items() if q._up is not None}
        if parts.columns is not None:
            tensors.update({f"columns/{name}": value for name, value in parts.columns.read().items()})
        tensors.update({f"further/{name}": value for name, value in parts.further.items()})
        files.write(self._stem(number), tensors, {"block": asdict(result)})

    def load(self, number: int, parts: BlockParts) -> BlockResult | None:
        """Put a finished block into the model; None if it is not finished.

        Raises:
            TdqError: Its files are damaged.
        """
        stem = self._stem(number)
        if not files.is_complete(stem):
            return None
        tensors, description = files.read(stem, execution_device(parts.module))

        def under(kind: str) -> dict[str, Tensor]:
            return {k.removeprefix(kind): v for k, v in tensors.items() if k.startswith(kind)}

        for name, up in under("up/").items():
            parts.weights[name][1].fix(up)
        if parts.columns is not None:
            parts.columns.write(under("columns/"))
        with torch.no_grad():
            for name, value in under("further/").items():
                parts.further[name].copy_(value)
        block = dict(description["block"])
        return BlockResult(**{**block, "layers": tuple(block["layers"])})
