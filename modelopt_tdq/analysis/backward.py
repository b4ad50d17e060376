"""What the error of each quantizer does to the model's output, of all quantizers at once, by backward passes.

To first order, errors e_q of the quantizers change the output y by the sum of J_q e_q. For a random vector v whose
components are independent, of mean 0 and variance 1, the gradient of v . y with respect to what a quantizer passes on,
times its error, is the number v . J_q e_q. Its mean square over v is |J_q e_q|^2: the squared error of the output with
that quantizer alone (Hutchinson's estimate of a trace, 1990). A forward and a few backward passes in full precision
give it for all quantizers. The numbers of one v add up: so they tell of any set of quantizers, too.

The errors of a layer's weights are taken as what they make of its output. So no gradients of weights are needed, and
no copy of any; and the numbers are of samples, as those of activations are, which makes the mean more certain.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from tqdm import tqdm

from modelopt_tdq.analysis.graph import is_too_large, recomputed_blocks
from modelopt_tdq.analysis.probe import Probe
from modelopt_tdq.core.distributed import gather
from modelopt_tdq.model.call import first_output
from modelopt_tdq.model.full_precision import full_precision
from modelopt_tdq.model.replay_ranks import Batch
from modelopt_tdq.training.attention import make_attention_trainable

__all__ = ["Effects", "effects", "noise_of"]

#: Random vectors at each time.
_VECTORS = 4

#: By the name of a quantizer, over the probed times: its numbers, [vectors, n], where n is of samples, or 1 for all.
Effects = dict[str, list[Tensor]]

#: By variant and quantizer, and by row, the numbers of each call of this process: [vectors, n].
_Parts = dict[tuple[str, str], dict[int, list[Tensor]]]


def noise_of(*quantizers: list[Tensor]) -> Tensor:
    """[T] float64, the squared error of the output that these quantizers make together, by their numbers."""
    return torch.stack([_added(*rows).square().sum(1).mean() for rows in zip(*quantizers, strict=True)])


def _added(*numbers: Tensor) -> Tensor:
    """The sum of numbers [..., n] of the same vectors, of which some may be for each sample and others for all."""
    if len({rows.shape[-1] for rows in numbers}) > 1:
        numbers = tuple(rows.sum(-1, keepdim=True) for rows in numbers)
    return torch.stack(numbers).sum(0)


class _Hooks:
    """On the quantizers and layers of a model in full precision: take down errors, and what gradients make of them.

    Attributes:
        samples: Of the call that runs.
        found: By variant and quantizer, the numbers of the backward pass that runs.
        read: What quantizers of activations read in the forward, each with those that read it.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, tuple[list[str], list[str]]],
        variants: Mapping[str, Callable[[str], None]],
    ) -> None:
        self._model, self._layers, self._variants = model, layers, variants
        self._aside = False
        self.samples = 1
        self.found: dict[tuple[str, str], Tensor] = {}
        self.read: dict[tuple[Any, ...], list[str]] | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        with ExitStack() as stack:
            for layer, (inputs, weights) in self._layers.items():
                for name in inputs:
                    quantizer = self._model.get_submodule(name)
                    stack.callback(quantizer.register_forward_hook(self._input_hook(name)).remove)
                if weights:
                    hook = self._output_hook(weights)
                    module = self._model.get_submodule(layer)
                    stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def _input_hook(self, name: str) -> Callable[..., Tensor | None]:
        """What the activation's own error does."""

        def hook(quantizer: TensorQuantizer, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if self._aside:
                return None
            x: Tensor = args[0]
            if self.read is not None:
                # the reference to the storage is weak; as long as it is there, no other has its address
                storage = StorageWeakRef(x.untyped_storage())  # type: ignore[no-untyped-call]
                key = (storage, x.storage_offset(), x.shape)
                names = self.read.setdefault(key, [])
                names += [name] if name not in names else []
            if not torch.is_grad_enabled():  # the block runs once more, with gradients
                return None
            passed = output if output.requires_grad else output.detach().requires_grad_()
            errors = {}
            with self._quantizing(quantizer):
                for variant, use in self._variants.items():
                    use(name)
                    errors[variant, name] = quantizer.forward(x.detach()) - passed.detach()
            self._watch(passed, errors)
            return passed

        return hook

    def _output_hook(self, names: list[str]) -> Callable[..., Tensor | None]:
        """What the errors of a layer's weights do: they make an error of its output.

        Its gradient needs neither those of weights nor weights' errors, each as large as the model.
        """
        quantizers = {name: self._model.get_submodule(name) for name in names}

        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
            if self._aside or not torch.is_grad_enabled():
                return None
            y = first_output(output)
            errors: dict[tuple[str, str], Tensor] = {}
            for name, quantizer in quantizers.items():
                with self._quantizing(quantizer):
                    error = first_output(layer(*args, **kwargs)) - y.detach()
                errors |= {(variant, name): error for variant in self._variants}
            alone = not y.requires_grad and output is y
            passed = y.detach().requires_grad_().clone() if alone else y
            if passed.requires_grad:
                self._watch(passed, errors)
            return passed if alone else None

        return hook

    @contextmanager
    def _quantizing(self, quantizer: TensorQuantizer) -> Iterator[None]:
        """What is called in the body is not of the model's call."""
        quantizer.enable_quant()
        self._aside = True
        try:
            with torch.no_grad():
                yield
        finally:
            self._aside = False
            quantizer.disable_quant()

    def _watch(self, passed: Tensor, errors: Mapping[tuple[str, str], Tensor]) -> None:
        passed.register_hook(lambda gradient: self._take_down(errors, gradient))  # type: ignore[no-untyped-call]

    def _take_down(self, errors: Mapping[tuple[str, str], Tensor], gradient: Tensor) -> None:
        whole = gradient.dim() == 0 or gradient.shape[0] % self.samples != 0
        for key, error in errors.items():
            product = gradient.float() * error.float()
            rows = product.reshape(1 if whole else self.samples, -1).sum(1, dtype=torch.float64)
            before = self.found.get(key)
            # a layer may run several times in a call
            self.found[key] = rows if before is None else _added(before, rows)


def _vector(output: Tensor, batch: Batch, number: int) -> Tensor:
    """Signs at random, those of each sample by itself: the same in whatever batch and process it is."""
    parts = []
    for order, sample in zip(batch.order, output.tensor_split(len(batch.order)), strict=True):
        seed = (struct.unpack("<q", struct.pack("<d", order))[0] + number) % 2**63
        bits = torch.randint(2, sample.shape, generator=torch.Generator().manual_seed(seed))
        parts.append(2 * bits - 1)
    return torch.cat(parts).to(output)


def effects(
    probe: Probe,
    layers: Mapping[str, tuple[list[str], list[str]]],
    variants: Mapping[str, Callable[[str], None]],
    progress: bool,
) -> tuple[dict[str, Effects], list[list[str]]]:
    """The numbers of each quantizer at the probed times.

    Args:
        probe: The model. Its parameters need no gradients from now on, and its attention lets them through.
        layers: As :func:`modelopt_tdq.analysis.probe.layer_quantizers` gives them.
        variants: What each variant does to the quantizer of a name before its error is taken.
        progress: Show a progress bar.

    Returns:
        By variant, for the quantizers that gradients reached; and those that read one tensor, in groups.

    Raises:
        RuntimeError: The model has no backward pass, or it does not fit into memory; in all processes if in one.
    """
    parts: _Parts = {}
    together: dict[str, list[str]] = {}
    failed = None
    try:
        parts, together = _own_effects(probe, layers, variants, progress)
    except RuntimeError as error:
        failed = str(error)
    failures = [message for message in gather(failed) if message is not None]
    if failures:
        raise RuntimeError(failures[0])
    read = {first: names for groups in gather(together) for first, names in groups.items()}
    return _gathered(parts, probe.rows, variants), [group for group in read.values() if len(group) > 1]


def _own_effects(
    probe: Probe,
    layers: Mapping[str, tuple[list[str], list[str]]],
    variants: Mapping[str, Callable[[str], None]],
    progress: bool,
) -> tuple[_Parts, dict[str, list[str]]]:
    """What this process's samples tell, and which quantizers read one tensor, by the first of them."""
    hooks = _Hooks(probe.model, layers, variants)
    probe.model.requires_grad_(False)
    make_attention_trainable(probe.model)
    parts: _Parts = {}
    together: dict[str, list[str]] = {}
    with full_precision(probe.model):
        by_blocks = is_too_large(probe.model, probe.batches[0].call if probe.batches else None)
        holding = recomputed_blocks(probe.model) if by_blocks else nullcontext()
        with holding, hooks.installed(), torch.enable_grad():
            for batch in tqdm(probe.batches, "sensitivity", disable=not progress, unit="step"):
                hooks.samples = max(1, len(batch.order))
                hooks.read = {}
                output = first_output(probe.model(**batch.call))
                together |= {names[0]: names for names in hooks.read.values()}
                hooks.read = None
                found: dict[tuple[str, str], list[Tensor]] = {}
                for number in range(_VECTORS):
                    hooks.found.clear()
                    vector = _vector(output, batch, number) if batch.own else torch.zeros_like(output)
                    torch.autograd.backward(output, vector, retain_graph=number + 1 < _VECTORS)
                    for key, rows in hooks.found.items():
                        found.setdefault(key, []).append(rows)
                if batch.counts:
                    for key, numbers in found.items():
                        parts.setdefault(key, {}).setdefault(batch.row, []).append(torch.stack(numbers).cpu())
    return parts, together


def _gathered(parts: _Parts, rows: list[int], variants: Mapping[str, Any]) -> dict[str, Effects]:
    """Of all processes."""
    everywhere = gather(parts)
    result: dict[str, Effects] = {variant: {} for variant in variants}
    for variant, name in dict.fromkeys(key for part in everywhere for key in part):
        numbers = []
        for row in rows:
            found = [block for part in everywhere for block in part.get((variant, name), {}).get(row, [])]
            if not found:
                numbers.append(torch.zeros(_VECTORS, 1, dtype=torch.float64))
            else:
                numbers.append(torch.cat(found, 1))
        result[variant][name] = numbers
    return result
