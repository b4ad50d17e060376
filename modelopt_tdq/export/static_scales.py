"""One scale per layer, for programs that know no time: as a JSON file, or as a checkpoint with the table beside it.

The scale of a quantizer is the largest of its table, so that no time is clipped that its own scale does not clip. A
model that is to be deployed so should be calibrated for it: ``bins=1`` finds the best single scale.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from safetensors import safe_open
from torch import nn

from modelopt_tdq.core.fake_quant import code_range
from modelopt_tdq.core.files import replacing, write_text
from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.model_table import scale_table, temporal_quantizers
from modelopt_tdq.model.output_correction import forget_layer_correction, output_corrections
from modelopt_tdq.model.quantizer import TemporalQuantizer
from modelopt_tdq.model.wrapped import unwrapped
from modelopt_tdq.temporal_features.runtime import has_features

__all__ = ["TABLE_FILE", "static_scales", "write_static_checkpoint", "write_static_json"]

#: Of the table beside a checkpoint.
TABLE_FILE = "scale_table.safetensors"

_INT8, _FP8 = 8, (4, 3)


def static_scales(model: nn.Module) -> dict[str, dict[str, float | list[float]]]:
    """One scale for each quantizer, by layer: ``{"blocks.0.attn.to_q": {"input_scale": s, "weight_scale": s}}``.

    A quantizer ``<what>_quantizer`` of a layer gives ``<what>_scale``: ``input``, ``weight``, ``q_bmm``, ``softmax``.
    Values are float32 numbers x / q; of INT8 weights with a scale per channel, a list. FP8 weights have one number,
    the largest of their channels, as readers of such files quantize the weights of the original model by it.

    Raises:
        TdqError: The model is not calibrated; it has what single scales cannot say: offsets, smoothed or shifted
            channels, codes that other scales turn back, temporal features in a table, formats other than INT8 and FP8
            (E4M3).
    """
    model = unwrapped(model)
    quantizers = _require_plain(model)
    found: dict[str, dict[str, float | list[float]]] = {}
    for name, quantizer in model.named_modules():
        layer, _, kind = name.rpartition(".")
        if not isinstance(quantizer, TensorQuantizer) or not kind.endswith("_quantizer") or not quantizer.is_enabled:
            continue
        if name in quantizers:
            scale: torch.Tensor | None = quantizers[name].scales.scale.max()
        else:
            amax = getattr(quantizer, "_amax", None)
            scale = None if amax is None else amax.float().flatten() / code_range(quantizer.num_bits)[1]
        if scale is None:
            continue
        one = scale.numel() == 1 or quantizer.num_bits == _FP8
        found.setdefault(layer, {})[f"{kind.removesuffix('_quantizer')}_scale"] = (
            float(scale.max()) if one else [float(value) for value in scale]
        )
    return found


def write_static_json(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write :func:`static_scales` as JSON, the form of per-layer scale files of NVIDIA's TensorRT Model Connect.

    Its Flux and Wan builders read such files of FP8 scales (August 2026). They take the weights of the original model:
    what ``rounding`` and corrections changed is not in it. None has run with a file of ours.

    Raises:
        TdqError: As :func:`static_scales`.
    """
    return write_text(path, json.dumps(static_scales(model), indent=2) + "\n")


def write_static_checkpoint(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write the checkpoint of ModelOpt's ``export_hf_checkpoint`` with one scale per layer, and the table beside it.

    ``config.json`` has ModelOpt's own ``quantization_config``, and in it, under ``modelopt_tdq``, where the table is
    and what the static scales are of it: a reader that knows no time uses the scales, one that does the table. The
    model itself does not change; a copy of it is made. ModelOpt stores linear layers so, and no convolutions.

    Weights are stored as they are in the model. ModelOpt names per-channel FP8 weights ``FP8_PER_CHANNEL_PER_TOKEN``,
    whose readers find the scales of activations at run time and do not look at these; for static scales quantize
    the weights per tensor: ``{"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}}``.

    Args:
        model: A diffusers model.
        folder: A new or empty one; it appears when it is complete.

    Raises:
        TdqError: As :func:`static_scales`; the model has corrections of its layers' outputs, which no such checkpoint
            holds; ModelOpt leaves out scales, as of convolutions; it is no diffusers model; or the folder holds
            something. Nothing is written then.
    """
    model = unwrapped(model)
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise TdqError("folder", str(target), "it is there and not empty", "Name another one")
    if not hasattr(model, "save_pretrained"):
        raise TdqError(
            "model",
            type(model).__name__,
            "no diffusers model, and ModelOpt writes checkpoints of no other denoisers",
            "Write the scales alone with modelopt_tdq.write_static_json",
        )
    _require_plain(model)
    if corrected := list(output_corrections(model)):
        raise TdqError(
            "model",
            corrected[:3],
            f"the outputs of {len(corrected)} layers are corrected, and such a checkpoint would forget it",
            "Take the corrections off with modelopt_tdq.set_layer_correction(model, None), or calibrate with "
            "correction='none'",
        )
    table = scale_table(model)
    from modelopt.torch.export import export_hf_checkpoint

    with replacing(target) as (made,):
        with contextlib.redirect_stdout(None):  # ModelOpt tells of each component
            export_hf_checkpoint(_static_copy(model), export_dir=made)
        _require_all_scales(made, table.names)
        table.save(made / TABLE_FILE)
        config = made / "config.json"
        described = json.loads(config.read_text())
        described.setdefault("quantization_config", {})["modelopt_tdq"] = {
            "scales": TABLE_FILE,
            "static_scales": "the largest over time",
            "timestep_argument": table.metadata["timestep_argument"],
        }
        write_text(config, json.dumps(described, indent=2) + "\n")
    return target


def _require_all_scales(folder: Path, quantizers: Iterable[str]) -> None:
    """Raise where ModelOpt has left out the scale of a quantizer."""
    stored: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            stored.update(tensors.keys())
    expected = {name: f"{name.removesuffix('_quantizer')}_scale" for name in quantizers}
    if missing := [name for name, key in expected.items() if key not in stored]:
        raise TdqError(
            "model",
            missing[:3],
            f"ModelOpt's checkpoints leave out {len(missing)} of its {len(expected)} quantizers: they hold inputs of "
            "linear layers only",
            "Disable these quantizers, such as of convolutions and attention products, or write the scales alone with "
            "modelopt_tdq.write_static_json",
        )


def _static_copy(model: nn.Module) -> nn.Module:
    """A copy whose quantizers are ModelOpt's own, with one amax each."""
    copied = copy.deepcopy(model)
    forget_layer_correction(copied)
    for quantizer in temporal_quantizers(copied).values():
        amax: Any = quantizer.amax
        quantizer.reset_amax()
        quantizer.__class__ = TensorQuantizer
        for name in [name for name in quantizer._buffers if name != "_amax"]:
            del quantizer._buffers[name]
        quantizer.amax = amax
    return copied


def _require_plain(model: nn.Module) -> dict[str, TemporalQuantizer]:
    """The temporal quantizers of a model that single scales can describe."""
    scale_table(model)  # calibrated, loaded and in order
    quantizers = temporal_quantizers(model)
    if has_features(model):
        raise TdqError(
            "model",
            type(model).__name__,
            "its temporal features are looked up in a table, which is no part of single scales",
            "Take them out with modelopt_tdq.remove_features(model)",
        )
    for problem, cure, names in _obstacles(quantizers):
        if names:
            raise TdqError("model", names[:3], f"{problem} ({len(names)} quantizers)", cure)
    return quantizers


def _obstacles(quantizers: dict[str, TemporalQuantizer]) -> Iterator[tuple[str, str, list[str]]]:
    """What single scales cannot say: the problem, the cure, and whose it is."""

    def those(attribute: str) -> list[str]:
        return [name for name, quantizer in quantizers.items() if getattr(quantizer, attribute) is not None]

    yield "offsets need a zero point", "Calibrate with asymmetric=False", those("offset")
    yield "other scales turn their codes back", "Calibrate with method='tdq'", those("dequant_scale")
    yield (
        "their channels are smoothed, and the weights behind multiplied",
        "Calibrate with channel_smoothing='none'",
        those("channel_divisor"),
    )
    yield (
        "their channels are shifted, and what is behind gets it back",
        "Calibrate with channel_shift='none'",
        those("channel_shift"),
    )
    formats = [name for name, quantizer in quantizers.items() if quantizer.num_bits not in (_INT8, _FP8)]
    yield "formats other than INT8 and FP8 (E4M3)", "Quantize with 8 bits", formats
