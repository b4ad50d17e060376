"""Settings for all tests: one thread, fixed seeds, no random examples from one run to the next."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# `support` for every test, wherever pytest is started and whichever folders are packages
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
torch.set_num_threads(1)
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Random weights and inputs are the same in every run and in every order of the tests."""
    torch.manual_seed(0)
