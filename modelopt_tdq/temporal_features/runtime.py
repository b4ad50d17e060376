"""Temporal features in a torch model: layers that answer from a table in its root instead of computing.

They look it up in training as well, where their parameters then get no gradient; what was upstream of them
need not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelopt.torch.quantization.nn import TensorQuantizer
from torch import nn

from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.place import drop_bound_forward, place_of_new_parts
from modelopt_tdq.model.timestep import deliver_timestep
from modelopt_tdq.model.wrapped import unwrapped
from modelopt_tdq.temporal_features.guard import guard_calls, unguard_calls
from modelopt_tdq.temporal_features.looked_up import LookedUp, Superseded, swap_in, swap_out
from modelopt_tdq.temporal_features.module import FEATURES, TemporalFeatures, describe
from modelopt_tdq.temporal_features.saved_state import describe_in_state
from modelopt_tdq.temporal_features.table import FeatureTable

__all__ = [
    "FEATURES",
    "TemporalFeatures",
    "drop_parameters",
    "feature_table",
    "free_modules",
    "has_features",
    "idle_layers",
    "install_features",
    "remove_features",
    "restore_features",
    "temporal_features",
    "uninstall_features",
]


def has_features(model: nn.Module) -> bool:
    """Whether layers of ``model`` look their outputs up."""
    return isinstance(unwrapped(model)._modules.get(FEATURES), TemporalFeatures)


def temporal_features(model: nn.Module) -> TemporalFeatures:
    """The module that holds the temporal features of ``model``.

    Raises:
        TdqError: There is none.
    """
    found = unwrapped(model)._modules.get(FEATURES)
    if not isinstance(found, TemporalFeatures):
        raise TdqError(
            "model",
            type(model).__name__,
            "it has no temporal features, or is not the module that they were installed in",
            "Call install_features on it first",
        )
    return found


def feature_table(model: nn.Module) -> FeatureTable:
    """The temporal features of ``model``, copied to the CPU.

    Raises:
        TdqError: It has none, or they were restored and not loaded.
    """
    return temporal_features(model).table()


def idle_layers(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers that never run: those that are looked up or superseded, unless "exact"."""
    if not has_features(model) or temporal_features(model).outside == "exact":
        return ()
    return tuple(_names(temporal_features(model).description))


def install_features(
    model: nn.Module, table: FeatureTable, superseded: Mapping[str, tuple[int, ...]], timestep_argument: str
) -> TemporalFeatures:
    """Let layers of ``model`` look their outputs up, in place.

    Features that were installed before are replaced; after :func:`free_modules`, by features of the same layers.

    Args:
        model: The module whose ``forward`` receives the time.
        table: What the layers give, by their names.
        superseded: Layers whose output nobody needs any more, with its shape per sample. They give
            zeros; with the policy "exact" they run.
        timestep_argument: Of the model's ``forward``: the one that holds the time.

    Raises:
        TdqError: A layer is not there or does not fit, or the model's ``forward`` has no such argument. Nothing is
            changed then.
    """
    description = describe(table, superseded, timestep_argument)
    if has_features(model) and temporal_features(model).description["freed"]:
        if table.outside == "exact" or _names(description) != _names(temporal_features(model).description):
            _require_parameters(temporal_features(model))
        description["freed"] = True
    _require_layers(model, description)
    features = _install(model, description)
    features.fill(table)
    return features


def restore_features(model: nn.Module, description: Mapping[str, Any]) -> TemporalFeatures:
    """Build what :func:`install_features` built, from its description; ``load_state_dict`` brings the numbers.

    Raises:
        TdqError: The model is not the one that was described.
    """
    _require_layers(model, description)
    features = _install(model, description)
    if description["freed"]:
        _free(model)
    return features


def _require_layers(model: nn.Module, description: Mapping[str, Any]) -> None:
    shapes = {entry["name"]: entry["shape"] for entry in description["features"]}
    both = sorted(shapes.keys() & description["superseded"].keys())
    if both:
        raise TdqError("superseded", both, "these layers are looked up", "Name each layer once")
    modules = dict(model.named_modules())
    for name, shape in {**shapes, **description["superseded"]}.items():
        layer = modules.get(name)
        if layer is None or layer is model:
            raise TdqError("features", name, "the model has no such layer", "Use a table made for this model")
        drop_bound_forward(layer)
        if "forward" in layer.__dict__:
            raise TdqError(
                "features", name, "its forward was replaced by a function", "Install the features before such hooks"
            )
        width = layer.out_features if isinstance(layer, nn.Linear) else None
        if width is not None and (not shape or shape[-1] != width):
            raise TdqError(
                "features", name, f"of shape {tuple(shape)}, and the layer gives {width}", "Use a table of this model"
            )


def _install(model: nn.Module, description: Mapping[str, Any]) -> TemporalFeatures:
    timestep = deliver_timestep(model, str(description["timestep_argument"]))
    features = TemporalFeatures(description)
    if has_features(model):
        _remove(model)
    device = place_of_new_parts(model)
    model.add_module(FEATURES, features.to(device).train(model.training))
    features._timestep = timestep
    for index, entry in enumerate(features.description["features"]):
        swap_in(model.get_submodule(entry["name"]), LookedUp, features, index)
    if features.outside != "exact":
        for name, shape in features.description["superseded"].items():
            swap_in(model.get_submodule(name), Superseded, features, tuple(shape))
    guard_calls(model)
    return features


def _names(description: Mapping[str, Any]) -> list[str]:
    """Of the layers that are looked up or superseded."""
    return sorted([*(entry["name"] for entry in description["features"]), *description["superseded"]])


def _layers(model: nn.Module) -> list[nn.Module]:
    return [model.get_submodule(name) for name in _names(temporal_features(model).description)]


def _require_parameters(features: TemporalFeatures) -> None:
    if features.description["freed"]:
        raise TdqError(
            "model",
            FEATURES,
            "the parameters of the layers that are looked up were dropped",
            "Load the model as it was before free_modules",
        )


def remove_features(model: nn.Module) -> None:
    """Let the layers compute again; the time is still delivered.

    Raises:
        TdqError: The model has no features, or its layers' parameters were dropped.
    """
    model = unwrapped(model)
    uninstall_features(model)
    describe_in_state(model, None)


def uninstall_features(model: nn.Module) -> None:
    """:func:`remove_features` inside of a mode of ModelOpt, which says itself what is saved."""
    _require_parameters(temporal_features(model))
    _remove(model)


def _remove(model: nn.Module) -> None:
    unguard_calls(model)
    for layer in _layers(model):
        swap_out(layer)
    del model._modules[FEATURES]


def free_modules(model: nn.Module) -> int:
    """Drop the parameters of the layers that are looked up or superseded: empty ones take their place.

    Their quantizers are disabled: nothing is left for them to quantize. Then the model cannot be trained any more, and
    its features cannot be removed.

    Returns:
        Bytes of the parameters dropped. Those that other layers use too are not counted.

    Raises:
        TdqError: The model has no features, or the policy is "exact", which needs the layers.
    """
    model = unwrapped(model)
    dropped = drop_parameters(model)
    describe_in_state(model, temporal_features(model).description)
    return dropped


def drop_parameters(model: nn.Module) -> int:
    """:func:`free_modules` inside of a mode of ModelOpt, which says itself what is saved."""
    features = temporal_features(model)
    if features.outside == "exact":
        raise TdqError("outside", "exact", "times that are no rows need the layers", 'Use "nearest" or "linear"')
    if features.awaits_state:
        features.table()  # says what is missing
    before = _nbytes(model)
    _free(model)
    features.description["freed"] = True
    return before - _nbytes(model)


def _nbytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _free(model: nn.Module) -> None:
    for layer in _layers(model):
        for name, parameter in layer._parameters.items():
            if parameter is not None:
                layer._parameters[name] = nn.Parameter(parameter.detach().new_empty(0), requires_grad=False)
        for module in layer.modules():
            if isinstance(module, TensorQuantizer):
                module.disable()
