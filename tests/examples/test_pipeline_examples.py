"""Every family of trt_examples, from full precision to images on an engine, as `--tiny` on its command line."""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
import statistics
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.pipelines import FAMILIES
from support.slow import slow_but

import modelopt_tdq as tdq
from modelopt_tdq.runtime.build.report import float_layers
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession
from trt_examples.family import Family
from trt_examples.loading import load
from trt_examples.options import parse
from trt_examples.steps import main

RTX = importlib.util.find_spec("tensorrt_rtx") is not None
EXAMPLES = Path(__file__).parents[2] / "trt_examples"


@dataclass
class Done:
    """What the steps of one family found, and where they wrote."""

    family: Family
    arguments: list[str]
    found: dict[str, Any]

    @property
    def call(self) -> dict[str, Any]:
        return self.family.tiny_call(0)

    @cached_property
    def pipeline(self) -> Any:
        """With the quantized denoiser."""
        return load(self.family, parse(self.family, None, ["run", *self.arguments]), quantized=True)


@pytest.fixture(scope="module", params=slow_but(FAMILIES, "dit"))
def done(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    diffusers_checkpoints: None,
) -> Done:
    family = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(family.name)
    (folder / "prompts.txt").write_text("1\n2\n")
    correction = "auto" if family.name == "dit" else "none"  # of one family is enough
    algorithm = f"statistic: max, weights: max, protect_steps: false, correction: {correction}"
    (folder / "fast.yaml").write_text(f"algorithm: {{{algorithm}}}\n")
    arguments = ["--tiny", "--output", str(folder), "--prompts", str(folder / "prompts.txt")]
    arguments += ["--recipe", str(folder / "fast.yaml"), "--calibration-steps", "4", "--steps", "6", "--layers"]
    arguments += ["--compute-capability", "8.9"]
    steps = ["all"] if RTX else ["quantize", "export", "compare", "run"]
    found = main(family, arguments=[*steps, *arguments])
    return Done(family, arguments, found)


def test_is_calibrated_at_the_times_of_the_pipelines_own_schedule(done: Done) -> None:
    calls = tdq.trajectory_inputs(done.family.tiny(), done.family.denoiser, **done.call, num_inference_steps=4)
    times = {float(torch.as_tensor(call["timestep"]).flatten()[0]) for call in calls}
    assert done.found["quantize"].timesteps.tolist() == sorted(np.float32(list(times)).tolist())


def test_exports_its_layers_in_low_precision(done: Done) -> None:
    assert len(done.found["export"].quantized) > 10
    assert done.found["export"].skipped == ()


def test_torch_and_the_exported_graph_agree_at_every_time(done: Done) -> None:
    comparison = done.found["compare"]
    assert comparison.passed
    assert {step.backend for step in comparison.steps} == {"torch", "onnxruntime"}
    assert len({step.time for step in comparison.steps}) == 3
    assert all(15 < step.difference.noise_db < 100 for step in comparison.steps)


def test_images_on_the_engine_are_those_of_the_quantized_pipeline(done: Done) -> None:
    """A code that rounds the other way moves the rest of its trajectory: less than quantization itself does.

    Measured in benchmarks/results/pipeline_swap.md. Random models are chaotic: codes are compared above.
    """
    images = done.found["run"]
    assert images.error("full precision", "quantized") > 0
    assert images.error("quantized", "onnxruntime") < images.error("full precision", "quantized")


def test_the_swapped_denoiser_answers_as_the_original(done: Done) -> None:
    """Flips are rare: most calls have none at all."""
    exact, denoiser = (getattr(each, done.family.denoiser) for each in (done.family.tiny(), done.pipeline))
    swapped = tdq.EngineDenoiser(OnnxRuntimeSession(done.found["export"].path), denoiser)
    shares = []
    for inputs in tdq.trajectory_inputs(done.pipeline, **done.call, num_inference_steps=6):
        with torch.no_grad():
            full, expected, found = (each(**inputs)[0] for each in (exact, denoiser, swapped))
        shares.append(float((found - expected).square().mean() / (expected - full).square().mean()))
    assert max(shares) < 1
    assert statistics.median(shares) < 1e-3


def test_the_swapped_denoiser_looks_like_the_original(done: Done) -> None:
    denoiser = getattr(done.pipeline, done.family.denoiser)
    inputs = tdq.sample_inputs(done.pipeline, **done.call)
    expected = denoiser(**inputs)
    swapped = tdq.EngineDenoiser(OnnxRuntimeSession(done.found["export"].path), denoiser)
    found = swapped(**inputs)
    assert type(found) is type(expected)
    assert found[0].shape == expected[0].shape
    assert isinstance(swapped(**inputs, return_dict=False), tuple)
    assert swapped.config == denoiser.config
    assert swapped.dtype == denoiser.dtype


@pytest.mark.skipif(not RTX, reason="needs tensorrt_rtx")
def test_builds_an_engine_with_every_quantized_layer_in_low_precision(done: Done) -> None:
    report = done.found["build"]
    assert len(report.quantized) >= 12
    assert float_layers(report) == ()
    assert report.compute_capabilities == ("8.9",)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_commands_of_the_readme_are_those_of_the_script(name: str) -> None:
    text = (EXAMPLES / name / "README.md").read_text()
    commands = [shlex.split(line, comments=True) for line in re.findall(rf"^python {name}\.py .*$", text, re.MULTILINE)]
    steps = [parse(FAMILIES[name], None, command[2:]).step for command in commands]
    assert {step for each in steps for step in each} == {"quantize", "export", "build", "compare", "run"}
    assert FAMILIES[name].model in text


def test_a_step_needs_the_ones_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user starts it: the script itself."""
    for step, before in (("export", "quantize"), ("run", "export")):
        monkeypatch.setattr(sys, "argv", ["dit.py", step, "--tiny", "--output", str(tmp_path)])
        with pytest.raises(SystemExit, match=f"error: .*Run the step {before} first"):
            runpy.run_path(str(EXAMPLES / "dit" / "dit.py"), run_name="__main__")


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["quantize", "--tiny", "--prompts", "missing.txt"], "prompts"),
        (["quantize", "--tiny", "--prompts", "empty.txt"], "prompts"),
        (["quantize", "--tiny", "--recipe", "int7"], "recipe"),
        (["quantize", "--model", "./nowhere"], "model"),
        (["compare", "--tiny", "--dtype", "bfloat16"], "dtype"),
    ],
)
def test_what_cannot_be_used_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], field: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n\n")
    with pytest.raises(tdq.TdqError) as error:
        main(FAMILIES["dit"], arguments=arguments)
    assert error.value.field == field
