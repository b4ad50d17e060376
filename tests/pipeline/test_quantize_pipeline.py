"""quantize_pipeline: what it calibrates, two denoisers, and what cannot be used. Every family: tests/examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import FAMILIES as MODELS
from support.models import fast_config
from support.pipelines import FAMILIES

import modelopt_tdq as tdq
from modelopt_tdq.core.metrics import sqnr_db


@pytest.fixture(scope="module")
def ddim() -> Any:
    from diffusers import DDIMPipeline, DDIMScheduler

    return DDIMPipeline(MODELS["unet"].make().eval(), DDIMScheduler())


def test_returns_the_pipeline_and_leaves_its_progress_bars_as_they_were() -> None:
    pipeline = FAMILIES["dit"].tiny()
    pipeline.set_progress_bar_config(desc="sampling", disable=True)
    call = FAMILIES["dit"].tiny_call(0)
    assert tdq.quantize_pipeline(pipeline, fast_config(), calls=[call], steps=3, progress=False) is pipeline
    assert pipeline._progress_bar_config == {"desc": "sampling", "disable": True}
    assert len(tdq.scale_table(pipeline.transformer)) == 3


def test_a_pass_over_the_calls_starts_from_the_same_noise_again() -> None:
    """Two algorithms one after the other calibrate on the same trajectories."""
    family = FAMILIES["dit"]
    tables = []
    for algorithm in ([{"method": "max"}], []):
        config = fast_config()
        config["algorithm"] = [*algorithm, config["algorithm"]]
        pipeline = tdq.quantize_pipeline(family.tiny(), config, calls=[family.tiny_call(0)], steps=3, progress=False)
        tables.append(tdq.scale_table(pipeline.transformer))
    assert torch.equal(tables[0].scale, tables[1].scale)


def _two_denoisers() -> Any:
    """As in Wan 2.2: one for much noise, another below nine tenths of the schedule."""
    first, second = FAMILIES["wan"].tiny(), FAMILIES["wan"].tiny()
    parts = {"transformer_2": second.transformer, "boundary_ratio": 0.9}
    return type(first)(None, None, first.vae, first.scheduler, first.transformer, **parts)


def test_two_denoisers_have_a_table_each_over_their_own_times() -> None:
    pipeline, call = _two_denoisers(), FAMILIES["wan"].tiny_call(0)
    names = ("transformer", "transformer_2")
    exact = _two_denoisers()
    tdq.quantize_pipeline(pipeline, fast_config(), calls=[call], steps=6, component=names, progress=False)
    high, low = (tdq.scale_table(getattr(pipeline, name)) for name in names)
    assert len(high) + len(low) == 6
    assert float(high.timesteps.min()) >= 900 > float(low.timesteps.max())
    for name in names:
        inputs = tdq.trajectory_inputs(exact, name, **call, num_inference_steps=6)
        times = {float(each["timestep"]) for each in inputs}
        assert sorted(times) == tdq.scale_table(getattr(pipeline, name)).timesteps.tolist()
        with torch.no_grad():
            full, quantized = getattr(exact, name)(**inputs[0])[0], getattr(pipeline, name)(**inputs[0])[0]
        assert 15 < sqnr_db(full, quantized) < 100


def test_two_denoisers_have_to_be_named() -> None:
    with pytest.raises(tdq.TdqError, match="several models take a time") as error:
        tdq.quantize_pipeline(_two_denoisers(), fast_config(), calls=[FAMILIES["wan"].tiny_call(0)])
    assert error.value.value == ["transformer", "transformer_2"]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"prompts": None}, "prompts"),
        ({"prompts": "a cat"}, "prompts"),
        ({"calls": [{"prompt": "a cat"}]}, "calls"),
        ({"calls": [{"batch_size": 1}], "component": "transformer"}, "component"),
        ({"calls": [{"batch_size": 1}], "component": ("unet", "transformer")}, "component"),
    ],
)
def test_what_cannot_be_called_is_named(ddim: Any, arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(tdq.TdqError) as error:
        tdq.quantize_pipeline(ddim, fast_config(), **arguments)
    assert error.value.field == field
    assert not any("quantizer" in name for name, _ in ddim.unet.named_modules())


def test_a_model_is_no_pipeline(ddim: Any) -> None:
    with pytest.raises(tdq.TdqError, match="not a diffusers pipeline"):
        tdq.quantize_pipeline(ddim.unet, fast_config(), calls=[{}])
