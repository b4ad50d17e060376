"""The calls of a pipeline that calibration and recording make."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from modelopt_tdq.errors import TdqError

__all__ = ["call_arguments", "quiet"]


def call_arguments(
    pipeline: Any,
    prompts: Sequence[str] | None,
    calls: Sequence[Mapping[str, Any]] | None,
    steps: int,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """The keyword arguments of each call of a pipeline, without decoding where that can be left out.

    Args:
        pipeline: From diffusers.
        prompts: One call each.
        calls: Further ones: the caller's own arguments, which win over the rest.
        steps: Sampling steps of a call that does not say.
        seed: Of the noise; call i starts from ``seed + i``.

    Raises:
        TdqError: There is nothing to call it with, or the pipeline takes no such argument.
    """
    if isinstance(prompts, str):
        raise TdqError("prompts", prompts, "one string", "Pass a list of prompts")
    if not prompts and not calls:
        raise TdqError(
            "prompts", prompts, "nothing to sample with", "Pass prompts, or `calls` with the pipeline's arguments"
        )
    accepted = inspect.signature(pipeline.__call__).parameters
    common: dict[str, Any] = {"num_inference_steps": steps}
    if "output_type" in accepted:
        common["output_type"] = "latent" if _decodes_latents(pipeline) else "pt"
    make: Callable[[int], torch.Generator] = lambda i: torch.Generator().manual_seed(seed + i)  # noqa: E731
    every = [{"prompt": prompt} for prompt in prompts or ()] + [dict(call) for call in calls or ()]
    for number, call in enumerate(every):
        own = {**common, **call}
        if "generator" in accepted and "generator" not in own:
            own["generator"] = make(number)
        unknown = [name for name in own if name not in accepted]
        if unknown:
            raise TdqError(
                "calls",
                unknown,
                f"{type(pipeline).__name__} takes no such arguments",
                f"It takes {', '.join(accepted)}",
            )
        yield own


def _decodes_latents(pipeline: Any) -> bool:
    """Whether there is an autoencoder, whose work calibration can do without."""
    return getattr(pipeline, "vae", None) is not None or getattr(pipeline, "vqvae", None) is not None


@contextmanager
def quiet(pipeline: Any) -> Iterator[None]:
    """Without the pipeline's own progress bars."""
    if not hasattr(pipeline, "set_progress_bar_config"):
        yield
        return
    before = getattr(pipeline, "_progress_bar_config", None) or {}
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)
