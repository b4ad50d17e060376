"""Disturbance-aware selection: for each temporal feature, the strategy that disturbs it least."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from modelopt_tdq.errors import TdqError
from modelopt_tdq.temporal_features.config import STRATEGIES, Strategy
from modelopt_tdq.temporal_features.errors import FeatureErrors

__all__ = ["Choice", "by_hand", "select"]

#: The strategy of each row, by feature; "cache" or "tib" throughout unless rows were decided one by one.
Choice = dict[str, list[Strategy]]


def select(errors: Mapping[Strategy, FeatureErrors], granularity: str) -> Choice:
    """The strategy with the smaller relative squared error; a tie goes to the cheaper graph.

    Per block, means over all times are compared, among the strategies that are nowhere worse than naive quantization
    as far as there are any. A row in which naive quantization happens to be better than what was chosen takes its
    outputs: the table holds values, whatever computed them, so no feature is ever worse than without maintenance.

    Args:
        errors: [K] by feature, by strategy; those of "naive" are what to be better than.
        granularity: "block" or "step".
    """
    candidates = [strategy for strategy in STRATEGIES if strategy in errors and strategy != "naive"]
    chosen: Choice = {}
    for name, naive in errors["naive"].items():
        own = torch.stack([errors[strategy][name] for strategy in candidates])
        if granularity == "step":
            picked = own.argmin(0).tolist()  # the first of equals
        else:
            safe = (own <= naive).all(1)
            allowed = safe.nonzero().flatten() if bool(safe.any()) else torch.arange(len(candidates))
            picked = [int(allowed[own[allowed].mean(1).argmin()])] * len(naive)
        made = [(candidates[index], float(own[index, row])) for row, index in enumerate(picked)]
        chosen[name] = [
            "naive" if float(naive[row]) < error else strategy for row, (strategy, error) in enumerate(made)
        ]
    return chosen


def by_hand(choice: Choice, patterns: Mapping[str, Any]) -> Choice:
    """``choice`` with what the globs say; the last that matches counts.

    Raises:
        TdqError: A glob matches no feature.
    """
    chosen = dict(choice)
    for pattern, strategy in patterns.items():
        matching = fnmatch.filter(choice, pattern)
        if not matching:
            raise TdqError("choose", pattern, "it matches no temporal feature", f"Features: {', '.join(choice)}")
        chosen.update({name: [strategy] * len(choice[name]) for name in matching})
    return chosen


def merged(choice: Choice, features: Mapping[Strategy, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """[K, ...] by name: each row from the strategy that was chosen for it."""
    made = {}
    for name, strategies in choice.items():
        rows = [features[strategy][name][row] for row, strategy in enumerate(strategies)]
        made[name] = torch.stack(rows)
    return made
