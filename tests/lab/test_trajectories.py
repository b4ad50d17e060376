"""Sampling without text: who can be sampled from noise alone, and which classes the samples have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import FAMILIES
from torch import Tensor

from modelopt_tdq.lab.denoising import noise_loss, noisy_batch, predict, sample_labels
from modelopt_tdq.lab.trajectories import is_unconditional, noise, sample, sample_shape

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize(
    ("family", "expected"),
    [("plain", True), ("unet", True), ("dit", True), ("unet_condition", False), ("sd3", False), ("flux", False)],
)
def test_who_needs_nothing_but_noise(family: str, expected: bool) -> None:
    model = FAMILIES[family].make()
    assert (family != "plain" and is_unconditional(model)) == (expected and family != "plain")


def test_samples_of_a_class_conditional_model_have_the_classes_in_turn() -> None:
    model: Any = FAMILIES["dit"].make().eval()
    classes = model.config.num_embeds_ada_norm
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda m, a, k: seen.append(k["class_labels"]), with_kwargs=True)
    scheduler = diffusers.DDIMScheduler()
    images = sample(model, scheduler, noise(classes + 2, sample_shape(model), 0), 3)
    assert images.shape == (classes + 2, *sample_shape(model))
    assert len(seen) == 3
    assert all(torch.equal(labels, torch.arange(classes + 2) % classes) for labels in seen)
    assert sample_labels(FAMILIES["unet"].make(), 3) is None


def test_the_training_batch_holds_the_noise_that_is_to_be_predicted() -> None:
    images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    scheduler = diffusers.DDPMScheduler()
    noisy, times, target, labels = noisy_batch(images, torch.arange(20), scheduler, 6, torch.Generator().manual_seed(0))
    level = scheduler.alphas_cumprod[times].sqrt().reshape(-1, 1, 1, 1)
    clean = (noisy - (1 - level.square()).sqrt() * target) / level
    assert labels is not None
    original = images[labels].float() / 127.5 - 1
    same = ((clean - original).abs().amax((1, 2, 3)) < 1e-3) | (
        (clean.flip(-1) - original).abs().amax((1, 2, 3)) < 1e-3
    )
    assert bool(same[times < 900].all())
    model = FAMILIES["unet"].make().eval()
    with torch.no_grad():
        loss = noise_loss(model, (noisy, times, predict(model, noisy, times), None))
    assert float(loss) == 0.0
