"""``quantize_pipeline``: calibrate the denoiser of a diffusers pipeline on the pipeline's own sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from modelopt_tdq.core.distributed import processes, rank
from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.wrapped import eager
from modelopt_tdq.pipeline.calls import call_arguments, quiet
from modelopt_tdq.pipeline.component import denoiser, denoiser_name

__all__ = ["quantize_pipeline"]


def quantize_pipeline(
    pipeline: Any,
    config: Mapping[str, Any],
    prompts: Sequence[str] | None = None,
    *,
    calls: Sequence[Mapping[str, Any]] | None = None,
    steps: int = 20,
    seed: int = 0,
    component: str | Sequence[str] | None = None,
    share_calls: bool = False,
    progress: bool = True,
) -> Any:
    """Quantize the denoiser of a diffusers pipeline, in place, calibrated on whole sampling trajectories.

    Guidance, negative prompts, schedulers and sizes are the pipeline's own business, so calibration sees what sampling
    will. Images are not decoded.

    Args:
        pipeline: From diffusers. Its denoiser may hold the quantizers already, uncalibrated, as
            ``from_pretrained(..., quantization_config=...)`` leaves them; and it may be compiled, which it stays:
            calibration runs it as it was written. (With ``fullgraph=True`` it will not run afterwards, as ModelOpt's
            attention breaks the graph, and its weight quantizers do until ``mtq.fold_weight``.)
        config: For ``mtq.quantize``, as :data:`modelopt_tdq.TDQ_CONFIG`.
        prompts: One pipeline call each.
        calls: Instead of prompts, or further ones: keyword arguments of the pipeline, for one call each
            (``{"class_labels": [1, 2]}``, ``{"batch_size": 4}``, ``{"prompt_embeds": ...}``).
        steps: Sampling steps of a call that does not say; the table keeps its own times, so any number of steps can
            be sampled with afterwards.
        seed: Of the noise; call i starts from ``seed + i``.
        component: Name of the denoiser, where several components take a time, or of a module inside a component, as
            ``controlnet.nets.0`` of several ControlNets. Several names, as
            ``("transformer", "transformer_2")`` of Wan 2.2, are quantized one after the other: each has a table of
            its own, over the times at which the pipeline calls it.
        share_calls: The processes of torch.distributed have all passed the same calls, and each makes its share of
            them: call i is made by that of rank i modulo their number. Else each makes all that it was given. Either
            way, all get the scales of one process that makes all calls.
        progress: Show a bar over the calls, with the time left.

    Returns:
        ``pipeline``.

    Raises:
        TdqError: There is nothing to call it with, no denoiser, or as calibration; or the calls cannot be shared by so
            many processes. The denoiser that it concerns is left as it was.
    """
    import modelopt.torch.quantization as mtq

    wanted = [component] if component is None or isinstance(component, str) else list(component)
    names = [denoiser_name(pipeline, name, _timestep_argument(config)) for name in wanted]
    number = len(list(call_arguments(pipeline, prompts, calls, steps, seed)))  # what cannot be called is refused first
    own = slice(rank(), None, processes()) if share_calls else slice(None)
    if share_calls:
        _require_shares(
            number, any(isinstance(m, FSDPModule) for name in names for m in denoiser(pipeline, name).modules())
        )

    def forward_loop(model: nn.Module) -> None:
        every = list(call_arguments(pipeline, prompts, calls, steps, seed))[own]  # with generators that start anew
        for arguments in tqdm(every, "sample", unit="image", disable=not progress):
            pipeline(**arguments)

    with eager(), quiet(pipeline):
        for name in names:
            mtq.quantize(denoiser(pipeline, name), dict(config), forward_loop)
    return pipeline


def _require_shares(calls: int, communicates: bool) -> None:
    """Raise if so many calls cannot be shared by the processes."""
    several = processes()
    if calls < several:
        raise TdqError(
            "calls", calls, f"fewer than the {several} processes that share them", "Pass more, or start fewer processes"
        )
    if communicates and calls % several:
        raise TdqError(
            "calls",
            calls,
            f"a denoiser that is spread by `fully_shard` has to make as many calls in each of the {several} processes",
            f"Pass {calls - calls % several} or {calls + several - calls % several}",
        )


def _timestep_argument(config: Mapping[str, Any]) -> str:
    algorithm = config.get("algorithm")
    last = algorithm[-1] if isinstance(algorithm, list) and algorithm else algorithm
    return str(last.get("timestep_argument", "timestep")) if isinstance(last, Mapping) else "timestep"
