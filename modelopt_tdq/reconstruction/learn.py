"""Learning one block: its rounding and its intervals, on the squared error of its output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.core.time_weights import squared_weights
from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.timestep import CurrentTimestep
from modelopt_tdq.reconstruction.cache import BlockCache, Chunk
from modelopt_tdq.reconstruction.columns import BlockColumns
from modelopt_tdq.reconstruction.config import TdqReconstructConfig
from modelopt_tdq.reconstruction.rounding import RoundingQuantizer, exponent, regularization, rounding_rate
from modelopt_tdq.training.quantizer import LearnedQuantizer

__all__ = ["BlockParts", "learn", "sample_errors"]

#: A chunk is used for at least so many steps at a time, and all chunks at most so many times.
_STEPS_PER_VISIT, _MOST_VISITS = 25, 4


@dataclass(frozen=True)
class BlockParts:
    """A block and what is learned of it.

    Attributes:
        name: Of the block.
        module: The block.
        timestep: Of the model.
        columns: Of its activation quantizers in the source; None if it has none.
        quantizers: Those, by name.
        weights: Weights and their quantizers, by the quantizers' names.
    """

    name: str
    module: nn.Module
    timestep: CurrentTimestep
    columns: BlockColumns | None
    quantizers: dict[str, LearnedQuantizer]
    weights: dict[str, tuple[nn.Parameter, RoundingQuantizer]]

    @property
    def further(self) -> dict[str, Tensor]:
        """Further learned parameters of the activation quantizers' scheme."""
        return {f"{name}/{key}": p for name, q in self.quantizers.items() for key, p in q.further.items()}


def _squared_error(outputs: list[Tensor], targets: list[Tensor]) -> Tensor:
    """[n] mean squared error of each sample over all its outputs."""
    pairs = zip(outputs, targets, strict=True)
    total = sum((y.float() - x.float()).square().flatten(1).sum(1) for y, x in pairs)
    return torch.as_tensor(total / sum(x[0].numel() for x in targets))


@torch.no_grad()
def sample_errors(parts: BlockParts, cache: BlockCache, config: TdqReconstructConfig) -> Tensor:
    """[N] float64 mean squared error of the block's output for each sample, with its scales as in the tables.

    By the weight of the sample's time.
    """

    def run(chunk: Chunk) -> Tensor:
        with parts.timestep.at(chunk.times):
            errors = _squared_error(cache.io.run(parts.module, chunk.inputs), chunk.targets)
        return errors * squared_weights(config.time_weights, chunk.times).to(errors)

    return cache.errors(run)


def _visits(chunks: int, iterations: int) -> Iterator[tuple[int, range]]:
    """Which chunk is used in which steps."""
    if chunks == 1:
        yield 0, range(iterations)
        return
    visits = chunks * max(1, min(_MOST_VISITS, iterations // (chunks * _STEPS_PER_VISIT)))
    for visit in range(visits):
        steps = range(visit * iterations // visits, (visit + 1) * iterations // visits)
        if steps:
            yield visit % chunks, steps


@contextmanager
def _learning(parts: BlockParts, qdrop: float) -> Iterator[None]:
    """The block's activation quantizers in training mode, some of their inputs passed on as they are."""

    def drop(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        scale = module.pre_quant_scale  # of SmoothQuant
        full = module.smoothed(args[0] * scale if isinstance(scale, Tensor) else args[0])
        return torch.where(torch.rand_like(output, dtype=torch.float32) < qdrop, full, output)

    handles = [q.register_forward_hook(drop) for q in parts.quantizers.values()] if qdrop > 0 else []
    for quantizer in parts.quantizers.values():
        quantizer.training = True
    source = None if parts.columns is None else parts.columns.source
    if source is not None:
        source.train()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for quantizer in parts.quantizers.values():
            quantizer.training = False
        if source is not None:
            source.eval()


def _interval_lr(config: TdqReconstructConfig) -> float:
    if config.interval_lr is not None:
        return config.interval_lr
    return 0.002 if config.intervals in ("table", "static") else min(0.01, max(0.0005, 2.0 / config.iterations))


class _Optimizers:
    """Adam for the rounding and for the intervals, new for each block."""

    def __init__(self, parts: BlockParts, rounding: list[Tensor], config: TdqReconstructConfig) -> None:
        self.intervals = [] if parts.columns is None else [*parts.columns.values.values(), *parts.further.values()]
        self.rounding = rounding
        lr = rounding_rate(config.iterations) if config.rounding_lr is None else config.rounding_lr
        self._iterations = config.iterations
        self._interval_lr = _interval_lr(config)
        groups = [{"params": self.rounding, "lr": lr}, {"params": self.intervals, "lr": self._interval_lr}]
        self._adam = torch.optim.Adam([group for group in groups if group["params"]])

    def step(self, loss: Tensor, step: int) -> None:
        leaves = self.rounding + self.intervals
        for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True):
            leaf.grad = gradient
        if self.intervals:
            self._adam.param_groups[-1]["lr"] = self._interval_lr * (1.0 - step / self._iterations)
        self._adam.step()
        for leaf in leaves:
            leaf.grad = None


def _block_errors(parts: BlockParts, cache: BlockCache, batch: Chunk, qdrop: float) -> Tensor:
    """[n] error of each sample, with gradients."""
    inputs = batch.inputs
    if qdrop > 0:
        pairs = zip(batch.inputs, batch.full, strict=True)
        inputs = [torch.where(torch.rand(x.shape, device=x.device) < qdrop, y, x) for x, y in pairs]
    intervals = None if parts.columns is None else parts.columns.intervals(batch.times)
    with parts.timestep.at(batch.times, intervals):
        return _squared_error(cache.io.run(parts.module, inputs), batch.targets)


def _loss(
    parts: BlockParts,
    cache: BlockCache,
    batch: Chunk,
    config: TdqReconstructConfig,
    weights: Tensor,
    unit: float,
    rounding: list[Tensor],
    step: int,
) -> Tensor:
    """Error of a batch in units of the calibrated error, plus the weighted regularisation: a scalar.

    Samples count by ``weights`` [n].
    """
    errors = _block_errors(parts, cache, batch, config.qdrop)
    loss = (errors * weights.to(errors)).mean() / unit
    beta = exponent(step / config.iterations, config.warm_up, config.beta_start, config.beta_end)
    if beta is not None:
        for v in rounding:
            loss = loss + config.rounding_weight * regularization(v, beta)
    if not bool(torch.isfinite(loss)):
        raise _diverged(parts, cache, batch, errors, step)
    return loss


def learn(
    parts: BlockParts,
    cache: BlockCache,
    config: TdqReconstructConfig,
    error: float,
    seed: int,
    tick: Callable[[], None],
) -> None:
    """Learn the block's rounding and intervals; the rounding is fixed, the intervals are written into the source.

    Args:
        parts: The block; the model is in eval mode.
        cache: Its inputs and targets.
        config: Of the algorithm.
        error: Mean of :func:`sample_errors` of the calibrated block, the unit of the loss.
        seed: Of everything random.
        tick: Called after every step.

    Raises:
        TdqError: The loss is no finite number any more.
    """
    devices = [cache.chunk(0).times.device] if cache.chunk(0).times.is_cuda else []
    unit = max(error, 1e-30)
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), _learning(parts, config.qdrop):
        torch.manual_seed(seed)
        rounding = [quantizer.begin(weight) for weight, quantizer in parts.weights.values()]
        optimizers = _Optimizers(parts, rounding, config)
        if not optimizers.rounding and not optimizers.intervals:
            return
        for number, steps in _visits(len(cache.chunks), config.iterations):
            chunk = cache.chunk(number)
            weights = squared_weights(config.time_weights, chunk.times)
            for step in steps:
                rows = torch.randperm(len(chunk))[: config.batch_size].to(chunk.times.device)
                loss = _loss(parts, cache, chunk.pick(rows), config, weights[rows], unit, rounding, step)
                optimizers.step(loss, step)
                del loss  # its graph holds the batch
                tick()
            del chunk
    if parts.columns is not None:
        parts.columns.commit()
    for _, quantizer in parts.weights.values():
        quantizer.finish()


def _diverged(parts: BlockParts, cache: BlockCache, batch: Chunk, errors: Tensor, step: int) -> TdqError:
    """Which quantizer gave the first number that is not finite, and at which time."""
    rows = torch.nonzero(~torch.isfinite(errors.detach())).flatten().tolist() or [0]
    found: list[str] = []

    def watched(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not found and not bool(torch.isfinite(output).all()):
                found.append(name)

        return hook

    named: dict[str, nn.Module] = {**parts.quantizers, **{name: q for name, (_, q) in parts.weights.items()}}
    handles = [module.register_forward_hook(watched(name)) for name, module in named.items()]
    one = batch.pick(torch.tensor(rows[:1], device=batch.times.device))
    try:
        with torch.no_grad():
            _block_errors(parts, cache, one, 0.0)
    finally:
        for handle in handles:
            handle.remove()
    quantizer = found[0] if found else "none of its quantizers"
    return TdqError(
        "loss",
        float("nan"),
        f"the reconstruction of block {parts.name} diverged in step {step}, at time {float(one.times[0]):g}; the first "
        f"quantizer whose output is not finite: {quantizer}",
        "Lower `interval_lr` and `rounding_lr`, or leave this quantizer out with a `quant_cfg` rule",
    )
