"""``quantize_pipeline``: calibrate the denoiser of a diffusers pipeline on the pipeline's own sampling."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from modelopt_tdq.errors import TdqError
from modelopt_tdq.pipeline.component import denoiser_name
from modelopt_tdq.recording import recorded_call

__all__ = ["quantize_pipeline", "sample_inputs"]


def quantize_pipeline(
    pipeline: Any,
    config: Mapping[str, Any],
    prompts: Sequence[str] | None = None,
    *,
    calls: Sequence[Mapping[str, Any]] | None = None,
    steps: int = 20,
    seed: int = 0,
    component: str | None = None,
    progress: bool = True,
) -> Any:
    """Quantize the denoiser of a diffusers pipeline, in place, calibrated on whole sampling trajectories.

    Guidance, negative prompts, schedulers and sizes are the pipeline's own business, so calibration sees what sampling
    will. Images are not decoded.

    Args:
        pipeline: From diffusers.
        config: For ``mtq.quantize``, as :data:`modelopt_tdq.TDQ_CONFIG`.
        prompts: One pipeline call each.
        calls: Instead of prompts, or further ones: keyword arguments of the pipeline, for one call each
            (``{"class_labels": [1, 2]}``, ``{"batch_size": 4}``, ``{"prompt_embeds": ...}``).
        steps: Sampling steps of a call that does not say; the table keeps its own times, so any number of steps can
            be sampled with afterwards.
        seed: Of the noise; call i starts from ``seed + i``.
        component: Name of the denoiser, where several components take a time.
        progress: Show a bar over the calls, with the time left.

    Returns:
        ``pipeline``.

    Raises:
        TdqError: There is nothing to call it with, no denoiser, or as calibration. The pipeline is left as it was.
    """
    import modelopt.torch.quantization as mtq

    name = denoiser_name(pipeline, component, _timestep_argument(config))
    every = list(_arguments(pipeline, prompts, calls, steps, seed))
    denoiser = getattr(pipeline, name)

    def forward_loop(model: nn.Module) -> None:
        for arguments in tqdm(every, "calibrate", unit="call", disable=not progress):
            pipeline(**arguments)

    quiet = getattr(pipeline, "_progress_bar_config", None)
    if hasattr(pipeline, "set_progress_bar_config"):
        pipeline.set_progress_bar_config(**{**(quiet or {}), "disable": True})
    try:
        mtq.quantize(denoiser, dict(config), forward_loop)
    finally:
        if hasattr(pipeline, "set_progress_bar_config"):
            pipeline.set_progress_bar_config(**(quiet or {}))
    return pipeline


def sample_inputs(
    pipeline: Any, component: str | None = None, timestep: str = "timestep", **call: Any
) -> dict[str, Any]:
    """What the pipeline passes to its denoiser in the first step of one call: ``sample_inputs`` of an export.

    Args:
        pipeline: From diffusers.
        component: Name of the denoiser, where several components take a time.
        timestep: The argument of its forward that holds the time.
        **call: Keyword arguments of the pipeline; ``num_inference_steps`` is 2 unless given.

    Returns:
        By name of the argument; what is None is left out.

    Raises:
        TdqError: The pipeline has no denoiser, or does not call it.
    """
    denoiser = getattr(pipeline, denoiser_name(pipeline, component, timestep))
    arguments = next(_arguments(pipeline, None, [call], 2, 0))
    with recorded_call(denoiser) as first:
        pipeline(**arguments)
    if not first:
        raise TdqError("call", sorted(call), "the pipeline did not run its denoiser", "Pass the arguments of a call")
    return {name: value for name, value in first.items() if value is not None and name != "return_dict"}


def _timestep_argument(config: Mapping[str, Any]) -> str:
    algorithm = config.get("algorithm")
    last = algorithm[-1] if isinstance(algorithm, list) and algorithm else algorithm
    return str(last.get("timestep_argument", "timestep")) if isinstance(last, Mapping) else "timestep"


def _arguments(
    pipeline: Any,
    prompts: Sequence[str] | None,
    calls: Sequence[Mapping[str, Any]] | None,
    steps: int,
    seed: int,
) -> Iterator[dict[str, Any]]:
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
