"""Which strategy each feature gets, and how far off features are."""

from __future__ import annotations

import copy
import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modelopt_tdq import TdqError
from modelopt_tdq.temporal_features.config import STRATEGIES, Strategy
from modelopt_tdq.temporal_features.errors import cosine_similarity, relative_squared_error
from modelopt_tdq.temporal_features.select import Choice, by_hand, merged, select

NUMBERS = st.one_of(st.floats(0.0, 10.0, allow_subnormal=False), st.sampled_from([0.0, 1.0, math.inf]))


@st.composite
def measured(draw: st.DrawFn) -> dict[Strategy, dict[str, Tensor]]:
    """[K] by feature, by strategy."""
    features = [f"block.{i}" for i in range(draw(st.integers(1, 4)))]
    rows = draw(st.integers(1, 5))

    def row() -> Tensor:
        return torch.tensor(draw(st.lists(NUMBERS, min_size=rows, max_size=rows)), dtype=torch.float64)

    return {strategy: {name: row() for name in features} for strategy in ("naive", "cache", "tib")}


def error(errors: dict[Strategy, dict[str, Tensor]], choice: Choice, name: str) -> Tensor:
    return torch.stack([errors[strategy][name][row] for row, strategy in enumerate(choice[name])])


@given(measured())
def test_a_step_gets_the_smallest_error_and_a_block_the_smallest_mean(
    errors: dict[Strategy, dict[str, Tensor]],
) -> None:
    steps, blocks = select(errors, "step"), select(errors, "block")
    for name, naive in errors["naive"].items():
        own = {s: errors[s][name] for s in ("cache", "tib")}
        assert torch.equal(error(errors, steps, name), torch.minimum(torch.minimum(own["tib"], own["cache"]), naive))
        assert (error(errors, steps, name) <= error(errors, blocks, name)).all()
        assert (error(errors, blocks, name) <= naive).all()  # no feature is ever worse than without maintenance
        used = set(blocks[name]) - {"naive"}
        assert len(used) <= 1
        safe = [s for s, values in own.items() if bool((values <= naive).all())]
        if safe:
            best = min(safe, key=lambda s: float(own[s].mean()))
            assert used <= set(safe)
            assert "naive" not in blocks[name]
            assert float(own[next(iter(used))].mean()) == float(own[best].mean())  # type: ignore[index]


def test_ties_go_to_the_cache() -> None:
    same = {"a": torch.tensor([0.5, 0.25])}
    for granularity in ("block", "step"):
        assert select({"naive": same, "tib": same, "cache": same}, granularity) == {"a": ["cache", "cache"]}
        worst = {"a": torch.full((2,), math.inf)}
        assert select({"naive": same, "tib": worst, "cache": worst}, granularity) == {"a": ["naive", "naive"]}


def test_one_step_worse_than_naive_rules_a_block_out_if_the_other_has_none() -> None:
    errors: dict[Strategy, dict[str, Tensor]] = {
        "naive": {"a": torch.tensor([0.3, 0.3]), "b": torch.tensor([0.3, 0.05])},
        "cache": {"a": torch.tensor([0.29, 0.29]), "b": torch.tensor([0.2, 0.1])},
        "tib": {"a": torch.tensor([0.0, 0.31]), "b": torch.tensor([0.0, 0.31])},
    }
    assert select(errors, "block") == {"a": ["cache"] * 2, "b": ["cache", "naive"]}
    errors["tib"]["b"][1] = 0.2
    assert select(errors, "block")["b"] == ["tib", "naive"]
    assert select(errors, "step") == {"a": ["tib", "cache"], "b": ["tib", "naive"]}


def test_rows_in_which_naive_is_better_take_its_outputs() -> None:
    errors: dict[Strategy, dict[str, Tensor]] = {
        "naive": {"a": torch.tensor([0.0, 2.0])},
        "cache": {"a": torch.ones(2)},
    }
    assert select(errors, "block") == select(errors, "step") == {"a": ["naive", "cache"]}
    assert set(get_args(Strategy)) == set(STRATEGIES)


def test_by_hand_the_last_glob_counts() -> None:
    choice: Choice = {"down.0": ["tib", "cache"], "down.1": ["tib", "tib"], "up.0": ["cache", "cache"]}
    before = copy.deepcopy(choice)
    made = by_hand(choice, {"down.*": "cache", "*.1": "tib", "up.0": "tib"})
    assert made == {"down.0": ["cache"] * 2, "down.1": ["tib"] * 2, "up.0": ["tib"] * 2}
    assert by_hand(choice, {}) == choice == before
    with pytest.raises(TdqError, match=r"mid.*it matches no temporal feature.*down\.0, down\.1, up\.0"):
        by_hand(choice, {"mid*": "tib"})


def test_merged_rows_come_from_their_strategies() -> None:
    features: dict[Strategy, dict[str, Tensor]] = {
        "tib": {"a": torch.randn(3, 2, 4)},
        "cache": {"a": torch.randn(3, 2, 4)},
    }
    made = merged({"a": ["cache", "tib", "cache"]}, features)["a"]
    assert torch.equal(made[[0, 2]], features["cache"]["a"][[0, 2]])
    assert torch.equal(made[1], features["tib"]["a"][1])


def test_errors_by_the_formulas() -> None:
    target, made = {"a": torch.randn(3, 2, 4)}, {"a": torch.randn(3, 2, 4)}
    for row in range(3):
        exact, found = target["a"][row].double().flatten(), made["a"][row].double().flatten()
        expected = float((found - exact).dot(found - exact) / exact.dot(exact))
        assert float(relative_squared_error(target, made)["a"][row]) == pytest.approx(expected)
        cosine = float(found.dot(exact) / (found.norm() * exact.norm()))
        assert float(cosine_similarity(target, made)["a"][row]) == pytest.approx(cosine)


@pytest.mark.parametrize(("target", "made", "expected"), [(0.0, 0.0, 0.0), (0.0, 1.0, math.inf), (2.0, 2.0, 0.0)])
def test_errors_of_nothing(target: float, made: float, expected: float) -> None:
    found: Any = relative_squared_error({"a": torch.full((1, 3), target)}, {"a": torch.full((1, 3), made)})
    assert found["a"].tolist() == [expected]
