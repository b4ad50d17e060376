"""Interval sources: where they start, what their gradients reach, and that a batch of MLPs is the MLPs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modelopt_tdq.intervals.dynamic import DYNAMIC, DynamicIntervals
from modelopt_tdq.intervals.encoding import ENCODINGS, TimeEncoding, schedule_position
from modelopt_tdq.intervals.mlp import INITIALIZATIONS, MlpIntervals
from modelopt_tdq.intervals.source import inverse_softplus
from modelopt_tdq.intervals.table import TableIntervals

TIMES = torch.tensor([0.0, 10.0, 100.0, 1000.0])
SCALES = torch.tensor([0.01, 0.3, 5.0])

_schedules = st.lists(st.floats(0, 1000, width=32), min_size=2, max_size=12, unique=True).map(
    lambda v: torch.tensor(sorted(v))
)


@given(_schedules)
def test_calibrated_times_are_evenly_spaced_positions(times: Tensor) -> None:
    torch.testing.assert_close(schedule_position(times, times), torch.linspace(0, 1, len(times)))


@given(_schedules, st.lists(st.floats(-100, 1100, width=32), min_size=2, max_size=20))
def test_position_grows_with_time_and_stays_in_the_schedule(times: Tensor, asked: list[float]) -> None:
    position = schedule_position(torch.tensor(sorted(asked)), times)
    assert bool((position[1:] >= position[:-1]).all())
    assert float(position.min()) >= 0
    assert float(position.max()) <= 1


@given(st.floats(1e-6, 50.0))
def test_inverse_softplus(value: float) -> None:
    torch.testing.assert_close(F.softplus(inverse_softplus(torch.tensor([value]).double())).item(), value)


@pytest.mark.parametrize("softplus", [False, True])
def test_a_table_starts_at_the_mean_of_its_rows_and_learns_only_the_times_of_the_batch(softplus: bool) -> None:
    initial = torch.tensor([[1.0, 2.0], [4.0, 2.0], [8.0, 2.0], [2.0, 2.0]])
    bins = torch.tensor([[0, 0], [0, 0], [1, 0], [1, 0]])  # two bins, and a static column
    source = TableIntervals(TIMES, bins, initial, softplus)
    assert len(source.values) == 3
    torch.testing.assert_close(source(TIMES), torch.tensor([[2.0, 2], [2, 2], [4, 2], [4, 2]]))
    source(torch.tensor([20.0, 3.0]))[:, 0].sum().backward()
    grad = source.values.grad
    assert grad is not None
    assert (grad != 0).tolist() == [True, False, False]


@pytest.mark.parametrize("initialization", INITIALIZATIONS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_mlp_starts_at_the_calibrated_scales(encoding: str, initialization: str) -> None:
    source = MlpIntervals(TIMES, SCALES, encoding=encoding, initialization=initialization)
    torch.testing.assert_close(source(torch.tensor([0.0, 500.0, 2000.0])), SCALES.expand(3, 3))


def _trained(source: MlpIntervals, steps: int = 40) -> MlpIntervals:
    """Towards intervals that grow with time."""
    goal = SCALES * torch.linspace(0.5, 2, 4).unsqueeze(1)
    optimizer = torch.optim.Adam(source.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (source(TIMES) / goal).log().square().sum().backward()
        optimizer.step()
    return source


def test_the_batched_mlp_is_one_mlp_per_quantizer() -> None:
    source = _trained(MlpIntervals(TIMES, SCALES, generator=torch.Generator().manual_seed(0))).eval()
    time = torch.tensor([5.0, 700.0])
    h0 = source.encoding(schedule_position(time, TIMES))
    for quantizer in range(3):
        h = h0
        for layer, (weight, bias) in enumerate(zip(source.weights, source.biases, strict=True)):
            h = F.linear(h, weight[quantizer].T, bias[quantizer, 0])
            h = h if layer == 3 else h.relu()
        torch.testing.assert_close(source(time)[:, quantizer], F.softplus(h).squeeze(1))


def test_an_mlp_learns_time_and_a_zero_one_cannot() -> None:
    learned = _trained(MlpIntervals(TIMES, SCALES, dropout=0.0)).eval()(TIMES)
    assert bool((learned[-1] > 1.5 * learned[0]).all())
    dead = _trained(MlpIntervals(TIMES, SCALES, dropout=0.0, initialization="zero")).eval()(TIMES)
    torch.testing.assert_close(dead, dead[:1].expand_as(dead))
    assert not torch.allclose(dead[0], SCALES)  # the bias of the output learns


def test_gradients_of_a_quantizer_reach_its_own_mlp_only() -> None:
    source = MlpIntervals(TIMES, SCALES)
    source(TIMES)[:, 1].sum().backward()
    for bias in source.biases[-1:]:
        assert bias.grad is not None
        assert (bias.grad.flatten() != 0).tolist() == [False, True, False]


def test_dropout_is_for_training() -> None:
    source = _trained(MlpIntervals(TIMES, SCALES, dropout=0.5))
    assert not torch.equal(source(TIMES), source(TIMES))
    source.eval()
    assert torch.equal(source(TIMES), source(TIMES))


def test_encodings() -> None:
    position = torch.tensor([0.0, 0.25, 1.0])
    assert TimeEncoding("raw")(position).flatten().tolist() == [0.0, 999 / 4, 999.0]
    assert torch.equal(TimeEncoding("normalized")(position).flatten(), position)
    from diffusers.models.embeddings import get_timestep_embedding

    expected = get_timestep_embedding(position * 999, 128, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(TimeEncoding("frequency")(position), expected, atol=1e-3, rtol=0)
    assert TimeEncoding("random_fourier")(position).shape == (3, 128)


def test_mlp_computes_in_float32_under_autocast() -> None:
    source = _trained(MlpIntervals(TIMES, SCALES)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(source(TIMES), source(TIMES).float())
        inside = source(TIMES)
    assert torch.equal(inside, source(TIMES))


@pytest.mark.parametrize("kind", DYNAMIC)
def test_dynamic_intervals_are_per_sample(kind: str) -> None:
    x = torch.randn(4, 3, 5, 5) * torch.tensor([1.0, 2.0, 4.0, 8.0]).reshape(4, 1, 1, 1)
    found = DynamicIntervals(kind, TIMES, 0.25, 7.0)(x, torch.tensor([1.0, 2.0]))
    assert found.shape == (4, 1, 1, 1)
    expected = x.abs().flatten(1).amax(1) / 7 if kind == "dynamic_absmax" else torch.full((4,), 0.25)
    torch.testing.assert_close(found.flatten(), expected)
