"""Polygraphy runners for what Polygraphy has none for: a quantized torch model, OpenVINO, our ONNX Runtime session."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modelopt_tdq.compare.backends import Session
from modelopt_tdq.compare.layers import GIVEN
from modelopt_tdq.core.fake_quant import dequantize, quantize
from modelopt_tdq.errors import require
from modelopt_tdq.export.outputs import flatten_outputs
from modelopt_tdq.model.call import tensor_leaves, walk
from modelopt_tdq.model.model_table import temporal_quantizers
from modelopt_tdq.model.place import execution_device
from modelopt_tdq.model.quantizer import TemporalQuantizer

__all__ = ["call_model", "opened_runner", "session_runner", "torch_runner"]

Feeds = Mapping[str, Any]


def opened_runner(name: str, sample: Feeds, make: Callable[[], Session], fixed: Feeds | None = None) -> Any:
    """A Polygraphy ``BaseRunner`` that has a session while it is active.

    Args:
        name: Of the runner, as reports show it.
        sample: Arrays of one call by name; only their dtypes and ranks are looked at.
        make: Opens the session: takes arrays by name, returns arrays by name.
        fixed: Inputs that are the same in every call.

    Raises:
        MissingExtraError: Polygraphy is not installed.
    """
    base: Any = require("polygraphy.backend.base", "compare").BaseRunner
    metadata = require("polygraphy.common", "compare").TensorMetadata

    class Runner(base):  # type: ignore[misc]
        def activate_impl(self) -> None:
            self._session: Session | None = make()

        def deactivate_impl(self) -> None:
            self._session = None

        def get_input_metadata_impl(self) -> Any:
            found, dtypes = metadata(), {} if self._session is None else self._session.inputs
            for tensor, value in sample.items():
                dtype = np.dtype(dtypes.get(tensor, np.asarray(value).dtype))  # of the graph, if it is an input
                found.add(tensor, dtype=dtype, shape=(None,) * np.ndim(value))
            return found

        def infer_impl(self, feed_dict: Feeds) -> OrderedDict[str, Any]:
            start = time.perf_counter()
            outputs = {} if self._session is None else self._session({**feed_dict, **(fixed or {})})
            self.inference_time = time.perf_counter() - start
            return OrderedDict(outputs)

    return Runner(name=name)


def session_runner(name: str, session: Session, sample: Feeds, fixed: Feeds | None = None) -> Any:
    """A Polygraphy ``BaseRunner`` for one of our sessions: OpenVINO, or ONNX Runtime run node by node.

    Args:
        name: Of the runner, as reports show it.
        session: Takes arrays by name, returns arrays by name.
        sample: Arrays of one call by name; only their ranks are looked at.
        fixed: Inputs that are the same in every call.

    Raises:
        MissingExtraError: Polygraphy is not installed.
    """
    return opened_runner(name, sample, lambda: session, fixed)


class _TorchSession:
    """A torch model as a session."""

    def __init__(self, model: nn.Module, sample: Feeds, fixed: Mapping[str, Any] | None, codes: bool) -> None:
        self._model, self._fixed, self._codes = model, fixed, codes
        self.inputs = {tensor: np.asarray(value).dtype for tensor, value in sample.items()}

    def __call__(self, inputs: Feeds) -> dict[str, Any]:
        return call_model(self._model, inputs, self._fixed, codes=self._codes)


def torch_runner(
    model: nn.Module, sample: Feeds, *, name: str = "torch", fixed: Mapping[str, Any] | None = None, codes: bool = False
) -> Any:
    """A Polygraphy ``BaseRunner`` for a quantized torch model, with outputs named as export names them.

    Args:
        model: The module that ``mtq.quantize`` was called with.
        sample: Arrays of one call by argument name; only their dtypes and ranks are looked at.
        name: Of the runner, as reports show it.
        fixed: Arguments of the model that are the same in every call.
        codes: Return the codes of all temporal quantizers too.

    Raises:
        MissingExtraError: Polygraphy is not installed.
    """
    return opened_runner(name, sample, lambda: _TorchSession(model, sample, fixed, codes))


def call_model(
    model: nn.Module,
    feeds: Feeds,
    fixed: Mapping[str, Any] | None = None,
    *,
    codes: bool = False,
    given: Mapping[str, np.ndarray[Any, Any]] | None = None,
) -> dict[str, np.ndarray[Any, Any]]:
    """One call of a torch model: its first output, by the name that an exported graph has for it.

    Args:
        model: Called without gradients.
        feeds: Arrays by the names of graph inputs.
        fixed: A call whose other arguments, and whose nesting, this one has.
        codes: Return the codes of all temporal quantizers too, under the names and in the form of
            :func:`~modelopt_tdq.compare.layers.returning_codes`.
        given: Codes that quantizers pass on in place of their own (which are still what is returned), from
            :func:`~modelopt_tdq.compare.layers.given_codes`.
    """
    device = execution_device(model)
    tensors = {name: torch.as_tensor(np.asarray(value)).to(device) for name, value in feeds.items()}
    nested = set(tensor_leaves(fixed or {}))
    arguments = walk(dict(fixed or {}), tensors.get)
    arguments.update({name: tensor for name, tensor in tensors.items() if name not in nested})
    found: dict[str, np.ndarray[Any, Any]] = {}
    with torch.no_grad(), _tapped(model, found, given or {}) if codes or given else torch.no_grad():
        name, output = next(iter(flatten_outputs(model(**arguments), feeds).items()))
    return {name: output.float().cpu().numpy(), **found}


@contextmanager
def _tapped(model: nn.Module, found: dict[str, Any], given: Mapping[str, Any]) -> Iterator[None]:
    """Record the codes of all temporal quantizers, and let those in ``given`` take the place of their own."""

    def tap(name: str) -> Callable[[TemporalQuantizer, tuple[Any, ...], Tensor], Tensor | None]:
        def hook(quantizer: TemporalQuantizer, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            x = args[0]
            if quantizer.pre_quant_scale is not None:
                x = x * quantizer.pre_quant_scale
            rows = quantizer._rows(x)
            kind = "int8" if isinstance(quantizer.num_bits, int) else "fp8"
            key, count = f"{name}/codes", 0
            while f"{key}:{kind}" in found:  # a layer that runs more than once
                count += 1
                key = f"{name}/codes_{count}"
            found[f"{key}:{kind}"] = quantize(x, rows.scale, rows.offset, quantizer.num_bits).float().cpu().numpy()
            if key + GIVEN not in given:
                return None
            codes = torch.as_tensor(np.asarray(given[key + GIVEN], np.float32)).to(x.device).reshape(x.shape)
            return dequantize(codes, rows.value_scale, rows.value_offset).to(output.dtype)

        return hook

    handles = [q.register_forward_hook(tap(name)) for name, q in temporal_quantizers(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
