"""quantize_pipeline and swap_denoiser on a tiny random pipeline of every family."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from support.pipelines import PIPELINES

import modelopt_tdq as tdq
from modelopt_tdq.metrics import sqnr_db
from modelopt_tdq.pipeline.component import denoiser_name
from modelopt_tdq.runtime.onnxruntime import OnnxRuntimeSession

warnings.filterwarnings("ignore", category=FutureWarning)

FAST = {"statistic": "max", "weights": "max", "protect_steps": False, "progress": False}


def _images(pipeline: Any, call: dict[str, Any], steps: int = 6) -> np.ndarray[Any, Any]:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(9)
    images = pipeline(**call, num_inference_steps=steps, generator=generator, output_type="np")[0]
    return np.asarray(images, dtype=np.float64)


@pytest.fixture(scope="module", params=PIPELINES)
def quantized(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    """The family's name, its pipeline in full precision, and the same quantized over 4 steps."""
    family = PIPELINES[request.param]
    original = family.make()
    pipeline = copy.deepcopy(original)
    returned = tdq.quantize_pipeline(
        pipeline, tdq.make_config(**FAST), calls=[family.call] * 2, steps=4, progress=False
    )
    assert returned is pipeline
    return request.param, original, pipeline


@pytest.fixture(scope="module")
def exported(quantized: tuple[str, Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its denoiser as an ONNX file."""
    name, _, pipeline = quantized
    path = tmp_path_factory.mktemp(name) / "m.onnx"
    report = tdq.export_onnx(_denoiser(pipeline), path, tdq.sample_inputs(pipeline, **PIPELINES[name].call))
    assert len(report.quantized) > 10
    return path


def _denoiser(pipeline: Any) -> Any:
    return getattr(pipeline, denoiser_name(pipeline, None, "timestep"))


def test_is_calibrated_at_the_times_of_the_pipelines_own_schedule(quantized: tuple[str, Any, Any]) -> None:
    name, original, pipeline = quantized
    seen: list[float] = []
    handle = _denoiser(original).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(
            float(torch.as_tensor(kwargs.get("timestep", args[1] if len(args) > 1 else None)).flatten()[0])
        ),
        with_kwargs=True,
    )
    original.set_progress_bar_config(disable=True)
    original(**PIPELINES[name].call, num_inference_steps=4, generator=torch.Generator().manual_seed(0))
    handle.remove()
    assert tdq.scale_table(_denoiser(pipeline)).timesteps.tolist() == sorted(set(np.float32(seen).tolist()))


def test_stays_close_on_the_schedule_of_its_calibration(quantized: tuple[str, Any, Any]) -> None:
    """On the calls of a full-precision trajectory: the trajectory of a random model is chaotic."""
    name, original, pipeline = quantized
    calls: list[tuple[Any, Any, torch.Tensor]] = []
    handle = _denoiser(original).register_forward_hook(
        lambda module, args, kwargs, output: calls.append((args, kwargs, output[0])), with_kwargs=True
    )
    _images(original, PIPELINES[name].call, 4)
    handle.remove()
    with torch.no_grad():
        decibels = [sqnr_db(exact, _denoiser(pipeline)(*args, **kwargs)[0]) for args, kwargs, exact in calls]
    assert 15 < min(decibels) < 100


@pytest.mark.parametrize("steps", [8, 50])
def test_samples_with_other_numbers_of_steps(quantized: tuple[str, Any, Any], steps: int) -> None:
    name, _, pipeline = quantized
    assert np.isfinite(_images(pipeline, PIPELINES[name].call, steps)).all()


def test_runs_on_an_engine_as_in_torch(quantized: tuple[str, Any, Any], exported: Path) -> None:
    name, original, pipeline = quantized
    call = PIPELINES[name].call
    in_torch = _images(pipeline, call)
    swapped = copy.deepcopy(pipeline)
    tdq.swap_denoiser(swapped, exported, free=True)
    on_engine = _images(swapped, call)
    # a code that rounds the other way moves the rest of its trajectory: far less than quantization itself does
    flips = np.square(on_engine - in_torch).mean()
    assert flips < 0.02 * np.square(in_torch - _images(original, call)).mean()


def test_the_swapped_denoiser_looks_like_the_original(quantized: tuple[str, Any, Any], exported: Path) -> None:
    name, _, pipeline = quantized
    denoiser = _denoiser(pipeline)
    inputs = tdq.sample_inputs(pipeline, **PIPELINES[name].call)
    expected = denoiser(**inputs)
    swapped = tdq.EngineDenoiser(OnnxRuntimeSession(exported), denoiser)
    found = swapped(**inputs)
    assert type(found) is type(expected)
    assert found[0].shape == expected[0].shape
    assert isinstance(swapped(**inputs, return_dict=False), tuple)
    assert swapped.config == denoiser.config
    assert swapped.dtype == denoiser.dtype


class _Session:
    inputs: ClassVar[dict[str, Any]] = {"sample": np.float32, "timestep": np.int64}
    shapes: ClassVar[dict[str, Any]] = {"sample": (2, 3, 8, 8), "timestep": ()}
    outputs = ("output",)

    def __call__(self, feeds: dict[str, Any]) -> dict[str, Any]:
        return {"output": np.asarray(feeds["sample"])}


@pytest.fixture(scope="module")
def ddim() -> Any:
    return PIPELINES["ddim"].make()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"prompts": None}, "prompts"),
        ({"prompts": "a cat"}, "prompts"),
        ({"calls": [{"prompt": "a cat"}]}, "calls"),
        ({"calls": [{"batch_size": 1}], "component": "transformer"}, "component"),
    ],
)
def test_what_cannot_be_called_is_named(ddim: Any, arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(tdq.TdqError) as error:
        tdq.quantize_pipeline(ddim, tdq.make_config(**FAST), **arguments)
    assert error.value.field == field


def test_a_model_is_no_pipeline(ddim: Any) -> None:
    with pytest.raises(tdq.TdqError, match="not a diffusers pipeline"):
        tdq.quantize_pipeline(ddim.unet, tdq.make_config(**FAST), calls=[{}])


def test_a_pipeline_without_a_denoiser_is_refused() -> None:
    pipeline = PIPELINES["stable_diffusion"].make()
    pipeline.unet = None
    with pytest.raises(tdq.TdqError, match="no model of the pipeline takes"):
        tdq.swap_denoiser(pipeline, _Session())


def test_an_engine_of_another_denoiser_is_refused(ddim: Any) -> None:
    class Other(_Session):
        inputs: ClassVar[dict[str, Any]] = {"hidden_states": np.float32, "timestep": np.int64}

    with pytest.raises(tdq.TdqError, match="no such arguments"):
        tdq.swap_denoiser(ddim, Other())


@pytest.mark.parametrize(
    ("sample", "time", "extra", "field"),
    [
        (torch.zeros(3, 3, 8, 8), 5, {}, "sample"),
        (torch.zeros(2, 3, 8, 8), torch.tensor([5, 6]), {}, "timestep"),
        (torch.zeros(2, 3, 8, 8), 5, {"class_labels": torch.tensor([1, 2])}, "engine"),
    ],
)
def test_what_the_engine_cannot_take_is_named(ddim: Any, sample: Any, time: Any, extra: Any, field: str) -> None:
    swapped = tdq.EngineDenoiser(_Session(), ddim.unet)
    with pytest.raises(tdq.TdqError) as error:
        swapped(sample, time, **extra)
    assert error.value.field == field


def test_one_time_for_the_batch_may_come_per_sample(ddim: Any) -> None:
    swapped = tdq.EngineDenoiser(_Session(), ddim.unet)
    sample = torch.ones(2, 3, 8, 8)
    assert torch.equal(swapped(sample, torch.tensor([5, 5])).sample, sample)


def test_a_file_of_an_unknown_backend_is_refused(ddim: Any) -> None:
    with pytest.raises(tdq.TdqError, match="no such session"):
        tdq.swap_denoiser(ddim, "m.onnx", backend="abacus")
