"""Two engines by time: which one computes what, and the boundary that a comparison tells."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from support.models import SMALL_UNET, fast_config

import modelopt_tdq as tdq
from modelopt_tdq.compare.metrics import OutputDifference
from modelopt_tdq.compare.results import ModelComparison, StepResult


class Adds:
    """A session whose output tells that it was this one."""

    inputs: ClassVar[dict[str, Any]] = {"sample": np.float32, "timestep": np.int64}
    shapes: ClassVar[dict[str, Any]] = {"sample": ("batch", 3, 8, 8), "timestep": ("batch",)}
    outputs = ("output",)

    def __init__(self, what: float) -> None:
        self.what, self.times = what, list[int]()

    def __call__(self, feeds: dict[str, Any]) -> dict[str, Any]:
        self.times += np.unique(np.asarray(feeds["timestep"])).tolist()
        return {"output": np.asarray(feeds["sample"]) + self.what}


@pytest.fixture
def ddim() -> Any:
    from diffusers import DDIMPipeline, DDIMScheduler

    pipeline = DDIMPipeline(SMALL_UNET.make().eval(), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _told(model: Any, time: Any, batch: int = 2) -> list[float]:
    output = model(torch.zeros(batch, 3, 8, 8), time).sample
    assert torch.equal(output, output[:, :1, :1, :1].expand_as(output))
    return output[:, 0, 0, 0].tolist()  # type: ignore[no-any-return]


def test_the_time_of_a_call_chooses(ddim: Any) -> None:
    tdq.swap_denoiser(ddim, {"high": Adds(1.0), "low": Adds(2.0)}, boundary=400)
    assert _told(ddim.unet, 400) == _told(ddim.unet, torch.tensor([999, 400])) == [1.0, 1.0]
    assert _told(ddim.unet, 399) == _told(ddim.unet, torch.tensor(0)) == [2.0, 2.0]


def test_each_sample_of_a_call_takes_the_answer_of_its_time(ddim: Any) -> None:
    tdq.swap_denoiser(ddim, {"high": Adds(1.0), "low": Adds(2.0)}, boundary=400)
    assert _told(ddim.unet, torch.tensor([100, 900, 400]), 3) == [2.0, 1.0, 1.0]
    output = ddim.unet(torch.zeros(2, 3, 8, 8), torch.tensor([100, 900]), return_dict=False)
    assert isinstance(output, tuple)
    assert output[0][:, 0, 0, 0].tolist() == [2.0, 1.0]


def test_a_pipeline_exchanges_them_whatever_the_number_of_steps(ddim: Any) -> None:
    for steps in (5, 10):
        high, low = Adds(1.0), Adds(2.0)
        tdq.swap_denoiser(ddim, {"high": high, "low": low}, boundary=500)
        ddim(batch_size=1, num_inference_steps=steps, output_type="np")
        times = set(ddim.scheduler.timesteps.tolist())
        assert set(high.times) == {time for time in times if time >= 500}
        assert set(low.times) == {time for time in times if time < 500}


def test_none_leaves_a_side_to_the_torch_denoiser(ddim: Any) -> None:
    torch_unet = ddim.unet
    tdq.swap_denoiser(ddim, {"high": None, "low": Adds(2.0)}, boundary=500)
    sample = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ddim.unet(sample, 500).sample, torch_unet(sample, 500).sample)
        assert torch.equal(ddim.unet(sample, 499).sample, sample + 2.0)
    ddim.to(torch.float64)  # the weights go where the pipeline goes
    assert next(torch_unet.parameters()).dtype == torch.float64
    tdq.restore_denoiser(ddim)
    assert ddim.unet is torch_unet


def test_it_stands_in_for_the_denoiser(ddim: Any) -> None:
    original = ddim.unet
    tdq.swap_denoiser(ddim, {"high": Adds(1.0), "low": Adds(2.0)}, boundary=400)
    assert isinstance(ddim.unet, tdq.EngineDenoiser)
    assert ddim.unet.config is original.config
    assert _told(copy.deepcopy(ddim.unet), 400) == [1.0, 1.0]
    with pytest.raises(tdq.TdqError, match="would not change with it"):
        ddim.unet.set_attention_backend("native")
    tdq.swap_denoiser(ddim, other := Adds(3.0))
    assert ddim.unet.session is other
    assert ddim.unet.original is original


@pytest.mark.parametrize(
    ("engine", "options", "field", "says"),
    [
        ({"high": Adds(1.0), "low": Adds(2.0)}, {}, "boundary", "need the time"),
        ({"high": Adds(1.0), "low": Adds(2.0)}, {"boundary": float("nan")}, "boundary", "need the time"),
        ({"high": Adds(1.0), "low": Adds(2.0)}, {"boundary": True}, "boundary", "need the time"),
        ({"high": Adds(1.0)}, {"boundary": 400}, "engine", "not two engines"),
        ({"first": Adds(1.0), "second": Adds(2.0)}, {"boundary": 400}, "engine", "Name them high and low"),
        ({"high": None, "low": None}, {"boundary": 400}, "engine", "there is no engine"),
        ({"high": None, "low": Adds(2.0)}, {"boundary": 400, "free": True}, "free", "torch denoiser computes"),
        (Adds(1.0), {"boundary": 400}, "boundary", "there is one engine"),
    ],
)
def test_what_cannot_be_is_named_and_changes_nothing(
    ddim: Any, engine: Any, options: dict[str, Any], field: str, says: str
) -> None:
    before = ddim.unet
    with pytest.raises(tdq.TdqError, match=says) as error:
        tdq.swap_denoiser(ddim, engine, **options)
    assert error.value.field == field
    assert ddim.unet is before
    assert not before.conv_in.weight.is_meta


def test_a_boundary_outside_of_the_schedule_is_refused(ddim: Any) -> None:
    calls = [{"batch_size": 2}]
    quantized = tdq.quantize_pipeline(ddim, fast_config(), calls=calls, steps=4, progress=False)
    least, largest = (tdq.scale_table(quantized.unet).timesteps[row].item() for row in (0, -1))
    for boundary in (least, largest + 1, -5):
        with pytest.raises(tdq.TdqError, match=f"times go from {least:g} to {largest:g}"):
            tdq.swap_denoiser(quantized, {"high": Adds(1.0), "low": Adds(2.0)}, boundary=boundary)
    tdq.swap_denoiser(quantized, {"high": Adds(1.0), "low": Adds(2.0)}, boundary=largest)


def test_times_of_one_sample_on_both_sides_are_refused(ddim: Any) -> None:
    class PerToken(Adds):
        shapes: ClassVar[dict[str, Any]] = {"sample": ("batch", 3, 8, 8), "timestep": ("batch", 4)}

    tdq.swap_denoiser(ddim, {"high": PerToken(1.0), "low": PerToken(2.0)}, boundary=400)
    assert _told(ddim.unet, torch.tensor([[900, 400, 500, 900], [100, 0, 5, 1]])) == [1.0, 2.0]
    with pytest.raises(tdq.TdqError, match="lie on both sides of the boundary 400"):
        _told(ddim.unet, torch.tensor([[900, 0, 0, 0], [900, 900, 900, 900]]))


def _comparison(decibels: dict[float, float]) -> ModelComparison:
    steps = [
        StepResult("torch", step, time, OutputDifference(90.0, noise, 0.0, 1.0))
        for step, (time, noise) in enumerate(decibels.items())
    ]
    return ModelComparison(tuple(steps), (), {})


def test_the_boundary_leaves_the_fewest_steps_to_higher_precision() -> None:
    falling = _comparison({900.0: 40.0, 600.0: 35.0, 300.0: 30.0, 0.0: 20.0})
    assert tdq.time_boundary(falling, 33.0) == tdq.pipeline.Boundary(450.0, "low", 2, 4)
    assert tdq.time_boundary(falling, 20.5) == tdq.pipeline.Boundary(150.0, "low", 1, 4)
    rising = _comparison({900.0: 20.0, 600.0: 35.0, 300.0: 40.0, 0.0: 38.0})
    assert tdq.time_boundary(rising, 33.0) == tdq.pipeline.Boundary(750.0, "high", 1, 4)
    middle = _comparison({900.0: 40.0, 600.0: 20.0, 300.0: 40.0, 100.0: 40.0, 0.0: 40.0})
    assert tdq.time_boundary(middle, 33.0) == tdq.pipeline.Boundary(450.0, "high", 2, 5)


@pytest.mark.parametrize(
    ("decibels", "says"),
    [
        ({900.0: 40.0, 0.0: 35.0}, "0 of 2 steps"),
        ({900.0: 20.0, 0.0: 25.0}, "2 of 2 steps fall short of it: they have 20.0 to 25.0 dB"),
        ({500.0: 20.0}, "1 of 1 steps"),
        ({900.0: 20.0, 500.0: 40.0, 0.0: 25.0}, "both ends"),
    ],
)
def test_where_no_boundary_helps_it_says_so(decibels: dict[float, float], says: str) -> None:
    with pytest.raises(tdq.TdqError, match=says) as error:
        tdq.time_boundary(_comparison(decibels), 30.0)
    assert error.value.field == "target"
