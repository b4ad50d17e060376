"""swap_denoiser: what a session gets to see, a table that is an input, and engines that do not fit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from support.models import SMALL_UNET, fast_config
from support.pipelines import FAMILIES

import modelopt_tdq as tdq
from modelopt_tdq.export import engine_table
from modelopt_tdq.pipeline.engine_denoiser import EngineDenoiser
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession

DIT = FAMILIES["dit"]


class _Session:
    inputs: ClassVar[dict[str, Any]] = {"sample": np.float32, "timestep": np.int64}
    shapes: ClassVar[dict[str, Any]] = {"sample": (2, 3, 8, 8), "timestep": ()}
    outputs = ("output",)

    def __call__(self, feeds: dict[str, Any]) -> dict[str, Any]:
        return {"output": np.asarray(feeds["sample"])}


@pytest.fixture(scope="module")
def ddim() -> Any:
    from diffusers import DDIMPipeline, DDIMScheduler

    return DDIMPipeline(SMALL_UNET.make().eval(), DDIMScheduler())


def _images(pipeline: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(9)
    found = pipeline(**DIT.tiny_call(0), num_inference_steps=4, generator=generator, output_type="np")[0]
    return torch.as_tensor(found).double()


@pytest.fixture(scope="module")
def quantized() -> Any:
    return tdq.quantize_pipeline(DIT.tiny(), fast_config(), calls=[DIT.tiny_call(0)], steps=4, progress=False)


@pytest.fixture(scope="module")
def exported(quantized: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With its table as an input."""
    inputs = tdq.sample_inputs(quantized, **DIT.tiny_call(0))
    path = tmp_path_factory.mktemp("swap") / "m.onnx"
    return tdq.export_onnx(quantized.transformer, path, inputs, table_input=True).path


def test_a_graph_whose_table_is_an_input_takes_the_denoisers_own(quantized: Any, exported: Path) -> None:
    noise = (_images(DIT.tiny()) - _images(quantized)).square().mean()
    swapped = tdq.swap_denoiser(copy.deepcopy(quantized), exported, free=True)
    assert (_images(swapped) - _images(quantized)).square().mean() < 0.5 * noise


def test_or_any_other_table(quantized: Any, exported: Path) -> None:
    """One engine, another calibration: what the torch model makes of that table."""
    table = tdq.scale_table(quantized.transformer)
    coarse = tdq.ScaleTable(table.timesteps, 3 * table.scale, table.names, metadata=table.metadata)
    other = copy.deepcopy(quantized)
    tdq.set_scale_table(other.transformer, coarse)
    session = OnnxRuntimeSession(exported)
    swapped = tdq.swap_denoiser(copy.deepcopy(quantized), session, table=engine_table(exported, coarse))
    difference = (_images(other) - _images(quantized)).square().mean()
    assert (_images(swapped) - _images(other)).square().mean() < 0.1 * difference


def test_an_engine_that_takes_a_table_needs_one(quantized: Any, exported: Path) -> None:
    with pytest.raises(tdq.TdqError, match="takes its table as an input"):
        tdq.swap_denoiser(copy.deepcopy(quantized), OnnxRuntimeSession(exported))


def test_follows_the_pipeline_to_another_dtype(quantized: Any, exported: Path) -> None:
    swapped = tdq.swap_denoiser(copy.deepcopy(quantized), exported, free=True)
    assert swapped.transformer.dtype == torch.float32
    swapped.to(torch.float16)
    assert swapped.transformer.dtype == torch.float16
    assert swapped.device == swapped.transformer.device == torch.device("cpu")
    assert _images(swapped).float().std() > 0


def test_a_pipeline_without_an_autoencoder(ddim: Any, tmp_path: Path) -> None:
    """Diffusion in pixels, as the bundled model's."""
    call = {"batch_size": 1, "num_inference_steps": 4, "output_type": "np"}
    quantized = tdq.quantize_pipeline(
        copy.deepcopy(ddim), fast_config(), calls=[{"batch_size": 2}], steps=4, progress=False
    )

    def images(pipeline: Any) -> np.ndarray[Any, Any]:
        pipeline.set_progress_bar_config(disable=True)
        return np.asarray(pipeline(**call, generator=torch.Generator().manual_seed(9))[0], np.float64)

    in_torch, noise = images(quantized), np.square(images(ddim) - images(quantized)).mean()
    path = tdq.export_onnx(quantized.unet, tmp_path / "m.onnx", tdq.sample_inputs(quantized, batch_size=1)).path
    assert np.square(images(tdq.swap_denoiser(quantized, path)) - in_torch).mean() < 0.5 * noise


def test_an_engine_can_take_the_place_of_another(ddim: Any) -> None:
    pipeline = copy.deepcopy(ddim)
    tdq.swap_denoiser(pipeline, _Session())
    tdq.swap_denoiser(pipeline, other := _Session())
    assert pipeline.unet.session is other
    assert pipeline.unet.original is not pipeline.unet


def test_a_pipeline_without_a_denoiser_is_refused() -> None:
    pipeline = DIT.tiny()
    pipeline.transformer = None
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


class _TokenSession(_Session):
    """Takes a time for each of five tokens of a sample."""

    shapes: ClassVar[dict[str, Any]] = {"sample": (2, 3, 8, 8), "timestep": (2, 5)}


def _times_fed(session: Any, time: torch.Tensor) -> torch.Tensor:
    seen: list[Any] = []

    class Seeing(type(session)):  # type: ignore[misc]
        def __call__(self, feeds: dict[str, Any]) -> dict[str, Any]:
            seen.append(torch.as_tensor(feeds["timestep"]))
            return {"output": np.asarray(feeds["sample"])}

    EngineDenoiser(Seeing(), SMALL_UNET.make().eval())(torch.zeros(2, 3, 8, 8), time)
    return seen[0]


def test_times_of_tokens_reach_an_engine_in_the_form_that_it_has() -> None:
    different = torch.tensor([[0, 0, 900, 900, 900], [0, 300, 300, 300, 300]])
    same = torch.tensor([[900], [300]]).expand(2, 5)
    assert torch.equal(_times_fed(_TokenSession(), different), different)
    assert torch.equal(_times_fed(_TokenSession(), torch.tensor([900, 300])), same)
    assert torch.equal(_times_fed(_TokenSession(), torch.tensor(300)), torch.full((2, 5), 300))

    class PerSample(_Session):
        shapes: ClassVar[dict[str, Any]] = {"sample": (2, 3, 8, 8), "timestep": (2,)}

    assert torch.equal(_times_fed(PerSample(), same.contiguous()), torch.tensor([900, 300]))
    assert torch.equal(_times_fed(_Session(), torch.full((2, 5), 7)), torch.tensor(7))
    for session in (PerSample(), _Session()):
        with pytest.raises(tdq.TdqError, match="a sample has several times, 0 to 900") as error:
            _times_fed(session, different)
        assert error.value.field == "timestep"
