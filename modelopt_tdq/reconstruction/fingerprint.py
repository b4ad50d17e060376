"""Everything that changes the result of a reconstruction, in a form that can be written down and compared.

What is exact (settings, formats, weights) is compared exactly. What was computed (calibrated scales, recorded samples,
an output) may differ by a rounding error from one device or number of threads to another, and is compared with a
tolerance.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn

from modelopt_tdq.model.call import first_output, layout, tensor_leaves
from modelopt_tdq.model.full_precision import full_precision
from modelopt_tdq.model.quantizer import TemporalQuantizer
from modelopt_tdq.model.timestep import INTERVALS
from modelopt_tdq.reconstruction.config import TdqReconstructConfig
from modelopt_tdq.reconstruction.samples import Samples
from modelopt_tdq.training.learned import learned_quantizers

__all__ = ["computed", "difference", "settings"]

#: To be raised whenever the same settings, model and data give another result.
_ALGORITHM = 2

#: Fields that do not change the result of a block.
_FREE = {
    "correction",
    "correction_budget",
    "progress",
    "cache_dir",
    "expected_calls",
    "layerwise",
    "moe_calib_experts_ratio",
}

#: Whose versions may change the result.
_PACKAGES = ("modelopt-tdq", "nvidia-modelopt", "torch")

#: Of a quantizer, by the names of its fields in a config; a property of ModelOpt has an underscore before it.
_FORMAT = ("num_bits", "axis", "block_sizes", "unsigned", "narrow_range", "dynamic", "backend", "rotate")

#: Computed numbers of the same run agree at least so well on any device; outputs in half precision not as well.
_TOLERANCE = {"output": 1e-2}
_DEFAULT_TOLERANCE = 1e-3

#: Numbers that stand for the values of a tensor, beside its norm.
_PROJECTIONS = 3


def _digest(value: Any) -> str:
    """Of plain data; addresses of objects, which no two processes share, are left out."""
    return hashlib.sha256(re.sub(r"0x[0-9a-f]+", "", repr(value)).encode()).hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a source tree that was never installed
            continue
    return found


def _formats(model: nn.Module) -> dict[str, str]:
    """Every quantizer's format in words, and a digest of all its other properties."""
    found = {}
    for name, quantizer in model.named_modules():
        if not isinstance(quantizer, TensorQuantizer):
            continue
        if not quantizer.is_enabled:
            found[name] = "disabled"
            continue
        properties: dict[str, Any] = {
            key: value
            for key, value in quantizer.get_modelopt_state(properties_only=True).items()
            if key != "_zero"  # computed, not set
        }
        words = {field: properties.get(f"_{field}", properties.get(field)) for field in _FORMAT}
        told = ", ".join(
            f"{field} {value}" for field, value in words.items() if value is not None and value is not False
        )
        found[name] = f"{told} ({_digest(sorted(properties.items(), key=repr))[:12]})"
    return found


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    own = {**module._parameters, **module._buffers}
    return {name: value for name, value in sorted(own.items()) if value is not None}


def _model(model: nn.Module) -> dict[str, str]:
    """Digests of the weights and buffers, and of the layers with their settings; quantizers belong to neither."""
    others = [m for name, m in model.named_modules() if isinstance(m, TensorQuantizer) or name == INTERVALS]
    inside = {id(inner) for other in others for inner in other.modules()}
    weights, layers = hashlib.sha256(), []
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        layers.append((name, type(module).__name__, module.extra_repr()))
        for key, value in _own_tensors(module).items():
            weights.update(f"{name}.{key} {value.dtype} {tuple(value.shape)}".encode())
            weights.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    config = getattr(model, "config", None)
    # diffusers' own notes, such as the folder that a model was loaded from, begin with an underscore
    known = {k: v for k, v in config.items() if not k.startswith("_")} if isinstance(config, Mapping) else {}
    return {"weights": weights.hexdigest(), "layers": _digest((layers, sorted(known.items(), key=repr)))}


def settings(model: nn.Module, config: TdqReconstructConfig, samples: Samples, blocks: list[str]) -> dict[str, Any]:
    """What has to be the same exactly: plain data for JSON.

    Args:
        model: Calibrated; its weights untouched.
        config: Of the run.
        samples: Of the run.
        blocks: Names, in order.
    """
    fields = {k: v for k, v in config.model_dump(mode="json").items() if k not in _FREE}
    return {
        "config": json.loads(json.dumps(fields)),
        "formats": _formats(model),
        "model": _model(model),
        "blocks": blocks,
        "calls": _digest([layout(call) for call in samples.calls]),
        "versions": {"algorithm": str(_ALGORITHM), **_versions()},
    }


def _sketch(tensors: list[Tensor]) -> Tensor:
    """[1 + projections] float64: the norm of all tensors together, and sums of their values with signs."""
    total = torch.zeros(1 + _PROJECTIONS, dtype=torch.float64)
    for number, tensor in enumerate(tensors):
        values = tensor.detach().cpu().reshape(-1).double()
        generator = torch.Generator().manual_seed(number)
        for projection in range(_PROJECTIONS):
            signs = torch.randint(0, 2, values.shape, generator=generator, dtype=torch.int8)
            total[1 + projection] += (values * (2 * signs - 1)).sum()
        total[0] += values.square().sum()
    total[0] = total[0].sqrt()
    return total


@torch.no_grad()
def computed(model: nn.Module, calibrated: Tensor, samples: Samples) -> dict[str, Tensor]:
    """What has to be the same but for rounding errors.

    Args:
        model: Calibrated; its weights untouched.
        calibrated: [K, Q] scales at the start.
        samples: Of the run.
    """
    found = {"calibrated": calibrated, "times": samples.times}
    for name, quantizer in model.named_modules():
        if isinstance(quantizer, TensorQuantizer) and not isinstance(quantizer, TemporalQuantizer):
            for key, value in _own_tensors(quantizer).items():
                found[f"quantizer/{name}.{key}"] = value.detach().float()
    zeros = [quantizer._zero for quantizer in learned_quantizers(model).values()]
    found["zero points"] = torch.tensor(zeros, dtype=torch.float64)
    found["samples"] = torch.stack([_sketch(list(tensor_leaves(call).values())) for call in samples.calls])
    with full_precision(model):
        found["output"] = _sketch([first_output(model(**samples.call([0])))]).unsqueeze(0)
    return {name: value.cpu().contiguous() for name, value in found.items()}


def difference(now: Mapping[str, Tensor], was: Mapping[str, Tensor]) -> str | None:
    """Name of the first of the computed numbers that differ by more than a rounding error; None if none does."""
    for name in [*was, *now]:
        if name not in was or name not in now or was[name].shape != now[name].shape:
            return name
        one, other = was[name].double(), now[name].double()
        # a sum with signs is compared with the norm, of which it is about the size
        size = one[:, :1] if name in ("samples", "output") else one.abs()
        tolerance = 0.0 if name == "times" else _TOLERANCE.get(name, _DEFAULT_TOLERANCE)
        if not bool(((one - other).abs() <= tolerance * size).all()):
            return name
    return None
