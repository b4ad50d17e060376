"""The ``tdq_reconstruct`` algorithm: calibrate, then learn rounding and intervals block by block."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from modelopt_tdq.calibration.calibrate import calibrate_scales
from modelopt_tdq.calibration.correct import correct_layers
from modelopt_tdq.core.distributed import processes
from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.place import require_weights
from modelopt_tdq.model.select import activation_quantizers
from modelopt_tdq.model.snapshot import restored_on_error
from modelopt_tdq.model.timestep import deliver_timestep, find_timestep
from modelopt_tdq.model.weight_fit import remember_weight
from modelopt_tdq.reconstruction.blocks import Block, find_blocks
from modelopt_tdq.reconstruction.cache import BlockCache
from modelopt_tdq.reconstruction.columns import block_columns
from modelopt_tdq.reconstruction.config import TdqReconstructConfig
from modelopt_tdq.reconstruction.learn import BlockParts, learn, sample_errors
from modelopt_tdq.reconstruction.observe import calls_in_order, probe
from modelopt_tdq.reconstruction.resume import BlockResult, Progress
from modelopt_tdq.reconstruction.rounding import RoundingQuantizer, can_learn_rounding
from modelopt_tdq.reconstruction.samples import Samples, SpreadReplay, require_enough_samples
from modelopt_tdq.training.attach import calibration_config, learn_scales
from modelopt_tdq.training.learned import learned_intervals, learned_quantizers

__all__ = ["reconstruction_report", "tdq_reconstruct"]

#: Attribute of the module that makes the intervals.
_REPORT = "_reconstruction"

_log = logging.getLogger(__name__)


def tdq_reconstruct(model: nn.Module, forward_loop: Callable[[nn.Module], Any] | None = None, **fields: Any) -> None:
    """Calibrate a ModelOpt-quantized model, then reconstruct it block by block on its own trajectories.

    Args:
        model: Quantized by ``mtq.quantize``.
        forward_loop: As for :func:`modelopt_tdq.calibration.calibrate.calibrate_scales`.
        **fields: Fields of :class:`TdqReconstructConfig`.

    Raises:
        TdqError: As calibration; or there are too few samples, the memory bound is too small, a block diverged, or
            ``cache_dir`` holds another run or is damaged. The model is left as it was.
    """
    known = {name: value for name, value in fields.items() if name in TdqReconstructConfig.model_fields}
    config = TdqReconstructConfig(**known)
    if processes() > 1:
        raise TdqError(
            "method", config.method, "it runs in one process", "Run it before torch.distributed is initialised"
        )
    require_weights(model, "be reconstructed")
    # tensors made in inference mode cannot be learned on
    with torch.inference_mode(False), restored_on_error(model), torch.no_grad():
        _reconstruct(model, forward_loop, config)


def reconstruction_report(model: nn.Module) -> list[BlockResult]:
    """How the reconstruction of each block went, in the order of execution; not kept when the model is saved.

    Raises:
        TdqError: The model was not reconstructed in this process.
    """
    report: list[BlockResult] | None = vars(learned_intervals(model)).get(_REPORT)
    if report is None:
        raise TdqError(
            "model", type(model).__name__, "it was not reconstructed here", 'Use {"method": "tdq_reconstruct"}'
        )
    return report


def _error_after(model: nn.Module, parts: BlockParts, cache: BlockCache, config: TdqReconstructConfig) -> float:
    """Of the block as it learned; infinite where its intervals became zero, which is as bad as it gets."""
    try:
        learned_intervals(model).materialize(model)
    except TdqError as error:
        if error.field != "scale":
            raise
        return math.inf
    return float(sample_errors(parts, cache, config).mean())


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _reconstruct(
    model: nn.Module, forward_loop: Callable[[nn.Module], Any] | None, config: TdqReconstructConfig
) -> None:
    activation_quantizers(model)
    recorder = SpreadReplay(model, deliver_timestep(model, config.timestep_argument), config.samples)
    recorded = None if forward_loop is None else recorder.recorded(forward_loop)
    replay = calibrate_scales(model, recorded, calibration_config(config))
    learn_scales(model, config)
    samples = recorder.chosen()
    learned = learned_intervals(model)
    require_enough_samples(samples, learned.description, list(learned_quantizers(model)), config)
    with _eval_mode(model):
        found = {block.name: block for block in find_blocks(model)}
        counts = calls_in_order(model, list(found), samples.call([0]))
        blocks = [found[name] for name in counts]
        _log.info("%d samples at %d times; %d blocks", len(samples), len(set(samples.times.tolist())), len(blocks))
        progress = None
        if config.cache_dir is not None:
            calibrated = torch.tensor(learned.description["initial"], dtype=torch.float32)
            names = [block.name for block in blocks]
            progress = Progress(Path(config.cache_dir), model, config, calibrated, samples, names)
        rounded: list[tuple[nn.Parameter, RoundingQuantizer]] = []
        results = []
        with tqdm(total=len(blocks) * config.iterations, unit="step", disable=not config.progress) as bar:
            uses = Counter(id(weight) for block in blocks for weight, _ in block.weights(model).values())
            for number, block in enumerate(blocks):
                bar.set_description(f"block {number + 1}/{len(blocks)} {block.name}")
                parts = _parts(model, block, config, uses)
                rounded += parts.weights.values()
                done = bar.n
                run = _Run(model, parts, samples, config, progress)
                results.append(run(number, block, counts[block.name], bar.update))
                bar.update(done + config.iterations - bar.n)
                _log.info("%s", results[-1])
        missing = [block for name, block in found.items() if name not in counts]
        results += [BlockResult(b.name, b.layers, 0.0, 0.0, False, "the model does not run it") for b in missing]
        learned.materialize(model)
        if replay is not None:
            correct_layers(model, replay, config)
        # nothing above touched a weight; from here on, nothing can fail that has not been done before
        for weight, quantizer in rounded:
            quantizer.fold(weight)
            remember_weight(weight, quantizer)
    vars(learned)[_REPORT] = results


def _parts(model: nn.Module, block: Block, config: TdqReconstructConfig, uses: Counter[int]) -> BlockParts:
    timestep = find_timestep(model)
    if timestep is None:
        raise TdqError("model", type(model).__name__, "it is not told the time", "Calibrate it first")
    quantizers = block.quantizers(model)
    weights = {}
    if config.learn_rounding:
        for name, (weight, quantizer) in block.weights(model).items():
            # a weight that several layers share can be rounded in one way only
            if uses[id(weight)] == 1 and can_learn_rounding(quantizer, weight):
                weights[name] = weight, RoundingQuantizer.from_tensor_quantizer(quantizer)
    source = learned_intervals(model).source
    columns = None
    if quantizers and source is not None:
        total = len(learned_quantizers(model))
        columns = block_columns(source, [q._column for q in quantizers.values()], total)
    return BlockParts(block.name, model.get_submodule(block.name), timestep, columns, quantizers, weights)


class _Run:
    """The reconstruction of one block."""

    def __init__(
        self,
        model: nn.Module,
        parts: BlockParts,
        samples: Samples,
        config: TdqReconstructConfig,
        progress: Progress | None,
    ) -> None:
        self._model, self._parts, self._samples = model, parts, samples
        self._config, self._progress = config, progress

    def __call__(self, number: int, block: Block, calls: int, tick: Callable[[], Any]) -> BlockResult:
        parts = self._parts
        if calls > 1:
            note = f"it runs {calls} times in one call of the model, and stays as calibrated"
            return BlockResult(block.name, block.layers, 0.0, 0.0, False, note)
        result = None if self._progress is None else self._progress.load(number, parts)
        if result is None:
            result = self._learn(number, block, tick)
            if self._progress is not None:
                self._progress.save(number, parts, result)
        learned_intervals(self._model).materialize(self._model)
        return result

    def _learn(self, number: int, block: Block, tick: Callable[[], Any]) -> BlockResult:
        model, parts, config = self._model, self._parts, self._config
        io = probe(model, block.name, self._samples)
        folder = None if self._progress is None else self._progress.chunks(number)
        cache = BlockCache(
            model, block.name, io, self._samples, config.batch_size, config.qdrop > 0, config.memory_limit, folder
        )
        before_columns = {} if parts.columns is None else parts.columns.read()
        before_further = {name: value.detach().clone() for name, value in parts.further.items()}
        try:
            before = float(sample_errors(parts, cache, config).mean())
            learn(parts, cache, config, before, config.seed * 1_000_003 + number, tick)
            after = _error_after(model, parts, cache, config)
        finally:
            cache.close()
        kept = after < before
        if not kept:
            self._take_back(before_columns, before_further)
        return BlockResult(block.name, block.layers, before, after, kept)

    def _take_back(self, columns: dict[str, Tensor], further: dict[str, Tensor]) -> None:
        for _, quantizer in self._parts.weights.values():
            quantizer.fix(None)
        if self._parts.columns is not None:
            self._parts.columns.write(columns)
        for name, value in further.items():
            self._parts.further[name].copy_(value)
