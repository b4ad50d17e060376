"""What errors of the prediction do to the final sample: closed forms, and real perturbed trajectories."""

from __future__ import annotations

import copy
import math
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import noise
from torch import Tensor

import modelopt_tdq as tdq
from modelopt_tdq import TdqError


def normalized(squares: dict[float, float]) -> dict[float, float]:
    mean = sum(squares.values()) / len(squares)
    return {time: math.sqrt(square / mean) for time, square in squares.items()}


def ddim(schedule: str = "linear", **fields: Any) -> Any:
    return diffusers.DDIMScheduler(num_train_timesteps=100, beta_schedule=schedule, **fields)


@given(
    st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    st.integers(2, 12),
    st.sampled_from(["leading", "trailing", "linspace"]),
    st.booleans(),
)
def test_of_ddim_they_are_the_steps_of_sigma(schedule: str, steps: int, spacing: str, clips: bool) -> None:
    """x / sqrt(a) moves by the prediction times the step of sqrt((1 - a) / a): Song et al. 2021, equation 13."""
    scheduler = ddim(schedule, timestep_spacing=spacing, clip_sample=clips)
    before = copy.deepcopy(scheduler)
    found = tdq.image_weights(scheduler, steps)
    assert vars(scheduler).keys() == vars(before).keys()
    assert torch.equal(scheduler.timesteps, before.timesteps)
    before.set_timesteps(steps)
    times = before.timesteps.tolist()
    # DDIM finds where a step ends by the number of steps, not from the next time
    ends = [time - 100 // steps for time in times]
    a = {time: float(before.alphas_cumprod[time]) if time >= 0 else 1.0 for time in (*times, *ends)}
    passed = 1.0  # from the end of this step to the sample: x grows by sqrt(a') / sqrt(a) in each further step
    squares = {}
    for time, end in reversed(list(zip(times, ends, strict=True))):
        step = math.sqrt(1 - a[end]) - math.sqrt(a[end]) * math.sqrt((1 - a[time]) / a[time])
        squares[float(time)] = (passed * step) ** 2
        passed *= math.sqrt(a[end] / a[time])
    expected = normalized(squares)
    assert found.keys() == expected.keys()
    assert sum(weight**2 for weight in found.values()) == pytest.approx(len(found), rel=1e-3)
    for time, weight in expected.items():
        assert found[time] == pytest.approx(max(weight, 1e-3), rel=2e-3)


def test_of_a_flow_they_are_the_steps_of_time() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    found = tdq.image_weights(scheduler, 7)
    scheduler.set_timesteps(7)
    expected = normalized(
        {float(t): float(s) ** 2 for t, s in zip(scheduler.timesteps, scheduler.sigmas.diff(), strict=True)}
    )
    assert found == pytest.approx(expected, rel=1e-4)


def test_further_arguments_of_the_schedule_are_passed_on() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(TdqError, match=r"num_inference_steps = 4.*mu.*by name"):
        tdq.image_weights(scheduler, 4)
    low, high = (list(tdq.image_weights(scheduler, 4, mu=mu)) for mu in (0.5, 1.2))
    assert low != high


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler"])
def test_of_solvers_that_remember_they_are_those_of_perturbed_runs(name: str) -> None:
    found = tdq.image_weights(getattr(diffusers, name)(), 5)

    def final(wrong: int | None) -> float:
        scheduler = getattr(diffusers, name)()
        scheduler.set_timesteps(5)
        x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        for number, time in enumerate(scheduler.timesteps):
            error = torch.full_like(x, 1e-6 if number == wrong else 0.0)
            x = scheduler.step(error, time, scheduler.scale_model_input(x, time) * 0 + x).prev_sample
        return float(x)

    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(5)
    squares: dict[float, float] = {}
    for number, time in enumerate(scheduler.timesteps.tolist()):
        squares[time] = squares.get(time, 0.0) + (final(number) - final(None)) ** 2
    assert found == pytest.approx(normalized(squares), rel=1e-3)


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler"])
def test_schedulers_that_draw_random_numbers_are_refused(name: str) -> None:
    state = torch.random.get_rng_state()
    with pytest.raises(TdqError, match=f"{name}.*random numbers.*DDIMScheduler"):
        tdq.image_weights(getattr(diffusers, name)(), 4)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_model_takes_early_errors_back() -> None:
    """The best denoiser of Gaussian data with deviation 1 makes an error of x / sqrt(a) shrink by 1 / sqrt(1 + s^2)."""
    scheduler = ddim(clip_sample=False)
    alphas = scheduler.alphas_cumprod

    def predict(x: Tensor, time: Tensor) -> Tensor:
        return x * (1 - alphas[time]).sqrt()  # E[noise | x], as x has variance 1

    alone = tdq.image_weights(scheduler, 10)
    found = tdq.image_weights(scheduler, 10, predict, noise(2, 3, 8, 8))
    ratio = [found[time] / alone[time] for time in sorted(found)]
    assert ratio == sorted(ratio, reverse=True)  # the more, the earlier in the trajectory
    assert ratio[0] > 1.3 * ratio[-1]

    def final(wrong: float) -> Tensor:
        run = copy.deepcopy(scheduler)
        run.set_timesteps(10)
        x = noise(2, 3, 8, 8)
        for time in run.timesteps:
            x = run.step(predict(x, time) + (1e-3 * noise(*x.shape, seed=1) if time == wrong else 0), time, x)[0]
        return x

    exact = {time: float((final(time) - final(-1.0)).square().mean()) for time in found}
    assert found == pytest.approx(normalized(exact), rel=2e-2)


def test_where_only_the_last_prediction_reaches_the_sample_the_model_is_asked_for() -> None:
    from modelopt_tdq.lab.terrain import TerrainScheduler

    with pytest.raises(TdqError, match=r"no more than one prediction.*Pass `predict` and `start`"):
        tdq.image_weights(TerrainScheduler(), 4)
    found = tdq.image_weights(TerrainScheduler(), 4, lambda x, time: 0.5 * x, noise(1, 1, 8, 8))
    assert len(found) == 4
    assert min(found.values()) > 1e-3


def test_both_or_neither_of_model_and_start() -> None:
    with pytest.raises(TdqError, match=r"start = None.*Pass `predict` and `start`"):
        tdq.image_weights(ddim(), 4, lambda x, time: x)
    with pytest.raises(TdqError, match=r"predict = None.*Pass `predict` and `start`"):
        tdq.image_weights(ddim(), 4, start=noise(1, 3, 8, 8))
