"""Temporal feature maintenance: from a calibrated model to one whose temporal features come from a table."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.full_precision import full_precision
from modelopt_tdq.model.model_table import scale_table, set_scale_table
from modelopt_tdq.model.place import execution_device
from modelopt_tdq.model.timestep import INTERVALS
from modelopt_tdq.temporal_features.block import TemporalBlock, find_temporal_block, for_times
from modelopt_tdq.temporal_features.checksum import block_checksum
from modelopt_tdq.temporal_features.config import Strategy, TdqTemporalConfig
from modelopt_tdq.temporal_features.errors import FeatureErrors, cosine_similarity, relative_squared_error
from modelopt_tdq.temporal_features.quantized_block import (
    Formats,
    formats,
    naive_features,
    naive_scales,
    quantizable,
    switch_on,
)
from modelopt_tdq.temporal_features.runtime import drop_parameters, install_features
from modelopt_tdq.temporal_features.select import Choice, by_hand, merged, select
from modelopt_tdq.temporal_features.table import Feature, FeatureTable
from modelopt_tdq.temporal_features.tib import tib_features

__all__ = ["SetApart", "maintain", "set_apart"]


@dataclass(frozen=True)
class SetApart:
    """A temporal block whose layers are in full precision, until :func:`maintain`.

    Attributes:
        times: [K] the rows of the scale table.
        called: As that call computes it.
        block: As it is computed for all times at once.
        bits: That its layers are quantized to.
    """

    times: Tensor
    called: TemporalBlock
    block: TemporalBlock
    bits: Formats


def set_apart(model: nn.Module, arguments: Mapping[str, Any], config: TdqTemporalConfig) -> SetApart:
    """Find the temporal block of a calibrated model, and disable the quantizers of its layers.

    Args:
        model: Calibrated, without features; its scale table gives the times.
        arguments: Of one call of it, by name.
        config: Of the algorithm.

    Raises:
        TdqError: The model has no temporal block, or a glob matches nothing of it.
    """
    times = _share_rows(model, config.times)
    device = execution_device(model)
    whole = find_temporal_block(model, arguments, config.timestep_argument, None)
    called = whole.only(_wanted(whole, config.features))
    block = for_times(whole, model, arguments, times.to(device))
    block = block.only(list(called.features)) if block.features.keys() >= called.features.keys() else called
    bits = formats(model, _bits(config.temporal_weight_bits), _bits(config.temporal_activation_bits))
    for layer in quantizable(model, block).values():
        layer.weight_quantizer.disable()
        layer.input_quantizer.disable()
    return SetApart(times, called, block, bits)


def maintain(model: nn.Module, apart: SetApart, config: TdqTemporalConfig) -> None:
    """Quantize and maintain the temporal features of a calibrated model, in place.

    What is stored is computed in a batch like that of the first call of the calibration, one time after the other.
    Matrix products round differently for different numbers of rows: with full-precision rows (``cache_bits`` 32,
    ``maintenance="cache"``), a model sampled in that batch gives, at the times of the rows, bit for bit what it gives
    with its temporal layers unquantized; in another batch the features differ in the last bits.

    Args:
        model: Calibrated, without features.
        apart: Of it.
        config: Of the algorithm.
    """
    times, called, block, bits = apart.times, apart.called, apart.block, apart.bits
    device = execution_device(model)
    if config.maintenance == "naive":
        switch_on(model, block, times.to(device), bits, config.weights, naive_scales(bits))
        return
    kept = nn.ModuleList(model.get_submodule(name) for name in sorted(block.kept))
    with full_precision(kept):
        with torch.no_grad():
            targets = _on_cpu(called.compute(model, times.to(device)))
        candidates, cached = _candidates(model, block, times.to(device), bits, targets, config)
    errors = {strategy: relative_squared_error(targets, made) for strategy, made in candidates.items()}
    choice = _choice(errors, config)
    features = merged(choice, candidates)
    wholly = {name for name, strategies in choice.items() if set(strategies) == {"cache"}}
    stored = {name: cached[name] if name in wholly else Feature(_stored(value)) for name, value in features.items()}
    measured: dict[str, Mapping[str, Tensor]] = {**dict(candidates.items()), "chosen": features}
    metadata: dict[str, Any] = {
        "timestep_argument": config.timestep_argument,
        "checksum": block_checksum(model, block.layers, block.tape.parameters),
        "layers": list(block.layers),
        "tensors": list(block.tape.parameters),
        "superseded": {name: list(shape) for name, shape in block.superseded().items()},
        "refused": {name: list(on) for name, on in called.refused.items()},
        "proof": called.proof.for_layers(block.features).as_json(),
        "parameters": block.parameters,
        "multiply_adds": block.multiply_adds,
        "weight_bits": bits.weight,
        "activation_bits": bits.activation,
        "cache_bits": _cache_bits(bits, config),
        "strategy": choice,
        "relative_squared_error": _numbers(targets, measured, relative_squared_error),
        "cosine_similarity": _numbers(targets, measured, cosine_similarity),
    }
    install_features(
        model, FeatureTable(times, stored, config.outside, metadata), block.superseded(), config.timestep_argument
    )
    if not config.keep_layers:
        drop_parameters(model)


def _share_rows(model: nn.Module, times: list[float] | None) -> Tensor:
    """[K] the rows of the scale table, to which further times are added; so scales and features share a row index."""
    table = scale_table(model)
    if not times:
        return table.timesteps
    if INTERVALS in model._modules:
        raise TdqError(
            "times", times[:3], "the scales of this model are still learned", 'Set their times with "rows" instead'
        )
    union: Tensor = torch.unique(torch.cat([table.timesteps, torch.tensor(times, dtype=torch.float32)]))
    set_scale_table(model, table.resample(union))
    return union


def _wanted(block: TemporalBlock, patterns: list[str]) -> list[str]:
    names: list[str] = []
    for pattern in patterns:
        matching = fnmatch.filter([*block.features, *block.depends], pattern)
        if not matching:
            raise TdqError(
                "features", pattern, "it matches no temporal feature", f"Features: {', '.join(block.features)}"
            )
        exact = [name for name in matching if name in block.features]
        names += exact or matching  # layers that depend on more are refused by name
    return list(dict.fromkeys(names))


def _bits(value: int | list[int] | None) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _cache_bits(bits: Formats, config: TdqTemporalConfig) -> int:
    if config.cache_bits is not None:
        return config.cache_bits
    return bits.activation if isinstance(bits.activation, int) else 8


def _on_cpu(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in features.items()}


def _stored(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float16 else values.float()


def _candidates(
    model: nn.Module,
    block: TemporalBlock,
    times: Tensor,
    bits: Formats,
    targets: Mapping[str, Tensor],
    config: TdqTemporalConfig,
) -> tuple[dict[Strategy, dict[str, Tensor]], dict[str, Feature]]:
    """[K, ...] of every feature by every strategy, and the cached form of each."""
    made: dict[Strategy, dict[str, Tensor]] = {"naive": {}}
    made["naive"] = _on_cpu(naive_features(model, block, times, bits, config.weights))
    stored_bits = _cache_bits(bits, config)
    cached = {name: _cached(value, stored_bits) for name, value in targets.items()}
    made["cache"] = {name: feature.dense() for name, feature in cached.items()}
    if config.maintenance != "cache" or "tib" in config.choose.values():
        with tqdm(total=config.iterations, desc="temporal block", unit="step", disable=not config.progress) as bar:
            learned = tib_features(
                model,
                block,
                times,
                bits,
                config.weights,
                {name: value.to(times.device) for name, value in targets.items()},
                config.iterations,
                config.rounding_weight,
                bar.update,
            )
        made["tib"] = _on_cpu(learned)
    return made, cached


def _cached(values: Tensor, bits: int) -> Feature:
    if bits == 32:
        return Feature(values.float())
    return Feature(values.half()) if bits == 16 else Feature.quantized(values, bits)


def _choice(errors: Mapping[Strategy, FeatureErrors], config: TdqTemporalConfig) -> Choice:
    if config.maintenance == "auto":
        choice = select(errors, config.granularity)
    else:
        strategy: Strategy = config.maintenance
        choice = {name: [strategy] * len(naive) for name, naive in errors["naive"].items()}
    return by_hand(choice, config.choose)


def _numbers(
    targets: Mapping[str, Tensor],
    measured: Mapping[str, Mapping[str, Tensor]],
    measure: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], FeatureErrors],
) -> dict[str, dict[str, list[float]]]:
    """For JSON, six digits: by strategy and feature, one number per time."""
    return {
        strategy: {
            name: [float(f"{value:.6g}") for value in values.tolist()]
            for name, values in measure(targets, features).items()
        }
        for strategy, features in measured.items()
    }
