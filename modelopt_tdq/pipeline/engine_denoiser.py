"""EngineDenoiser: a session in the place of a pipeline's torch denoiser."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.errors import TdqError
from modelopt_tdq.export.inputs import FIXED, as_real, fixed_arguments, fixed_value
from modelopt_tdq.export.names import ZEROS
from modelopt_tdq.model.call import named_arguments, plain_leaves, tensor_leaves
from modelopt_tdq.model.place import execution_device
from modelopt_tdq.model.timestep import times_of_samples
from modelopt_tdq.pipeline.guard import StandIn
from modelopt_tdq.pipeline.outputs import assembled, output_class
from modelopt_tdq.runtime.sessions.forward_names import by_forward_names

__all__ = ["EngineDenoiser"]


class EngineDenoiser(StandIn):
    """Looks like the denoiser of a pipeline, and computes with a session.

    Everything but the computation - ``config``, its class, submodules that pipelines look at - is the original's; what
    would change the original's computation is refused, see :class:`~modelopt_tdq.pipeline.guard.StandIn`.

    Args:
        session: From names of graph inputs to arrays or tensors, to outputs by name; it has ``inputs``, the dtype of
            each graph input, and ``outputs``, their names in order. Those of :mod:`modelopt_tdq.runtime` do.
        original: The torch denoiser.
        timestep: The argument that holds the time.
        table: Inputs of the graph that are no arguments of the denoiser, by name: those of
            :func:`~modelopt_tdq.export.engine_table`.
    """

    def __init__(
        self, session: Any, original: nn.Module, timestep: str = "timestep", table: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(original)
        self.session = by_forward_names(session)
        self.table = dict(table or {})
        self._timestep = timestep
        self._keep_place(original)

    def _keep_place(self, original: nn.Module) -> None:
        device = execution_device(original)
        # follows the pipeline to another device or dtype, as weights would
        self.register_buffer("_place", torch.empty(0, dtype=getattr(original, "dtype", None), device=device), False)

    @property
    def device(self) -> torch.device:
        """Where the pipeline keeps its denoiser."""
        place: Tensor = self._place
        return place.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensors that the pipeline passes; the session converts them to those of the graph."""
        place: Tensor = self._place
        return place.dtype

    @functools.cached_property
    def _output_class(self) -> type[Any]:
        return output_class(type(self.original))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original's.

        Raises:
            TdqError: What is passed is not what was exported: another tensor, another size, or another value of
                something that is no tensor and therefore is part of the graph.
        """
        arguments = named_arguments(self._original, args, kwargs)
        return_dict = arguments.pop("return_dict", True)
        tensors = tensor_leaves(arguments)
        like = next(value for name, value in tensors.items() if name != self._timestep)
        feeds = self._feeds(tensors, arguments)
        self._require_fixed(arguments)
        results = self.session(feeds)
        outputs = {name: torch.as_tensor(results[name]).to(like.device, like.dtype) for name in self.session.outputs}
        return assembled(self._output_class, outputs, return_dict)

    def _feeds(self, tensors: dict[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Any]:
        wanted = [name for name in self.session.inputs if name not in self.table]
        # a number, such as a conditioning scale, is an input where it was exported as a tensor
        numbers = {**self._defaults, **plain_leaves(arguments)}
        for name in set(wanted) - set(tensors):
            if isinstance(numbers.get(name), (int, float)):
                tensors[name] = torch.as_tensor(numbers[name])
        tensors |= self._zeros(set(wanted) - set(tensors), next(v for n, v in tensors.items() if n != self._timestep))
        missing = sorted(set(wanted) - set(tensors))
        further = sorted(set(tensors) - set(wanted) - {self._timestep} - set(self._exported or ()))
        if missing or further:
            raise TdqError(
                "engine",
                missing or further,
                "the engine takes these inputs, which the pipeline did not pass"
                if missing
                else "the pipeline passes these, which the engine does not take",
                "Export with modelopt_tdq.sample_inputs(pipeline, ...) of a call like this one",
            )
        shapes = getattr(self.session, "shapes", {})
        return {**self.table, **{name: self._fitted(name, tensors[name], shapes.get(name)) for name in wanted}}

    def _zeros(self, names: Set[str], like: Tensor) -> dict[str, Tensor]:
        """Of these inputs, those that the program whose names the graph has would pass as zeros."""
        axes: dict[str, int] = json.loads(getattr(self.session, "metadata", {}).get(ZEROS, "{}"))
        found = {}
        for name in names & set(axes):
            shape = list(self.session.shapes[name])
            shape[axes[name]] = len(like)
            if all(isinstance(size, int) for size in shape):
                found[name] = like.new_zeros(shape)
        return found

    @functools.cached_property
    def _exported(self) -> dict[str, Any] | None:
        """What is part of the graph, by name; None if it is not of this package, or of an earlier version."""
        text = getattr(self.session, "metadata", {}).get(FIXED)
        found: dict[str, Any] | None = None if text is None else json.loads(text)
        return found

    def _require_fixed(self, arguments: dict[str, Any]) -> None:
        """What is part of the graph is as it was exported; left out, an argument has its default."""
        if self._exported is None:
            return
        exported, given = self._exported, fixed_arguments(arguments)
        # tensors that the graph has as constants, for its code reads their numbers
        constants = {name: value for name, value in tensor_leaves(arguments).items() if name in exported}
        given |= {name: fixed_value(tensor) for name, tensor in constants.items()}
        if given == exported:
            return
        defaults = fixed_arguments(self._defaults)
        exported, given = {**defaults, **exported}, {**defaults, **given}
        for name in sorted({*exported, *given} - {self._timestep, *self.session.inputs}):
            found, wanted = given.get(name), exported.get(name)
            if found != wanted:
                cure = "Pass that value, or export again with sample inputs of a call like this one"
                if isinstance(found, (int, float)) and not isinstance(found, bool):
                    cure += f"; with torch.tensor({wanted}) in its place there, it is an input of the graph"
                raise TdqError(
                    name, found, f"the engine was exported with {wanted!r}, which is part of its graph", cure
                )

    @functools.cached_property
    def _defaults(self) -> dict[str, Any]:
        parameters = inspect.signature(self.original.forward).parameters
        return {name: p.default for name, p in parameters.items() if p.default is not p.empty}

    def _of_samples(self, value: Tensor) -> Tensor:
        """The times of samples, of those of their tokens or frames.

        Raises:
            TdqError: They differ in a sample.
        """
        if value.dim() < 2 or not any(value.stride()):
            return value
        times = times_of_samples(value)
        if times.dim() > 1:
            raise TdqError(
                self._timestep,
                tuple(value.shape),
                f"a sample has several times, {times.min():g} to {times.max():g}, and the engine takes one for each",
                "Export with sample inputs that have different times for the tokens or frames of a sample",
            )
        return value.reshape(len(value), -1)[:, 0]

    @staticmethod
    def _spread(value: Tensor, shape: tuple[Any, ...]) -> Tensor:
        """The times of tokens or frames: those of their samples, where that is all there is."""
        if value.dim() > 1:
            return value
        sizes = [size if isinstance(size, int) else -1 for size in shape]
        return value.reshape(-1, *(1,) * (len(shape) - 1)).expand(sizes)

    def _fitted(self, name: str, value: Tensor, shape: tuple[Any, ...] | None) -> Tensor:
        """The time in the shape that the graph has; anything else has to fit."""
        if shape is None:
            return value
        if name == self._timestep:
            if len(shape) > 1:
                return self._spread(value, shape)
            value = self._of_samples(value)
            if not shape:
                # an expanded tensor holds one number: no need to wait for the GPU to see it
                if value.numel() > 1 and any(value.stride()) and not bool((value == value.flatten()[0]).all()):
                    raise TdqError(
                        name, value.tolist(), "the engine takes one time for the batch", "Export with a time per sample"
                    )
                return value.flatten()[0]
            size = shape[0] if isinstance(shape[0], int) else max(1, value.numel())
            return value.reshape(-1).expand(size) if value.numel() == 1 else value
        value = as_real(value)
        fixed = [(have, want) for have, want in zip(value.shape, shape, strict=False) if isinstance(want, int)]
        if len(shape) != value.dim() or any(have != want for have, want in fixed):
            raise TdqError(
                name,
                tuple(value.shape),
                f"the engine was built for {shape}",
                "Export at this size, or with dynamic_batch=True where only the batch differs",
            )
        return value
