"""``modelopt-tdq quantize``."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

import modelopt_tdq
from modelopt_tdq.cli.calibration import prepare
from modelopt_tdq.cli.options import CalibrationScript, Model, Recipe, Samples, Seed, Steps, Subfolder

__all__ = ["quantize"]


def quantize(
    output: Annotated[Path, typer.Option(help="Folder to write; an older quantized model in it is replaced.")],
    model: Model = None,
    subfolder: Subfolder = None,
    recipe: Recipe = "int8",
    calibration_script: CalibrationScript = None,
    samples: Samples = 16,
    steps: Steps = 20,
    seed: Seed = 0,
) -> None:
    """Quantize a diffusers model: weights per channel, activations with a scale per time step.

    Writes the model (save_pretrained, with ModelOpt's state), its scale table, and quantization.json.
    An unconditional model is calibrated on its own sampling trajectories, with the scheduler beside it.
    """
    import modelopt.torch.quantization as mtq

    from modelopt_tdq.model_folder import check_output, describe_inputs, save_quantized

    check_output(output)
    config = modelopt_tdq.recipe(recipe)
    prepared = prepare(model, subfolder, calibration_script, samples, steps, seed)
    config["algorithm"].setdefault("expected_calls", prepared.expected_calls)
    inputs: dict[str, Any] = {}

    def first_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not inputs:
            inputs.update(describe_inputs(module, args, kwargs))

    handle = prepared.model.register_forward_pre_hook(first_call, with_kwargs=True)
    try:
        mtq.quantize(prepared.model, config, prepared.forward_loop)
    finally:
        handle.remove()
    done = {
        "source": {"model": prepared.source, "subfolder": subfolder},
        "recipe": recipe,
        "config": config,
        "calibration": prepared.done,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "modelopt_tdq": modelopt_tdq.__version__,
    }
    folder = save_quantized(prepared.model, output, inputs, done)
    table = modelopt_tdq.scale_table(prepared.model)
    following = int((~table.is_static).sum())
    typer.echo(f"{folder}: {len(table.names)} quantized activations, {following} of them follow {len(table)} times")
    typer.echo(f"Next: modelopt-tdq export {folder} --output model.onnx")
