"""ModelOpt's patches to diffusers, for as long as a module of tests needs them."""

from __future__ import annotations

from collections.abc import Iterator

import modelopt.torch.opt as mto
import pytest


@pytest.fixture(scope="module")
def diffusers_checkpoints() -> Iterator[None]:
    """ModelOpt patches diffusers to save and load its state; taken back, so that other tests see diffusers as it is."""
    from diffusers import ModelMixin

    names = ("from_pretrained", "save_pretrained")
    before = {name: ModelMixin.__dict__[name] for name in names}
    mto.enable_huggingface_checkpointing()
    yield
    for name, method in before.items():
        setattr(ModelMixin, name, method)
    from modelopt.torch.opt.plugins import huggingface

    del ModelMixin._modelopt_cache
    huggingface._PATCHED_CLASSES.discard(ModelMixin)
