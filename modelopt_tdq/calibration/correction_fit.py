"""Fitting gains and biases of layers' outputs, layer by layer in the order of execution, each behind those before it.

One call of the model holds the same samples twice: the first half of the batch is computed in full precision, the
second quantized. At each quantized layer the two outputs z and y are compared, gain and bias of its channels are fitted

    z ~ gain * y + bias,    least squares over samples and positions, for each channel

and the second half goes on corrected: the layers behind it are fitted to what they will get. That takes one forward of
twice the batch per time, and keeps nothing but a few numbers of each channel.

From few samples the fit is uncertain. gain - 1 and the mean error, f, become f * max(0, 1 - var(f) / f^2): the positive
part of James and Stein (1961), each number by itself. var(f) is that of a ratio, or a mean, over independent samples.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
from torch import Tensor, nn
from tqdm import tqdm

from modelopt_tdq.core.distributed import all_reduce, gather
from modelopt_tdq.core.layer_correction import LayerCorrection
from modelopt_tdq.core.schedule import nearest_known
from modelopt_tdq.core.time_weights import weighted_mean
from modelopt_tdq.core.turns import Turns
from modelopt_tdq.model.call import first_output, layer_input
from modelopt_tdq.model.full_precision import full_precision
from modelopt_tdq.model.output_correction import correctable_layers
from modelopt_tdq.model.replay import Replay
from modelopt_tdq.model.replay_ranks import Batch, all_samples
from modelopt_tdq.model.select import has_batch, trailing_dimensions
from modelopt_tdq.model.timestep import CurrentTimestep

__all__ = ["Exact", "corrected_prediction_error", "fit_corrections", "halves_differ", "last_layer", "layer_errors"]

#: A gain is a factor of at most this, or its inverse.
_MOST = 2.0

#: Numbers of each sample and channel: mean of y, mean of z - y, and the sums of squares and products about them.
_MOMENTS = 4


def _moments(y: Tensor, z: Tensor, samples: int, trailing: int) -> Tensor:
    """[samples, 4, C] float64 on the CPU, of outputs [samples * n, ..., C, ...]."""
    channels = y.shape[y.dim() - 1 - trailing]

    def by_channel(x: Tensor) -> Tensor:
        return x.float().movedim(x.dim() - 1 - trailing, 1).reshape(samples, -1, channels, *_tail(x, trailing))

    own, error = by_channel(y), by_channel(z)
    dims = [1, *range(3, own.dim())]
    error = error - own
    mean, shift = own.mean(dims), error.mean(dims)
    own = own - mean.reshape(samples, 1, channels, *(1,) * (own.dim() - 3))
    products = ((own * other).sum(dims) for other in (own, error))
    return torch.stack([mean, shift, *products], 1).double().cpu()


def _tail(x: Tensor, trailing: int) -> tuple[int, ...]:
    """Sizes of what is left of x [N, ..., C, ...] when its channels are the second dimension."""
    return (*x.shape[1 : x.dim() - 1 - trailing], *x.shape[x.dim() - trailing :])


def _fitted(moments: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """Gain and bias [C] float32 of moments [S, 4, C]."""
    mean, shift, square, product = moments.unbind(1)
    samples = len(moments)
    center, bias = mean.mean(0), shift.mean(0)
    if samples < 2:
        return torch.ones_like(bias).float(), torch.zeros_like(bias).float()
    square = square + positions * (mean - center).square()
    product = product + positions * (mean - center) * (shift - bias)
    total = square.sum(0).clamp(min=torch.finfo(torch.float64).tiny)
    gain = product.sum(0) / total
    varies = (product - gain * square).square().sum(0) * samples / (samples - 1) / total.square()
    gain = _shrunk(gain, varies)
    bias = _shrunk(bias, shift.var(0) / samples)
    factor = (1 + gain).clamp(1 / _MOST, _MOST)
    return factor.float(), (bias - (factor - 1) * center).float()


def _shrunk(value: Tensor, variance: Tensor) -> Tensor:
    """``value`` times max(0, 1 - variance / value^2)."""
    square = value.square()
    kept = (1 - variance / square.clamp(min=torch.finfo(square.dtype).tiny)).clamp(min=0.0)
    return torch.where(square > 0, value * kept, 0.0)


class _AtLayer(Protocol):
    """What happens to the two outputs of one layer.

    Attributes:
        row: Of the time of the call.
        order: Of this process's samples in the call, as in :class:`modelopt_tdq.model.replay_ranks.Batch`.
    """

    row: int
    order: tuple[float, ...]

    def __call__(self, y: Tensor, z: Tensor) -> Tensor:
        """See the quantized and the full-precision output; gives what goes on in place of y."""


#: Makes a layer compute in full precision inside the context.
Exact = Callable[[nn.Module], AbstractContextManager[None]]


class _Twice:
    """Stands for the forward of one quantized layer while calls hold their samples twice."""

    def __init__(self, layer: nn.Module, timestep: CurrentTimestep, at_layer: _AtLayer | None, exact: Exact) -> None:
        self._layer, self._timestep, self._at_layer, self._forward = layer, timestep, at_layer, layer.forward
        self._exact = exact
        self._own = vars(layer).get("forward")  # of accelerate

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = layer_input(args, kwargs)
        batched = x.dim() > 0 if isinstance(self._layer, nn.Embedding) else has_batch(self._layer, x)
        if not batched or x.shape[0] % 2:
            with self._exact(self._layer):  # what all samples share, or one of them
                return self._forward(*args, **kwargs)

        def computed(half: Tensor) -> Tensor:
            given = [half if value is x else value for value in args]
            named = {name: half if value is x else value for name, value in kwargs.items()}
            output: Tensor = self._forward(*given, **named)
            return output

        exact, rounded = x.chunk(2)
        with self._exact(self._layer):
            z = computed(exact)
        intervals = self._timestep.intervals
        # all samples of the call have one time
        with self._timestep.at(self._timestep.require()[:1], None if intervals is None else intervals[:1]):
            y = computed(rounded)
        if self._at_layer is not None:
            y = self._at_layer(y, z)
        return torch.cat([z, y])

    def install(self) -> None:
        self._layer.forward = self

    def remove(self) -> None:
        vars(self._layer).pop("forward")
        if self._own is not None:
            vars(self._layer)["forward"] = self._own


class _Fit:
    """Gain and bias of one layer at each time."""

    def __init__(self, layer: nn.Module, rows: int, turns: Turns) -> None:
        self._layer, self._turns = layer, turns
        self.trailing = trailing_dimensions(layer)
        self.rows: list[tuple[Tensor, Tensor] | None] = [None] * rows
        self._seen: list[list[Tensor]] = [[] for _ in range(rows)]
        self.row = 0
        self.order: tuple[float, ...] = ()

    def __call__(self, y: Tensor, z: Tensor) -> Tensor:
        """The corrected y."""
        own = len(self.order) if self.order and y.shape[0] % len(self.order) == 0 else 0
        channels = y.shape[y.dim() - 1 - self.trailing]
        part = _moments(y, z, own, self.trailing) if own else torch.zeros(0, _MOMENTS, channels, dtype=torch.float64)
        positions = y[: y.shape[0] // own].numel() // channels if own else 0
        self._turns.exchange(self._layer, (self.order[:own], part, positions))
        known = self.rows[self.row]
        if known is None:
            return y
        shape = (-1, *(1,) * self.trailing)
        gain, bias = (value.to(y.device).reshape(shape) for value in known)
        return (y.float() * gain + bias).to(y.dtype)

    def heard(self, found: list[tuple[tuple[float, ...], Tensor, int]]) -> None:
        """Take into account what the layer made of each process's samples: order, moments, positions of a sample."""
        samples = [pair for order, moments, _ in found for pair in zip(order, moments.unsqueeze(1), strict=True)]
        # a layer may run several times in a call, and a time have several calls: what is known grows
        self._seen[self.row] += [moments for _, moments in sorted(samples, key=lambda sample: -sample[0])]
        if self._seen[self.row]:
            positions = max(count for _, _, count in found)
            self.rows[self.row] = _fitted(torch.cat(self._seen[self.row]), positions)


def _split(quantizer: TensorQuantizer, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook on a quantizer that is no part of a layer: the first half of its input passes."""
    x = args[0]
    if not isinstance(x, Tensor) or not isinstance(output, Tensor) or x.dim() == 0 or x.shape[0] % 2:
        return x
    return torch.cat([x.chunk(2)[0], output.chunk(2)[1]])


@contextmanager
def _twice(
    model: nn.Module, timestep: CurrentTimestep, at_layers: Mapping[str, _AtLayer], exact: Exact = full_precision
) -> Iterator[None]:
    """Meanwhile, the first half of every batch is computed in full precision, and the second quantized."""
    layers = [
        (name, m) for name, m in model.named_modules() if isinstance(m, QuantModule) and hasattr(m, "weight_quantizer")
    ]
    inner = {id(quantizer) for _, layer in layers for quantizer in layer.modules()}
    others = [m for m in model.modules() if isinstance(m, TensorQuantizer) and m.is_enabled and id(m) not in inner]
    with ExitStack() as stack:
        for name, layer in layers:
            stand_in = _Twice(layer, timestep, at_layers.get(name), exact)
            stand_in.install()
            stack.callback(stand_in.remove)
        for quantizer in others:
            stack.callback(quantizer.register_forward_hook(_split).remove)
        yield


class _Errors:
    """Squared error of one layer's output: without correction, with its mean over time, with that of each time."""

    def __init__(self, layer: nn.Module, gain: Tensor, bias: Tensor, weights: Tensor) -> None:
        self._rows, self._weights = (gain, bias), weights
        self._means = weighted_mean(gain, weights), weighted_mean(bias, weights)
        self._shape = (-1, *(1,) * trailing_dimensions(layer))
        self.squares = torch.zeros(len(gain), 4, dtype=torch.float64)  # of the three, and of what is right
        self.row = 0
        self.order: tuple[float, ...] = ()

    def __call__(self, y: Tensor, z: Tensor) -> Tensor:
        """y, corrected as at this time."""
        tried = [y.float()]
        for number in (None, self.row):
            rows = self._means if number is None else (rows[number] for rows in self._rows)
            gain, bias = (value.to(y.device).reshape(self._shape) for value in rows)
            tried.append(tried[0] * gain + bias)
        if self.order:
            exact = z.float()
            errors = [(value - exact).square().sum() for value in tried]
            self.squares[self.row] += torch.stack([*errors, exact.square().sum()]).double().cpu()
        return tried[-1].to(y.dtype)

    def relative(self) -> Tensor:
        """[3] relative to the output, summed over the times by their weights; over all processes."""
        squares = all_reduce(self.squares, "sum")
        seen = squares[:, 3] > 0
        return (squares[seen, :3] / squares[seen, 3:] * self._weights[seen].unsqueeze(1)).sum(0)


def _run_twice(
    model: nn.Module,
    replay: Replay,
    times: list[float],
    at_layers: Mapping[str, _AtLayer],
    description: str,
    progress: bool,
    exact: Exact = full_precision,
) -> Iterator[tuple[Batch, Any]]:
    """Yields each call, and what the model made of it."""
    bar = tqdm(replay.batches(times, twice=True), description, len(times), disable=not progress, unit="step")
    with _twice(model, replay.timestep, at_layers, exact), torch.no_grad():
        for batch in bar:
            for at_layer in at_layers.values():
                at_layer.row, at_layer.order = batch.row, batch.order
            yield batch, model(**batch.call)


def last_layer(model: nn.Module, replay: Replay, time: float) -> dict[str, nn.Module]:
    """The linear layer or convolution that runs last, by name; none if something else quantizes its output."""
    ran: list[tuple[str, nn.Module]] = []

    def hook(name: str) -> Callable[..., None]:
        return lambda layer, args, output: ran.append((name, layer))

    layers = correctable_layers(model, quantized=False)
    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        with full_precision(model), torch.no_grad():
            for batch in replay.batches([time]):
                model(**batch.call)
    finally:
        for handle in handles:
            handle.remove()
    found = gather(ran[-1][0] if ran else None)
    name = next((name for name in found if name is not None), None)
    return {} if name is None else {name: layers[name]}


def halves_differ(model: nn.Module, replay: Replay, time: float) -> bool:
    """Whether the first half of a call with each sample twice is not what the samples give by themselves.

    So it is where a model mixes the samples of a batch, or has them in another dimension than the first.
    """
    differ = False
    with torch.no_grad():
        for single, double in zip(replay.batches([time]), replay.batches([time], twice=True), strict=True):
            with full_precision(model):
                output = first_output(model(**single.call))
            expected, dtype = output.double(), output.dtype
            with _twice(model, replay.timestep, {}):
                found = first_output(model(**double.call)).double()
            differ |= found.shape[0] != 2 * expected.shape[0]
            if not differ:
                error = (found[: len(expected)] - expected).square().sum()
                # other batches may take other kernels: errors of rounding, far below those of samples that were mixed
                differ |= bool(error > torch.finfo(dtype).eps * expected.square().sum())
    return any(gather(differ))


def _listening(
    replay: Replay, layers: Mapping[str, nn.Module], fits: Mapping[str, _Fit]
) -> AbstractContextManager[None]:
    """Meanwhile, each fit hears what its layer makes of the samples of all processes."""
    return replay.turns.used({layer: fits[name].heard for name, layer in layers.items()})


def fit_corrections(
    model: nn.Module,
    layers: dict[str, nn.Module],
    replay: Replay,
    times: list[float],
    progress: bool,
) -> LayerCorrection:
    """Gains and biases over time of ``layers``, fitted to the replayed samples.

    Args:
        model: Quantized, without corrections.
        layers: By name.
        replay: Recorded calls.
        times: [K], ascending; those of ``replay`` among them.
        progress: Show a progress bar.

    Returns:
        At these times; of the layers that ran. A time at which a layer did not run has the row of the nearest at which
        it did.
    """
    fits = {name: _Fit(layer, len(times), replay.turns) for name, layer in layers.items()}
    with _listening(replay, layers, fits):
        deque(_run_twice(model, replay, times, fits, "corrections", progress), maxlen=0)
    gain: dict[str, Tensor] = {}
    bias: dict[str, Tensor] = {}
    for name, fit in fits.items():
        known = torch.tensor([row is not None for row in fit.rows])
        if bool(known.any()):
            nearest = nearest_known(torch.tensor(times), known).tolist()
            rows = [row for number in nearest if (row := fit.rows[number]) is not None]
            gain[name], bias[name] = (torch.stack(part) for part in zip(*rows, strict=True))
    return LayerCorrection(torch.tensor(times), gain, bias)


def corrected_prediction_error(
    model: nn.Module, layers: dict[str, nn.Module], replay: Replay, times: list[float], exact: Exact
) -> dict[int, Tensor]:
    """Squared error of the model's output while its layers are corrected, by what these very samples tell.

    Args:
        model: Quantized, without corrections.
        layers: Those that are corrected, by name.
        replay: Recorded calls.
        times: Those that are run.
        exact: Makes a layer compute in full precision.

    Returns:
        As :func:`modelopt_tdq.calibration.protect.prediction_error`.
    """
    fits = {name: _Fit(layer, len(times), replay.turns) for name, layer in layers.items()}
    found: dict[int, list[tuple[Sequence[float], Tensor]]] = defaultdict(list)
    with _listening(replay, layers, fits):
        for batch, output in _run_twice(model, replay, times, fits, "", False, exact):
            reference, rounded = first_output(output).float().chunk(2)
            if batch.counts:
                powers = [value.flatten(1).double().square().sum(1) for value in (rounded - reference, reference)]
                found[batch.row].append((batch.order, torch.stack(powers, 1)))
    return all_samples(found)


def layer_errors(
    model: nn.Module,
    correction: LayerCorrection,
    replay: Replay,
    times: list[float],
    weights: Tensor,
    progress: bool,
) -> dict[str, Tensor]:
    """How well each layer of ``correction`` does behind the others, on samples that it was not fitted to.

    Args:
        model: Quantized, without corrections.
        correction: A row for each of ``times``.
        replay: Recorded calls.
        times: [K].
        weights: [K] by how much squared errors at each time count.
        progress: Show a progress bar.

    Returns:
        By layer, [3] float64: the squared error of its output relative to the full-precision one, summed over the
        times, without its own correction, with its mean over time, and with that of each time.
    """
    layers = {name: model.get_submodule(name) for name in correction.names}
    errors = {
        name: _Errors(layer, correction.gain[name], correction.bias[name], weights) for name, layer in layers.items()
    }
    deque(_run_twice(model, replay, times, errors, "judging", progress), maxlen=0)
    return {name: error.relative() for name, error in errors.items()}
