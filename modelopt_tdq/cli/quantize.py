"""``modelopt-tdq quantize``."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelopt_tdq.cli.options import (
    CalibrationScript,
    Device,
    Dtype,
    Maintenance,
    Model,
    Offload,
    Recipe,
    Samples,
    Seed,
    Steps,
    Subfolder,
)
from modelopt_tdq.cli.output import finish
from modelopt_tdq.cli.script import script_file
from modelopt_tdq.core.files import require_writable
from modelopt_tdq.lab.sources import DESCRIPTION, require_model
from modelopt_tdq.recipes import read_recipe

if TYPE_CHECKING:
    from modelopt_tdq.cli.calibration import Calibrated

__all__ = ["quantize"]

#: Name of the file with the temporal features, without its suffix.
FEATURE_TABLE = "feature_table"


def quantize(
    output: Annotated[Path, typer.Option(help="Folder to write; an older quantized model in it is replaced.")],
    model: Model = None,
    subfolder: Subfolder = None,
    recipe: Recipe = "int8",
    calibration_script: CalibrationScript = None,
    samples: Samples = None,
    steps: Steps = None,
    seed: Seed = 0,
    maintenance: Maintenance = "none",
    device: Device = "cpu",
    dtype: Dtype = "fp32",
    offload: Offload = "none",
) -> None:
    """Quantize a diffusers model: weights per channel, activations with a scale per time step.

    Writes the model (save_pretrained, with ModelOpt's state), its scale table, and quantization.json; with
    --maintenance, the temporal features are in the model's state, and their table lies beside the scales.
    An unconditional model is calibrated on its own sampling trajectories, with the scheduler beside it.
    """
    # before all that takes seconds to import
    require_writable(output, replaces=DESCRIPTION)
    read_recipe(recipe)
    require_model(model, subfolder)
    if calibration_script is not None:
        script_file(calibration_script, "calibration_script")
    from modelopt_tdq.lab.placement import Placement

    placement = Placement.of(device, dtype, offload)
    import modelopt.torch.quantization as mtq

    import modelopt_tdq as tdq
    from modelopt_tdq.cli.calibration import prepare
    from modelopt_tdq.lab.maintenance import with_maintenance
    from modelopt_tdq.lab.model_folder import describe_inputs, save_quantized
    from modelopt_tdq.temporal_features.runtime import has_features

    config = with_maintenance(tdq.recipe(recipe), maintenance)
    prepared = prepare(model, subfolder, calibration_script, samples, steps, seed, placement=placement)
    config["algorithm"].setdefault("expected_calls", prepared.expected_calls)
    if maintenance not in ("none", "naive"):
        _announce(prepared, config)
    inputs: dict[str, Any] = {}

    def first_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not inputs:
            inputs.update(describe_inputs(module, args, kwargs))

    handle = prepared.model.register_forward_pre_hook(first_call, with_kwargs=True)
    try:
        mtq.quantize(prepared.model, config, prepared.forward_loop)
    finally:
        handle.remove()
    placement.take_back(prepared.model)
    done = {
        "source": {"model": prepared.source, "subfolder": subfolder},
        "recipe": recipe,
        "maintenance": maintenance,
        "config": config,
        "calibration": prepared.done,
        "dtype": dtype,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "modelopt_tdq": tdq.__version__,
    }
    folder = save_quantized(prepared.model, output, inputs, done)
    table = tdq.scale_table(prepared.model)
    following = int((~table.is_static).sum())
    typer.echo(f"{folder}: {len(table.names)} quantized activations, {following} of them follow {len(table)} times")
    typer.echo(str(tdq.coverage(prepared.model)))
    correction = tdq.layer_correction(prepared.model)
    if correction is not None:
        over_time = sum(len(gain) > 1 for gain in correction.gain.values())
        typer.echo(
            f"{len(correction.names)} layers corrected, {over_time} of them over time: {correction.nbytes:,} bytes"
        )
    if has_features(prepared.model):
        tdq.feature_table(prepared.model).save(folder / FEATURE_TABLE)
        typer.echo(f"\n{tdq.temporal_report(prepared.model)}\n")
    typer.echo(f"Next: modelopt-tdq export {folder} --output model.onnx")
    finish(
        {
            "output": str(folder),
            "recipe": recipe,
            "quantized_activations": len(table.names),
            "following_time": following,
            "times": table.timesteps.tolist(),
            "corrected_layers": [] if correction is None else list(correction.names),
        }
    )


def _announce(prepared: Calibrated, config: dict[str, Any]) -> None:
    """Say what the temporal features will take, before calibration; where the model can be called without a script."""
    import modelopt_tdq as tdq
    from modelopt_tdq.lab.example_call import example_call
    from modelopt_tdq.lab.trajectories import is_unconditional
    from modelopt_tdq.temporal_features.report import cache_memory, memory_text

    if not is_unconditional(prepared.model):
        return
    steps = prepared.steps
    block = tdq.find_temporal_block(prepared.model, example_call(prepared.model), times=steps)
    algorithm = config["algorithm"]
    formats = [rule["cfg"]["num_bits"] for rule in config["quant_cfg"] if rule["quantizer_name"] == "*input_quantizer"]
    bits = algorithm.get("cache_bits") or next((b for b in formats if isinstance(b, int)), 8)
    sizes = {"cache": [bits], "tib": [32]}.get(algorithm["maintenance"], [bits, 32])
    # below 8 bits a code still takes a byte where it is looked up
    texts = [f"{memory_text(cache_memory(block, steps, max(b, 8)))} ({b} bits)" for b in sizes]
    typer.echo(f"{len(block.features)} temporal features at {steps} times will take {' to '.join(texts)}")
