"""Settings for all tests: one thread, fixed seeds, no random examples from one run to the next."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture(autouse=True, scope="session")
def operators_are_read_once() -> Iterator[None]:
    """torch.onnx reads the sources of all its operators anew in every export, a second each: here once per opset."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:  # of no version of torch known so far: exports only take longer
        yield
        return
    read = functools.cache(ONNXRegistry.from_torchlib)

    def copied(opset_version: int) -> Any:
        registry = copy.copy(read(opset_version))
        registry.functions = {name: list(found) for name, found in registry.functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(copied))
        yield


@pytest.fixture(autouse=True, scope="module")
def plain_diffusers() -> Iterator[None]:
    """ModelOpt patches diffusers to save and load its state; taken back, so that other tests see diffusers as it is."""
    from diffusers import ModelMixin

    names = ("from_pretrained", "save_pretrained")
    before = {name: ModelMixin.__dict__[name] for name in names}
    yield
    if "_modelopt_cache" not in ModelMixin.__dict__:
        return
    from modelopt.torch.opt.plugins import huggingface

    for name, method in before.items():
        setattr(ModelMixin, name, method)
    del ModelMixin._modelopt_cache
    huggingface._PATCHED_CLASSES.discard(ModelMixin)


@pytest.fixture(scope="module")
def diffusers_checkpoints(plain_diffusers: None) -> None:
    """Models are saved and loaded with ModelOpt's state."""
    import modelopt.torch.opt as mto

    mto.enable_huggingface_checkpointing()
