"""The stages of the demo. Each reads what earlier ones stored, and stores its own result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

from modelopt_tdq.core.metrics import json_number
from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.demo import deploy
from modelopt_tdq.lab.demo.cache import StageCache, StageResult
from modelopt_tdq.lab.demo.features import feature_facts, feature_tensors
from modelopt_tdq.lab.demo.settings import DEPLOYED, SEEDS, DemoSettings, cores
from modelopt_tdq.lab.demo.variants import VARIANTS, quantized, static_scales, table_facts, variant_config
from modelopt_tdq.lab.example_call import example_call
from modelopt_tdq.lab.judge import Reference, judge, reference
from modelopt_tdq.lab.maintenance import schedule_times
from modelopt_tdq.lab.model_folder import describe_inputs, save_quantized
from modelopt_tdq.lab.provenance import cpu_name
from modelopt_tdq.lab.trajectories import noise, sample, sample_shape
from modelopt_tdq.model.model_table import scale_table
from modelopt_tdq.model.output_correction import layer_correction

__all__ = ["Stage", "load", "run", "stages"]

#: Told how much of the stage is done, from 0 to 1.
Report = Callable[[float], None]


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: Its file name in the cache.
        title: For the progress display.
        depends: What its result depends on.
        cost: About how many seconds of one core it takes; only for the time left.
        after: Stages that must be done before.
        alone: Whether nothing else may run at the same time: a measurement of speed.
    """

    name: str
    title: str
    depends: dict[str, Any]
    cost: float
    after: tuple[str, ...] = ()
    alone: bool = False


def stages(settings: DemoSettings, backends: frozenset[str]) -> list[Stage]:
    """All stages for these settings, in order.

    Args:
        settings: Of the demo.
        backends: Of "onnx", "openvino", "tensorrt_rtx": those that are installed.
    """
    judged, calls = settings.judged(), settings.steps * settings.samples
    call_s = settings.chosen.call_s
    found = [Stage("reference", "full precision", judged, 2.0 + call_s * calls)]
    learning = 40.0 if settings.maintenance in ("tib", "auto") else 0.0
    calibration = 12.0 + learning + 5.0 * call_s * settings.calibration_samples * settings.calibration_steps
    for recipe_name in settings.recipes:
        depends = {"judged": judged, "calibrated": settings.calibrated(recipe_name)}
        cost = calibration + 9.0 * call_s * calls
        found.append(Stage(f"recipe-{recipe_name}", f"quantize {recipe_name}", depends, cost, ("reference",)))
    if settings.engines and "onnx" in backends and DEPLOYED in settings.recipes:
        shared: dict[str, Any] = {"calibrated": settings.calibrated(DEPLOYED), "batch": settings.batch}
        for variant in deploy.DEPLOYED_VARIANTS:
            engine = "tensorrt_rtx" in backends and variant != "fp32"
            title = f"export{' and build' if engine else ''} {variant}"
            depends = shared | {"engine": engine}
            found.append(Stage(f"deploy-{variant}", title, depends, 9.0, (f"recipe-{DEPLOYED}",)))
        if "openvino" in backends:
            after = tuple(f"deploy-{variant}" for variant in deploy.DEPLOYED_VARIANTS)
            depends = shared | {"judged": judged, "processor": cpu_name(), "threads": cores()}
            found.append(Stage("openvino", "time OpenVINO", depends, 15.0, after, alone=True))
    return found


def run(stage: Stage, settings: DemoSettings, backends: frozenset[str], report: Report) -> None:
    """Do one stage and store its result."""
    cache = StageCache(settings.output)
    kind, _, which = stage.name.partition("-")
    if kind == "reference":
        result = _reference(settings, report)
    elif kind == "recipe":
        result = _one_recipe(settings, which, _load_reference(settings, backends), report)
    elif kind == "deploy":
        result = deploy.export_and_build(settings, which, bool(stage.depends["engine"]), report)
    else:
        result = deploy.measure_openvino(settings, _load_reference(settings, backends), report)
    cache.store(stage.name, stage.depends, result)


def load(name: str, settings: DemoSettings, backends: frozenset[str]) -> StageResult:
    """The stored result of a stage.

    Raises:
        TdqError: There is none.
    """
    for stage in stages(settings, backends):
        if stage.name == name and (result := StageCache(settings.output).load(name, stage.depends)) is not None:
            return result
    raise TdqError("output", str(settings.output), f"the result of stage {name!r} is gone", "Run the demo again")


def _load_reference(settings: DemoSettings, backends: frozenset[str]) -> Reference:
    tensors = load("reference", settings, backends).tensors
    return Reference(**{field.name: tensors[field.name] for field in fields(Reference)})


def _ticks(total: float, report: Report) -> Callable[[], None]:
    """A function to be called ``total`` times."""
    done = 0.0

    def tick() -> None:
        nonlocal done
        done += 1.0
        report(min(done / total, 1.0))

    return tick


def _reference(settings: DemoSettings, report: Report) -> StageResult:
    model, scheduler = settings.load()
    settings.placement.place(model)
    tick = _ticks(settings.steps, report)
    found = reference(model, scheduler, settings.samples, settings.steps, SEEDS["judging"], tick)
    return StageResult(tensors={field.name: getattr(found, field.name) for field in fields(Reference)})


def _one_recipe(settings: DemoSettings, recipe_name: str, against: Reference, report: Report) -> StageResult:
    model, scheduler = settings.load()
    start = noise(settings.calibration_samples, sample_shape(model), SEEDS["calibration"])
    tick = _ticks(len(VARIANTS) * (2 * settings.steps + settings.calibration_steps), report)

    def forward_loop(model: torch.nn.Module) -> None:
        sample(model, scheduler, start, settings.calibration_steps, lambda *_: tick())

    times = schedule_times(scheduler, [settings.calibration_steps, settings.steps])
    inputs = describe_inputs(model, (), example_call(model, len(start), against.timesteps[0]))
    values: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    files = []
    models = {}
    for variant in VARIANTS:
        config = variant_config(recipe_name, variant, settings.maintenance, times)
        models[variant] = quantized(model, config, forward_loop, settings.placement)
        found = judge(models[variant], scheduler, against, tick, settings.placement.place)
        values[variant] = {"sqnr_db": [json_number(v) for v in found.sqnr_db], "psnr_db": json_number(found.psnr_db)}
        tensors[f"images.{variant}"] = found.images
        if variant == "tdq" or (variant == "max" and recipe_name == DEPLOYED):
            folder = f"models/{recipe_name}-{variant}"
            done = {"recipe": recipe_name, "config": config, "calibration": settings.calibrated(recipe_name)}
            save_quantized(models[variant], settings.output / folder, inputs, done)
            files.append(folder)
    table, static = scale_table(models["tdq"]), scale_table(models["static"])
    shared = [table.names.index(name) for name in static.names]  # naive maintenance quantizes more layers
    for variant in VARIANTS:
        values[variant]["table"] = table_facts(models[variant])
    values["names"] = list(static.names)
    tensors |= {
        "timesteps": table.timesteps,
        "scale.tdq": table.scale[:, shared],
        "scale.static": static.scale[0],
        "scale.max": static_scales(models["max"], tuple(static.names)),
    }
    correction = layer_correction(models["tdq"])
    if correction is not None:
        values["corrected"] = list(correction.names)
        rows = len(correction)
        sizes = [(gain - 1).square().mean(1).sqrt().expand(rows) for gain in correction.gain.values()]
        tensors |= {"correction.timesteps": correction.timesteps, "correction.gain": torch.stack(sizes, 1)}
    if settings.maintenance != "none":
        values["features"] = feature_facts(model, models["tdq"], against)
        tensors |= feature_tensors(model, models["tdq"], table.timesteps)
    return StageResult(values, tensors, files)
