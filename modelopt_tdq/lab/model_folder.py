"""Folders with a diffusers model, and what ``modelopt-tdq quantize`` adds to one.

A quantized folder holds the model as ``save_pretrained`` writes it (weights and ModelOpt's state), the
scales (``scale_table.safetensors``), the corrections of its layers if it has any (``layer_correction.safetensors``),
and ``quantization.json``: what was done, and the shapes of the model's inputs.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.core.files import replacing, require_writable, write_text
from modelopt_tdq.errors import TdqError, require
from modelopt_tdq.lab.sources import DESCRIPTION, require_model, require_quantized
from modelopt_tdq.lab.terrain import TerrainUNet
from modelopt_tdq.model.model_table import scale_table, temporal_quantizers
from modelopt_tdq.model.output_correction import layer_correction
from modelopt_tdq.model.weight_fit import warn_of_changed_weights

__all__ = [
    "QuantizedFolder",
    "describe_inputs",
    "load_model",
    "load_quantized",
    "make_inputs",
    "save_quantized",
]

TABLE = "scale_table"
CORRECTION = "layer_correction"
SCHEMA_VERSION = 1

#: Classes that a config may name beside those of diffusers.
_OWN_CLASSES: dict[str, Any] = {TerrainUNet.__name__: TerrainUNet}


def load_model(source: str | os.PathLike[str], subfolder: str | None = None) -> nn.Module:
    """A full-precision diffusers model in eval mode; its class is the one its config names.

    Args:
        source: A folder with ``config.json``, or a hub id.
        subfolder: Of the model in it, such as ``"unet"`` or ``"transformer"``.

    Raises:
        TdqError: There is no such model, diffusers does not know its class, or it is quantized already.
        MissingExtraError: The extra ``diffusers`` is not installed.
    """
    require_model(source, subfolder)
    return _load(source, subfolder)


def _load(source: str | os.PathLike[str], subfolder: str | None) -> nn.Module:
    diffusers = require("diffusers", "diffusers")
    try:
        name = diffusers.AutoModel.load_config(str(source), subfolder=subfolder).get("_class_name")
        kind = _OWN_CLASSES.get(str(name)) or getattr(diffusers, str(name), None)
        if kind is None:
            raise TdqError("_class_name", name, "diffusers has no such model", "Upgrade diffusers")
        own = str(name) in _OWN_CLASSES  # which reads folders alone
        local = {"local_files_only": True} if Path(source).is_dir() and not own else {}
        model: nn.Module = kind.from_pretrained(str(source), subfolder=subfolder, **local)
    except (OSError, ValueError) as error:
        raise TdqError(
            "model", str(source), f"it cannot be loaded ({error})", "Name a folder of a diffusers model, or a hub id"
        ) from error
    return model.eval()


def describe_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Names, shapes and types of the arguments of one call of the model, as plain data for JSON."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    return {name: _described(value) for name, value in bound.arguments.items() if value is not None}


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return {"mapping": {key: _described(inner) for key, inner in value.items()}}
    if isinstance(value, (list, tuple)):
        return {"list": [_described(inner) for inner in value]}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        raise TdqError(
            "forward_loop",
            type(value).__name__,
            "the model is called with an object of this class, which a saved description cannot hold",
            "Quantize and export it in Python: mtq.quantize, then modelopt_tdq.export_onnx with the inputs of one call",
        )
    return {"value": value if isinstance(value, (bool, int, float, str)) or value is None else str(value)}


def make_inputs(described: Mapping[str, Any], batch: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Inputs of the described shapes: noise for floating-point tensors, zeros for integers.

    Args:
        described: From :func:`describe_inputs`.
        batch: Size of dimension 0 of all tensors that had the batch size of the first one.
        seed: Of the noise.
    """
    first = next((d["shape"][0] for d in described.values() if d.get("shape")), None)
    generator = torch.Generator().manual_seed(seed)

    def made(description: Mapping[str, Any]) -> Any:
        if "mapping" in description:
            return {key: made(inner) for key, inner in description["mapping"].items()}
        if "list" in description:
            return [made(inner) for inner in description["list"]]
        if "shape" not in description:
            return description["value"]
        shape, dtype = list(description["shape"]), getattr(torch, description["dtype"])
        if batch is not None and shape and shape[0] == first:
            shape[0] = batch
        if dtype.is_floating_point:
            return torch.randn(shape, generator=generator).to(dtype)
        return torch.zeros(shape, dtype=dtype)

    return {name: made(description) for name, description in described.items()}


@dataclass(frozen=True)
class QuantizedFolder:
    """A quantized model, and what is known of it.

    Attributes:
        model: In eval mode.
        description: Content of ``quantization.json``: the config, the calibration, the versions.
        inputs: Its part on inputs, for :func:`make_inputs`.
    """

    model: nn.Module
    description: dict[str, Any]
    inputs: dict[str, Any]


def save_quantized(
    model: nn.Module, folder: str | os.PathLike[str], inputs: Mapping[str, Any], done: Mapping[str, Any]
) -> Path:
    """Write a quantized folder; an older one at the same place is replaced when the new one is complete.

    Weights that changed after calibration, and that their scales do not fit any more, are warned of.

    Args:
        model: A diffusers model, quantized.
        folder: Where to.
        inputs: From :func:`describe_inputs`.
        done: What was done, as plain data for JSON.

    Raises:
        TdqError: The model is no diffusers model, or the folder holds something else.
    """
    import modelopt.torch.opt as mto

    target = Path(folder)
    saved: Any = model
    if not hasattr(model, "save_pretrained"):
        raise TdqError(
            "model", type(model).__name__, "it has no save_pretrained", "Save it with modelopt.torch.opt.save(model)"
        )
    require_writable(target, replaces=DESCRIPTION)
    warn_of_changed_weights(model)
    mto.enable_huggingface_checkpointing()
    content = {"schema_version": SCHEMA_VERSION, "kind": "modelopt_tdq.quantized_model", "inputs": dict(inputs), **done}
    with replacing(target) as (partial,):
        saved.save_pretrained(str(partial))
        if temporal_quantizers(model):
            scale_table(model).save(partial / TABLE)
        correction = layer_correction(model)
        if correction is not None:
            correction.save(partial / CORRECTION)
        write_text(partial / DESCRIPTION, json.dumps(content, indent=1) + "\n")
    return target


def load_quantized(folder: str | os.PathLike[str]) -> QuantizedFolder:
    """Read a folder written by :func:`save_quantized`.

    Raises:
        TdqError: It is none, or was written by a newer version.
    """
    import modelopt.torch.opt as mto

    file = Path(folder) / DESCRIPTION
    require_quantized(folder)
    try:
        description = json.loads(file.read_text())
        version, inputs = int(description["schema_version"]), description["inputs"]
    except (ValueError, KeyError, TypeError) as error:
        raise TdqError("folder", str(file), f"not readable ({error!r})", "Quantize the model again") from error
    if version > SCHEMA_VERSION:
        raise TdqError(
            "schema_version", version, f"newer than this version reads ({SCHEMA_VERSION})", "Upgrade modelopt-tdq"
        )
    mto.enable_huggingface_checkpointing()
    return QuantizedFolder(_load(folder, None), description, inputs)
