"""What the error of each quantizer does to the model's output, of all quantizers at once, by backward passes.

To first order, errors e_q of the quantizers change the output y by the sum of J_q e_q. For a random vector v whose
components are independent, of mean 0 and variance 1, the gradient of v . y with respect to what a quantizer passes on,
times its error, is the number v . J_q e_q. Its mean square over v is |J_q e_q|^2: the squared error of the output with
that quantizer alone (Hutchinson's estimate of a trace, 1990). A forward and a few backward passes in full precision
give it for all quantizers. The numbers of one v add up: so they tell of any set of quantizers, too.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor
from tqdm import tqdm

from modelopt_tdq.analysis.probe import Probe, is_weight
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
    """On the quantizers of a model in full precision: take down errors, and what gradients make of them.

    Attributes:
        samples: Of the call that runs.
        found: By variant and quantizer, the numbers of the backward pass that runs.
        read: What they read, each with the quantizers that read it.
    """

    def __init__(
        self, quantizers: Mapping[str, TensorQuantizer], variants: Mapping[str, Callable[[str], None]]
    ) -> None:
        self._quantizers, self._variants = quantizers, variants
        self.samples = 1
        self.found: dict[tuple[str, str], Tensor] = {}
        self.read: dict[tuple[int, torch.Size], tuple[Tensor, list[str]]] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, quantizer in self._quantizers.items():
                stack.callback(quantizer.register_forward_hook(self._hook(name)).remove)
            yield

    def _hook(self, name: str) -> Callable[..., Tensor]:
        def hook(quantizer: TensorQuantizer, args: tuple[Any, ...], output: Tensor) -> Tensor:
            x: Tensor = args[0].detach()
            if not is_weight(name):
                # keeps x, so that no other tensor gets its address
                self.read.setdefault((x.data_ptr(), x.shape), (x, []))[1].append(name)
            passed = output if output.requires_grad else output.detach().requires_grad_()
            errors = self._errors(name, quantizer, x, passed.detach())
            passed.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: self._take_down(name, errors, gradient)
            )
            return passed

        return hook

    def _errors(self, name: str, quantizer: TensorQuantizer, x: Tensor, exact: Tensor) -> dict[str, Tensor]:
        errors = {}
        quantizer.enable_quant()
        try:
            with torch.no_grad():
                for variant, use in self._variants.items():
                    use(name)
                    errors[variant] = quantizer.forward(x) - exact
        finally:
            quantizer.disable_quant()
        return errors

    def _take_down(self, name: str, errors: Mapping[str, Tensor], gradient: Tensor) -> None:
        whole = is_weight(name) or gradient.dim() == 0 or gradient.shape[0] % self.samples != 0
        for variant, error in errors.items():
            product = gradient.double() * error.double()
            rows = product.reshape(1 if whole else self.samples, -1).sum(1).cpu()
            before = self.found.get((variant, name))
            # a layer may run several times in a call
            self.found[variant, name] = rows if before is None else _added(before, rows)


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
    quantizers: Mapping[str, TensorQuantizer],
    variants: Mapping[str, Callable[[str], None]],
    progress: bool,
) -> tuple[dict[str, Effects], list[list[str]]]:
    """The numbers of each quantizer at the probed times.

    Args:
        probe: The model. Its parameters need no gradients from now on, and its attention lets them through.
        quantizers: Those that are asked for, by name.
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
        parts, together = _own_effects(probe, quantizers, variants, progress)
    except RuntimeError as error:
        failed = str(error)
    failures = [message for message in gather(failed) if message is not None]
    if failures:
        raise RuntimeError(failures[0])
    read = {first: names for groups in gather(together) for first, names in groups.items()}
    return _gathered(parts, probe.rows, variants), [group for group in read.values() if len(group) > 1]


def _own_effects(
    probe: Probe,
    quantizers: Mapping[str, TensorQuantizer],
    variants: Mapping[str, Callable[[str], None]],
    progress: bool,
) -> tuple[_Parts, dict[str, list[str]]]:
    """What this process's samples tell, and which quantizers read one tensor, by the first of them."""
    hooks = _Hooks(quantizers, variants)
    probe.model.requires_grad_(False)
    make_attention_trainable(probe.model)
    parts: _Parts = {}
    together: dict[str, list[str]] = {}
    with full_precision(probe.model), hooks.installed(), torch.enable_grad():
        for batch in tqdm(probe.batches, "sensitivity", disable=not progress, unit="step"):
            hooks.samples = max(1, len(batch.order))
            output = first_output(probe.model(**batch.call))
            for _, names in hooks.read.values():
                together[names[0]] = names
            hooks.read.clear()
            found: dict[tuple[str, str], list[Tensor]] = {}
            for number in range(_VECTORS):
                hooks.found.clear()
                vector = _vector(output, batch, number) if batch.own else torch.zeros_like(output)
                torch.autograd.backward(output, vector, retain_graph=number + 1 < _VECTORS)
                for key, rows in hooks.found.items():
                    found.setdefault(key, []).append(rows)
            if batch.counts:
                for key, numbers in found.items():
                    parts.setdefault(key, {}).setdefault(batch.row, []).append(torch.stack(numbers))
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
            elif is_weight(name):  # one number for all samples, of whatever process
                numbers.append(torch.stack(found).sum(0))
            else:
                numbers.append(torch.cat(found, 1))
        result[variant][name] = numbers
    return result
