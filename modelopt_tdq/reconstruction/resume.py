"""What an interrupted reconstruction leaves in ``cache_dir``: its settings, and every finished block."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.place import execution_device
from modelopt_tdq.reconstruction import files
from modelopt_tdq.reconstruction.config import TdqReconstructConfig
from modelopt_tdq.reconstruction.learn import BlockParts

__all__ = ["BlockResult", "Progress"]

#: Fields that do not change the result.
_FREE = {"progress", "cache_dir", "expected_calls", "layerwise", "moe_calib_experts_ratio"}

#: Calibrated scales of the same model and data agree at least so well on any device.
_TOLERANCE = 1e-3


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


def _weights_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if "tdq_intervals" not in name and "_quantizer" not in name:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Progress:
    """Finished blocks on disk.

    Args:
        folder: ``cache_dir``.
        model: Calibrated; its weights untouched.
        config: Of the run.
        calibrated: [K, Q] scales at the start.
        times: [N] of the samples.
        blocks: Names, in order.

    Raises:
        TdqError: The folder holds a run with another config, model or data, or is damaged.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        config: TdqReconstructConfig,
        calibrated: Tensor,
        times: Tensor,
        blocks: list[str],
    ) -> None:
        self.folder = folder
        fields = {k: v for k, v in config.model_dump(mode="json").items() if k not in _FREE}
        start = {"config": fields, "weights": _weights_digest(model), "blocks": blocks}
        stem = folder / "run"
        if not files.is_complete(stem):
            files.write(stem, {"calibrated": calibrated.cpu(), "times": times.cpu()}, start)
            return
        tensors, was = files.read(stem, torch.device("cpu"))
        self._compare(start, was)
        found, expected = tensors["calibrated"], calibrated.cpu()
        close = found.shape == expected.shape and torch.allclose(found, expected, rtol=_TOLERANCE, atol=0.0)
        if not close or not torch.equal(tensors["times"], times.cpu()):
            raise TdqError(
                "forward_loop",
                str(folder),
                "it calibrates other scales than in the run that is to be resumed",
                "Use the data and the seeds of that run, or another `cache_dir`",
            )

    def _compare(self, now: dict[str, Any], was: dict[str, Any]) -> None:
        cure = "Resume with the settings of that run, or pass another `cache_dir`"
        for name, value in now["config"].items():
            if was["config"].get(name) != value:
                raise TdqError(
                    name, value, f"the run in {self.folder} was started with {was['config'].get(name)!r}", cure
                )
        for name, problem in (("weights", "other weights"), ("blocks", "other blocks")):
            if now[name] != was[name]:
                raise TdqError("model", name, f"the run in {self.folder} was started on a model with {problem}", cure)

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
