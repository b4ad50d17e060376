"""The stages in torch: full precision, quantization, saving, temporal features."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.core.metrics import json_number
from modelopt_tdq.errors import TdqWarning
from modelopt_tdq.lab.bench.zoo.judge import lowest, noise
from modelopt_tdq.lab.bench.zoo.stage import NONE, RIGHT, WRONG, Case, Cell
from modelopt_tdq.model.unquantized import unquantized_layers
from modelopt_tdq.temporal_features.block import NoTemporalBlockError

__all__ = ["config", "full", "quantize", "quantized", "restore", "save", "temporal"]

#: By how much the scales over time may do worse at one time than ModelOpt's static ones, which saw the same call at it.
#: Mostly both are the same to 1e-4 dB; a random network that amplifies rounding moves them by 1 dB.
_STATIC_MARGIN_DB = 2.0

#: What a table gives differs from what the layers give by rounding alone. Below the quantization noise is not enough:
#: features of a wrong time may be that near.
_ROUNDING_DB = 100.0

#: The fast form of every part, so that the matrix takes minutes; what it leaves out has tests of its own.
_ALGORITHM: dict[str, Any] = {"statistic": "max", "weights": "max", "correction": "none", "progress": False}


def full(case: Case) -> Cell:
    """Build the model and call it."""
    model = case.entry.build()
    case.exact = case.outputs(model)
    cell: Cell = {
        "verdict": RIGHT,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "outputs": {name: list(value.shape) for name, value in case.exact.items()},
    }
    if not case.exact:
        return cell | {"verdict": WRONG, "reason": "it returned no tensor of floating type"}
    if not all(value.isfinite().all() for value in case.exact.values()):
        return cell | {"verdict": WRONG, "reason": "its output is not finite"}
    return cell


def quantized(case: Case, config: dict[str, Any], forward_loop: Callable[[nn.Module], None]) -> nn.Module:
    """A new model of the class, quantized."""
    import modelopt.torch.quantization as mtq

    model: nn.Module = mtq.quantize(case.entry.build(), config, forward_loop)
    return model


def config(case: Case) -> dict[str, Any]:
    """For ``mtq.quantize``: W8A8, all layers that the default recipe names."""
    return tdq.make_config(timestep_argument=case.entry.times[0], protect_steps=False, **_ALGORITHM)


def _counts(model: nn.Module) -> Cell:
    """Quantizers and weights."""
    from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer

    enabled = {name for name, m in model.named_modules() if isinstance(m, TensorQuantizer) and m.is_enabled}
    layers = [
        name for name, m in model.named_modules() if isinstance(m, QuantModule) and hasattr(m, "weight_quantizer")
    ]
    sizes = {id(p): p.numel() for p in model.parameters()}
    low = {
        id(p): p.numel()
        for name in layers
        if f"{name}.weight_quantizer" in enabled
        and (p := model.get_submodule(name)._parameters.get("weight")) is not None
    }
    temporal = tdq.temporal_quantizers(model)
    return {
        "layers": len(layers),
        "quantized": sum(f"{name}.weight_quantizer" in enabled for name in layers),
        "temporal": len(temporal),
        "rows": len(tdq.scale_table(model)) if temporal else 0,
        "moving": int((~tdq.scale_table(model).is_static).sum()) if temporal else 0,
        "share_of_weights": round(sum(low.values()) / sum(sizes.values()), 4),
        "by_rule": [name for name in layers if f"{name}.weight_quantizer" not in enabled],
    }


def quantize(case: Case) -> Cell:
    """``mtq.quantize`` over five times; at one of them as near to full precision as ModelOpt's static scales of it."""
    given = config(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TdqWarning)  # the same is in the cell
        model = quantized(case, given, case.forward_loop)
        static = quantized(case, {**given, "algorithm": "max"}, case.forward_loop_of_one_time)
    case.quantized, case.expected = model, case.outputs(model)
    case.noise_db = noise(case.exact, case.expected)
    counts = _counts(model)
    left_out = unquantized_layers(model)
    found, static_db = lowest(case.noise_db), lowest(noise(case.exact, case.outputs(static)))
    cell: Cell = {
        "verdict": RIGHT,
        **counts,
        "by_rule": [name for name in counts["by_rule"] if name not in left_out],
        "left_out": left_out,
        "sqnr_db": json_number(found),
        "static_db": json_number(static_db),
    }
    if not counts["temporal"]:
        return cell | {"verdict": WRONG, "reason": "no quantizer has scales over time"}
    if not math.isfinite(found):
        return cell | {"verdict": WRONG, "reason": "quantization changed nothing, or its output is not finite"}
    if found < static_db - _STATIC_MARGIN_DB:
        reason = f"{found:.1f} dB, with ModelOpt's static scales of this time {static_db:.1f} dB"
        return cell | {"verdict": WRONG, "reason": reason}
    return cell


def save(case: Case) -> Cell:
    """``mto.save``, and the outputs to be compared with."""
    import modelopt.torch.opt as mto

    mto.save(case.model, case.saved)
    torch.save(case.expected, case.saved_outputs)
    return {"verdict": RIGHT, "bytes": case.saved.stat().st_size}


def restore(case: Case) -> Cell:
    """``mto.restore`` in a process that has not seen the model: the outputs must be equal bit for bit."""
    import modelopt.torch.opt as mto

    expected: dict[str, Tensor] = torch.load(case.saved_outputs)
    model = mto.restore(case.entry.build(), case.saved)
    found = case.outputs(model)
    different = [name for name, value in expected.items() if not torch.equal(value, found[name])]
    if different:
        reason = f"output {different[0]} differs, {lowest(noise(expected, found)):.1f} dB"
        return {"verdict": WRONG, "reason": reason}
    return {"verdict": RIGHT, "outputs": len(expected)}


def temporal(case: Case) -> Cell:
    """``tdq_temporal`` by cache: from the table, the model gives what it gives with these layers in torch."""
    import modelopt.torch.quantization as mtq

    cached, plain = copy.deepcopy(case.model), copy.deepcopy(case.model)
    algorithm = {
        **_ALGORITHM,
        "method": "tdq_temporal",
        "timestep_argument": case.entry.times[0],
        "maintenance": "cache",
        "cache_bits": 32,
        "recalibrate": False,
    }
    try:
        cached = mtq.calibrate(cached, algorithm, case.forward_loop)
    except NoTemporalBlockError as error:
        return {"verdict": NONE, "reason": error.problem}
    table = tdq.feature_table(cached)
    layers = table.metadata["layers"]
    for name in layers:
        for quantizer in ("weight_quantizer", "input_quantizer"):
            if hasattr(plain.get_submodule(name), quantizer):
                getattr(plain.get_submodule(name), quantizer).disable()
    expected, found = case.outputs(plain), case.outputs(cached)
    case.cached = cached
    cell: Cell = {
        "verdict": RIGHT,
        "features": len(table.features),
        "layers": len(layers),
        "superseded": len(table.metadata["superseded"]),
        "parameters": table.metadata["parameters"],
        "refused": len(table.metadata["refused"]),
    }
    if all(torch.equal(value, found[name]) for name, value in expected.items()):
        return cell | {"by": "bit for bit"}
    decibels = lowest(noise(expected, found))
    cell["db"] = json_number(decibels)
    if not decibels >= _ROUNDING_DB:  # nor NaN
        reason = f"{decibels:.1f} dB from the layers, quantization noise {lowest(case.noise_db):.1f} dB"
        return cell | {"verdict": WRONG, "reason": reason}
    return cell
