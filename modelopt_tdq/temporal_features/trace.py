"""One run of a model, watched: on which of its inputs does every value depend?

A dispatch mode sees every operator. The result of an operator depends on whatever its operands depend on; views and
in-place operators are followed through their storage. Once a value is read into Python (``.item()``), everything
after it may depend on it; if it was the time, nothing after it can be computed again for another time. Names of layers
play no part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from modelopt_tdq.model.full_precision import full_precision
from modelopt_tdq.temporal_features.tape import Entry, Parameter, Slot, Tape

__all__ = [
    "ReadingMethods",
    "Watched",
    "is_random",
    "layers_with_parameters",
    "reads_values",
    "watch",
    "written_operands",
]

#: Operators, and methods that are none, that hand values of a tensor to Python.
_READS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"}
_READING_METHODS = (Tensor.tolist, Tensor.numpy, Tensor.__array__)


def reads_values(func: Any) -> bool:
    """Whether an operator hands values of its operands to Python, be it as the shape of its result."""
    return func._schema.name in _READS or torch.Tag.dynamic_output_shape in func.tags


class ReadingMethods(TorchFunctionMode):
    """Tells of tensors whose values are handed to Python by methods that are no operators."""

    def __init__(self, tell: Callable[[Tensor], object]) -> None:
        super().__init__()
        self._tell = tell

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READING_METHODS:
            self._tell(args[0])
        return func(*args, **(kwargs or {}))


def is_random(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operator draws random numbers: an attention draws none without dropout."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            return bool(args[position] if position < len(args) else kwargs.get(argument.name, argument.default_value))
    return True


def written_operands(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The operands that an operator changes in place."""
    found: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return found


_NOTHING: frozenset[str] = frozenset()

#: What depends on a generator of random numbers is not known before the model runs.
_RANDOM = "random numbers"


def layers_with_parameters(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that own parameters, and in which no other module but quantizers does: Linear, Conv, norms."""
    owners = {
        name
        for name, module in model.named_modules()
        if not isinstance(module, TensorQuantizer) and any(True for _ in module.parameters(recurse=False))
    }
    inner = {name for name in owners if any(other.startswith(f"{name}.") for other in owners if other != name)}
    modules = dict(model.named_modules())
    quantizers = {name for name, module in modules.items() if isinstance(module, TensorQuantizer)}
    inside = {name for name in owners if any(name.startswith(f"{q}.") for q in quantizers)}
    return {name: module for name, module in modules.items() if name in owners - inner - inside and name}


class Watched:
    """What was seen.

    Attributes:
        tape: All that depends on the time alone; its results are the outputs of all layers on it.
        features: Names of the layers whose outputs leave the tape, in order of execution, with the outputs' shapes.
        depends: For each layer that depends on something else: the inputs of the model on which it depends.
        multiply_adds: Of each layer, in one call.
        shapes: Of each layer's output.
    """

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.features: dict[str, tuple[int, ...]] = {}
        self.depends: dict[str, frozenset[str]] = {}
        self.multiply_adds: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """See the module. ``labels`` are the names of the model's inputs by tensor."""

    def __init__(self, model: nn.Module, labels: list[tuple[str, Tensor]], time: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.time = frozenset([time])
        self.parameters = {id(p): name for name, p in [*model.named_parameters(), *model.named_buffers()]}
        self._storages: dict[int, StorageWeakRef] = {}  # a weak reference keeps the address from being used again
        self._depends: dict[int, frozenset[str]] = {}
        self._origins: dict[int, frozenset[str]] = {}
        self._taken: dict[str, frozenset[str]] = {}
        self._slots = WeakTensorKeyDictionary()
        self._count = 0
        self._read = _NOTHING
        self._layer: str | None = None
        self.entries: list[Entry] = []
        self.results: dict[str, list[Slot]] = {}
        self.features: dict[str, None] = {}
        self.depends: dict[str, frozenset[str]] = {}
        self.multiply_adds: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, tensor in labels:
            self._depends[self._key(tensor)] = self.depends_on(tensor) | {name}

    def slot(self, tensor: Tensor) -> Slot:
        """The slot of a tensor, new where it has none."""
        if tensor not in self._slots:
            self._slots[tensor] = Slot(self._count, self._key(tensor))
            self._count += 1
        found: Slot = self._slots[tensor]
        return found

    def _key(self, tensor: Tensor) -> int:
        reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self._storages.setdefault(reference.cdata, reference)
        return int(reference.cdata)

    def depends_on(self, tensor: Tensor) -> frozenset[str]:
        """Names of the model's inputs."""
        return self._depends.get(self._key(tensor), _NOTHING)

    def _made_by(self, tensors: list[Tensor]) -> frozenset[str]:
        """The layers whose outputs these temporal values come from, without a layer in between."""
        return _NOTHING.union(*(self._origins.get(self._key(t), _NOTHING) for t in tensors))

    def read(self, *tensors: Tensor) -> None:
        """Values are handed to Python."""
        read = _NOTHING.union(self._read, *(self.depends_on(t) for t in tensors))
        if self.time <= read:  # what the tape would hold is true of this time only
            read |= {f"{next(iter(self.time))}.item()"}
        self._read = read
        self.features.update(dict.fromkeys(sorted(self._made_by(list(tensors)))))

    def _reference(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf in self._slots:
            return self._slots[leaf]
        name = self.parameters.get(id(leaf))
        return leaf if name is None else Parameter(name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = pytree.tree_leaves(result)
        inputs = _NOTHING.union(self._read, *(self.depends_on(t) for t in tensors))
        if is_random(func, args, kwargs):
            inputs |= {_RANDOM}
        if reads_values(func):
            self.read(*tensors)
            inputs |= self._read
        written = written_operands(func, args, kwargs)
        touched = [leaf for leaf in outputs if isinstance(leaf, Tensor)] + written
        known = inputs.union(*(self.depends_on(t) for t in touched))
        origins = self._made_by(tensors)
        for tensor in touched:
            key = self._key(tensor)
            self._depends[key] = self._depends.get(key, _NOTHING) | inputs
            if known <= self.time:
                self._origins[key] = self._origins.get(key, _NOTHING) | origins
        if not known <= self.time:
            self.features.update(dict.fromkeys(sorted(origins)))
        elif self._layer is None:
            recorded = pytree.tree_map(self._reference, (args, kwargs))
            slots = tuple(self.slot(leaf) if isinstance(leaf, Tensor) else None for leaf in outputs)
            self.entries.append(Entry(func, None, recorded[0], recorded[1], slots))
        if self._layer is not None and func.overloadpacket in flop_registry:
            flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
            self.multiply_adds[self._layer] = self.multiply_adds.get(self._layer, 0) + int(flops) // 2
        return result

    def enter(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A layer begins."""
        if self._layer is None:
            self._layer = name
            tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self._taken[name] = self._taken.get(name, _NOTHING) | self._made_by(tensors)

    def leave(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A layer ends."""
        if self._layer != name:
            return
        self._layer = None
        tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        depends = self._read.union(*(self.depends_on(t) for t in tensors))
        if not depends <= self.time:
            self.depends[name] = self.depends.get(name, _NOTHING) | depends
            return
        recorded = pytree.tree_map(self._reference, (args, kwargs))
        slots = tuple(self.slot(leaf) if isinstance(leaf, Tensor) else None for leaf in pytree.tree_leaves(output))
        self.entries.append(Entry(None, name, recorded[0], recorded[1], slots))
        if len(tensors) == 1 and tensors[0].dim() and depends == self.time:
            self.results.setdefault(name, []).append(self.slot(tensors[0]))
            self.shapes[name] = tuple(tensors[0].shape)
            self._origins[self._key(tensors[0])] = frozenset([name])

    def finish(self, output: Any) -> None:
        """The model's outputs need what they are; so do layers that depend on more in another of their calls."""
        leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        self.features.update(dict.fromkeys(sorted(self._made_by(leaves))))
        for name in self.results.keys() & self.depends.keys():
            self.depends[name] |= self.time
        waiting = [name for name in self.features if name in self.depends]
        while waiting:
            taken = self._taken[waiting.pop()]
            waiting += [name for name in taken - self.features.keys() if name in self.depends]
            self.features.update(dict.fromkeys(sorted(taken)))


def watch(
    model: nn.Module, call: Callable[[], Any], labels: list[tuple[str, Tensor]], time: tuple[str, Tensor], times: int
) -> Watched:
    """Run ``call`` and see what depends on what.

    Args:
        model: Whose layers are watched; its quantizers do nothing meanwhile.
        call: Calls the model once.
        labels: Every tensor that goes in, by the name of its argument; the time too.
        time: Name and tensor [], [1] or [B] of the time.
        times: How many different times a run of the tape shall compute: as many as that tensor has, or 1.
    """
    mode = _Watch(model, labels, time[0])
    start = mode.slot(time[1])
    with ExitStack() as stack:
        for name, module in layers_with_parameters(model).items():
            enter, leave = _hooks(mode, name)
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True).remove)
            stack.callback(module.register_forward_hook(leave, with_kwargs=True, always_call=False).remove)
        with full_precision(model), torch.no_grad(), mode, ReadingMethods(mode.read):
            output = call()
    mode.finish(output)
    results = {name: tuple(slots) for name, slots in mode.results.items() if name not in mode.depends}
    watched = Watched(Tape(tuple(mode.entries), start, time[1].dtype, tuple(time[1].shape), times, results))
    watched.features = {name: mode.shapes[name] for name in results if name in mode.features}
    watched.depends, watched.multiply_adds, watched.shapes = mode.depends, mode.multiply_adds, mode.shapes
    return watched


def _hooks(mode: _Watch, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mode.enter(name, args, kwargs)

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        mode.leave(name, args, kwargs, output)

    return enter, leave
