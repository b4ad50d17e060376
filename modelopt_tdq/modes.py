"""Registration with ModelOpt: the mode of each algorithm, saved and restored like ModelOpt's own.

A saved model needs ``import modelopt_tdq`` before it is restored: ModelOpt does not discover plugins. All
that ModelOpt says otherwise is "KeyError: Mode <name> not found in any registry", with the name from the
saved state. So the state carries a name that holds the cure, under which every mode is registered as well.

The algorithms themselves are imported when they run: registering takes a fraction of a second.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any, ClassVar

from modelopt.torch.opt.mode import ConvertEntrypoint, RestoreEntrypoint, UpdateEntrypoint
from modelopt.torch.quantization.config import QuantizeAlgorithmConfig
from modelopt.torch.quantization.conversion import restore_quantizer_state, update_quantize_metadata
from modelopt.torch.quantization.mode import BaseCalibrateModeDescriptor, CalibrateModeRegistry
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
from torch import nn
from tqdm import tqdm

from modelopt_tdq.config import RunFields, TdqCalibConfig, TdqCorrectConfig
from modelopt_tdq.model.exchanged import give_back_exchanged_functions
from modelopt_tdq.model.fused_projections import refuse_fusing
from modelopt_tdq.model.kept_rows import mark_readers
from modelopt_tdq.model.output_correction import OutputCorrection
from modelopt_tdq.model.place import execution_device, put_hooks_around_quantizers, require_tensors_on_hand
from modelopt_tdq.model.quantizer import TemporalQuantizer
from modelopt_tdq.model.saving import no_checkpoint
from modelopt_tdq.model.timestep import INTERVALS, deliver_timestep
from modelopt_tdq.model.weight_fit import settle_weights, watch_training
from modelopt_tdq.model.wrapped import eager, register_wrappers
from modelopt_tdq.reconstruction.config import TdqReconstructConfig
from modelopt_tdq.temporal_features.config import TdqTemporalConfig
from modelopt_tdq.training.config import TdqQatConfig

__all__ = ["TdqMode", "register", "saved_name"]

_log = logging.getLogger(__name__)

#: Key, in the metadata of a mode, of what the source of the intervals is built again from.
_INTERVALS = "tdq_learning"

_ForwardLoop = Callable[[nn.Module], Any]
_Algorithm = Callable[..., None]


def saved_name(method: str) -> str:
    """The name of an algorithm's mode in saved states."""
    return f"{method}_calibrate (run `import modelopt_tdq` before restoring)"


def _saving(update: UpdateEntrypoint) -> UpdateEntrypoint:
    """``update``, where what follows writes the tensors of the model to a file."""

    def updated(model: nn.Module, config: QuantizeAlgorithmConfig, metadata: dict[str, Any]) -> None:
        require_tensors_on_hand(model, "be saved")
        update(model, config, metadata)

    return updated


def _update(model: nn.Module, config: QuantizeAlgorithmConfig, metadata: dict[str, Any]) -> None:
    """What ModelOpt saves, and how to build the source of the intervals again."""
    settle_weights(model)
    update_quantize_metadata(model, config, metadata)
    learned = model._modules.get(INTERVALS)
    if learned is not None:
        metadata[_INTERVALS] = learned.description
    else:
        metadata.pop(_INTERVALS, None)


def _restore(model: nn.Module, config: RunFields, metadata: dict[str, Any]) -> nn.Module:
    """Make the saved quantizers what they were, before ModelOpt fills them."""
    require_tensors_on_hand(model, "be restored")
    states = metadata.get("quantizer_state", {})
    timestep = deliver_timestep(model, config.timestep_argument)
    watch_training(model)
    for name, module in model.named_modules():
        state = states.get(name, {})
        if not isinstance(module, TensorQuantizer):
            continue
        if state.get("_is_temporal_quantizer"):
            TemporalQuantizer.from_tensor_quantizer(module, timestep, name)
        if state.get("_is_output_correction"):
            OutputCorrection.from_tensor_quantizer(module, timestep, name)
        if state.get("_learns"):
            from modelopt_tdq.training.attach import as_learned

            as_learned(module, state["_learns"]).training = model.training
        if state.get("_learns_weight_scale"):
            from modelopt_tdq.training.weights import LearnedWeightQuantizer

            module.__class__ = LearnedWeightQuantizer
    restored: nn.Module = restore_quantizer_state(model, config, metadata)
    for name, quantizer in restored.named_modules():
        # ModelOpt puts all of them on the first device of a model that is spread over several
        if not isinstance(quantizer, (TemporalQuantizer, OutputCorrection)) or not quantizer.is_enabled:
            continue
        if not any(tensor.is_meta for tensor in (*quantizer.parameters(), *quantizer.buffers())):
            quantizer.to(execution_device(restored.get_submodule(name.rpartition(".")[0])))
    if _INTERVALS in metadata:
        from modelopt_tdq.training.attach import install_intervals

        install_intervals(restored, metadata[_INTERVALS])
    mark_readers(restored)
    refuse_fusing(restored)
    return restored


def _update_features(model: nn.Module, config: QuantizeAlgorithmConfig, metadata: dict[str, Any]) -> None:
    """Likewise, with the description of the temporal features."""
    from modelopt_tdq.temporal_features.runtime import has_features, temporal_features
    from modelopt_tdq.temporal_features.saved_state import DESCRIPTION

    _update(model, config, metadata)
    if has_features(model):
        metadata[DESCRIPTION] = temporal_features(model).description
    else:
        metadata.pop(DESCRIPTION, None)


def _restore_features(model: nn.Module, config: RunFields, metadata: dict[str, Any]) -> nn.Module:
    """Likewise, with the layers that look up what was saved."""
    from modelopt_tdq.temporal_features.runtime import has_features, restore_features, uninstall_features
    from modelopt_tdq.temporal_features.saved_state import DESCRIPTION

    restored = _restore(model, config, metadata)
    if DESCRIPTION in metadata:
        restore_features(restored, metadata[DESCRIPTION])
    elif has_features(restored):  # of an algorithm before this one
        uninstall_features(restored)
    return restored


class TdqMode(BaseCalibrateModeDescriptor):  # type: ignore[misc]
    """Mode of one algorithm; a subclass sets ``_calib_func`` and ``_config``."""

    _supports_layerwise = False
    _config: ClassVar[type[RunFields]]

    @property
    def config_class(self) -> type[QuantizeAlgorithmConfig]:
        """Config of the algorithm."""
        return self._config

    @property
    def restore(self) -> RestoreEntrypoint:
        """See :func:`_restore`."""
        return _restore

    @property
    def update_for_save(self) -> UpdateEntrypoint:
        """See :func:`_saving`."""
        return _saving(self.update_for_new_mode)

    @property
    def update_for_new_mode(self) -> UpdateEntrypoint:
        """See :func:`_update`."""
        return _update

    def __str__(self) -> str:
        """The name that ModelOpt saves."""
        return saved_name(self._config().method)


def _run(algorithm: _Algorithm, model: nn.Module, forward_loop: _ForwardLoop | None, fields: dict[str, Any]) -> None:
    put_hooks_around_quantizers(model)
    with eager():
        algorithm(model, forward_loop, **fields)
    mark_readers(model)
    refuse_fusing(model)
    _tell_coverage(model, bool(fields.get("progress", True)))


def _tell_coverage(model: nn.Module, progress: bool) -> None:
    """What is quantized now: a line behind the progress bars, and all of it in the log; nothing of a lone layer."""
    if isinstance(model, QuantModule) or (not progress and not _log.isEnabledFor(logging.INFO)):
        return
    from modelopt_tdq.layer_coverage import coverage

    found = coverage(model)
    if progress:
        tqdm.write(f"{found.headline} print(modelopt_tdq.coverage(model)) says what is not.", file=sys.stderr)
    _log.info("%s", found)


class _Tdq(TdqMode):
    _config = TdqCalibConfig

    def _calib_func(model: nn.Module, forward_loop: _ForwardLoop | None = None, **fields: Any) -> None:  # noqa: N805
        from modelopt_tdq.calibration.calibrate import tdq_calibrate

        _run(tdq_calibrate, model, forward_loop, fields)


class _TdqCorrect(TdqMode):
    _config = TdqCorrectConfig

    def _calib_func(model: nn.Module, forward_loop: _ForwardLoop | None = None, **fields: Any) -> None:  # noqa: N805
        from modelopt_tdq.calibration.correct import tdq_correct

        _run(tdq_correct, model, forward_loop, fields)


class _TdqQat(TdqMode):
    _config = TdqQatConfig

    def _calib_func(model: nn.Module, forward_loop: _ForwardLoop | None = None, **fields: Any) -> None:  # noqa: N805
        from modelopt_tdq.training.attach import tdq_qat

        _run(tdq_qat, model, forward_loop, fields)


class _TdqReconstruct(TdqMode):
    _config = TdqReconstructConfig

    def _calib_func(model: nn.Module, forward_loop: _ForwardLoop | None = None, **fields: Any) -> None:  # noqa: N805
        from modelopt_tdq.reconstruction.reconstruct import tdq_reconstruct

        _run(tdq_reconstruct, model, forward_loop, fields)


class _TdqTemporal(TdqMode):
    _config = TdqTemporalConfig

    def _calib_func(model: nn.Module, forward_loop: _ForwardLoop | None = None, **fields: Any) -> None:  # noqa: N805
        from modelopt_tdq.temporal_features.algorithm import tdq_temporal

        _run(tdq_temporal, model, forward_loop, fields)

    @property
    def convert(self) -> ConvertEntrypoint:
        """As for all algorithms. The description of the features is part of it: in a list, nobody asks again."""
        convert = super().convert

        def converted(model: nn.Module, config: RunFields, **arguments: Any) -> Any:
            model, metadata = convert(model, config, **arguments)
            _update_features(model, config, metadata)
            return model, metadata

        return converted

    @property
    def restore(self) -> RestoreEntrypoint:
        """See :func:`_restore_features`."""
        return _restore_features

    @property
    def update_for_new_mode(self) -> UpdateEntrypoint:
        """See :func:`_update_features`."""
        return _update_features


def _found_by_saved_name(mode: type[TdqMode]) -> type[TdqMode]:
    """The same mode, which ModelOpt finds by the name in saved states."""
    return type(f"{mode.__name__}Saved", (mode,), {"name": property(str), "__module__": __name__})


def _is_temporal(module: nn.Module) -> bool:
    return any(isinstance(part, TemporalQuantizer) for part in module.modules())


def _refuse_checkpoint(name: str, module: nn.Module, context: Any) -> None:
    """Handler of ``export_hf_checkpoint``, which comes to the root of a model before it changes anything."""
    raise no_checkpoint()


def _register_refusal() -> None:
    try:
        from modelopt.torch.export.registry import ExportModuleRegistry
    except ImportError:  # it has dependencies of its own; without it there is nothing to refuse
        return
    ExportModuleRegistry.register(predicate=_is_temporal, prepend=True)(_refuse_checkpoint)


def register() -> None:
    """Register all modes with ModelOpt; harmless when done before."""
    register_wrappers()
    give_back_exchanged_functions()
    _register_refusal()
    for mode in (_Tdq, _TdqCorrect, _TdqQat, _TdqReconstruct, _TdqTemporal):
        for descriptor in (mode, _found_by_saved_name(mode)):
            if not CalibrateModeRegistry.contained_in_any(descriptor().name):
                CalibrateModeRegistry.register_mode(descriptor)
