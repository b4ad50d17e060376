"""Runs of a model, recorded: every operator, every call of a layer, every value that is read into Python.

A dispatch mode sees every operator. Views and operators in place are followed through their storage. Names of layers
play no part. What depends on what is worked out afterwards, by :mod:`modelopt_tdq.temporal_features.dataflow`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from modelopt_tdq.model.full_precision import full_precision
from modelopt_tdq.model.multiply_adds import count_multiply_adds
from modelopt_tdq.temporal_features.tape import Parameter, Slot

__all__ = [
    "Enter",
    "Event",
    "Inner",
    "Leave",
    "Operation",
    "Read",
    "Recorder",
    "Run",
    "has_schema",
    "layers_with_parameters",
]

#: Operators, and methods that are none, that hand values of a tensor to Python.
_READS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"}
_READING_METHODS = (Tensor.tolist, Tensor.numpy, Tensor.__array__)


def has_schema(func: Any) -> bool:
    """Operators that take functions, such as flex_attention, have none: they are taken to change and view nothing."""
    return not isinstance(func, HigherOrderOperator)


def _reads_values(func: Any) -> bool:
    """Whether an operator hands values of its operands to Python, be it as the shape of its result."""
    if not has_schema(func):
        return False
    return func._schema.name in _READS or torch.Tag.dynamic_output_shape in func.tags


class _ReadingMethods(TorchFunctionMode):
    """Tells of tensors whose values are handed to Python by methods that are no operators."""

    def __init__(self, tell: Callable[[Tensor], object]) -> None:
        super().__init__()
        self._tell = tell

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READING_METHODS:
            self._tell(args[0])
        return func(*args, **(kwargs or {}))


def _is_random(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operator draws random numbers: an attention draws none without dropout."""
    if not has_schema(func) or torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            return bool(args[position] if position < len(args) else kwargs.get(argument.name, argument.default_value))
    return True


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _operands(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, written: bool) -> list[Tensor]:
    """The operands that an operator changes in place, or else those that its result may be a view of."""
    found: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments if has_schema(func) else ()):
        if argument.alias_info is not None and (argument.alias_info.is_write or not written):
            found += _tensors(args[position] if position < len(args) else kwargs.get(argument.name))
    return found


def _makes_views(func: Any) -> bool:
    return has_schema(func) and any(returned.alias_info is not None for returned in func._schema.returns)


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


@dataclass(frozen=True)
class Inner:
    """A tensor that a layer has of its own, such as weights that another library puts there for the call."""

    description: str


@dataclass(frozen=True)
class Operation:
    """One operator.

    Attributes:
        function: Of ATen.
        args: Nested; tensors are slots, parameters their names as :class:`Parameter`, tensors of unknown origin
            themselves (:class:`Inner` inside a layer), the rest as it is.
        kwargs: Likewise.
        outputs: A slot or None for each leaf of the result.
        inputs: Storages of its operands.
        written: Storages of the operands that it changes in place.
        touched: Those, and the storages of its results.
        reads: Whether it hands values of its operands to Python.
        random: Whether it draws random numbers.
        layer: Name of the layer in which it runs.
        multiply_adds: That it takes.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[Slot | None, ...]
    inputs: tuple[int, ...]
    written: tuple[int, ...]
    touched: tuple[int, ...]
    reads: bool
    random: bool
    layer: str | None
    multiply_adds: int


@dataclass(frozen=True)
class Read:
    """Values of a tensor are handed to Python. ``inputs``: storages."""

    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Enter:
    """A layer begins. ``inputs``: storages of its arguments."""

    layer: str
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Leave:
    """A layer ends.

    Attributes:
        layer: Its name.
        args: As of an operator.
        kwargs: Likewise.
        outputs: A slot or None for each leaf of what it returns.
        shape: Of its output, if that is one tensor.
    """

    layer: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[Slot | None, ...]
    shape: tuple[int, ...] | None


Event = Operation | Read | Enter | Leave


@dataclass
class Run:
    """One call of the model.

    Attributes:
        time: Slot of the time.
        dtype: Of the time.
        shape: Of the time: [], [1] or [B].
        labels: Slot of every tensor that goes in, by the name of its argument; the time too.
        state: Storages of the tensors that the model held before, by where it holds them.
        events: In order.
        outputs: Storages of the model's outputs.
    """

    time: Slot
    dtype: torch.dtype
    shape: tuple[int, ...]
    labels: tuple[tuple[str, Slot], ...]
    state: Mapping[str, tuple[int, ...]]
    events: list[Event] = field(default_factory=list)
    outputs: tuple[int, ...] = ()


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records runs of one model, one after the other; a value of an earlier run is known in a later one.

    Args:
        model: Whose layers are watched.
        mode: In which the runs have no data; None: they have, so that what the model writes into its own tensors has to
            be undone.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, mode: FakeTensorMode | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model, self._mode = model, mode
        self._parameters = {id(p): name for name, p in [*model.named_parameters(), *model.named_buffers()]}
        self._storages: dict[int, StorageWeakRef] = {}  # a weak reference keeps the address from being used again
        self._same: dict[int, int] = {}
        self._slots = WeakTensorKeyDictionary()
        self._count = 0
        self._layer: str | None = None
        self._events: list[Event] = []
        self._held: dict[int, list[Tensor]] = {}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def run(
        self,
        call: Callable[[], Any],
        labels: Sequence[tuple[str, Tensor]],
        time: Tensor,
        state: Mapping[str, Sequence[Tensor]],
    ) -> Run:
        """Record one call; the quantizers do nothing meanwhile.

        Args:
            call: Calls the model once.
            labels: Every tensor that goes in, by the name of its argument; the time too.
            time: [], [1] or [B], one of these.
            state: The tensors that the model holds, by where.
        """
        held = {where: self._keys(tensors) for where, tensors in state.items()}
        if self._mode is None:
            for tensor in (t for tensors in state.values() for t in tensors if t not in self._slots):
                self._held.setdefault(self._key(tensor), []).append(tensor)
        named = tuple((name, self._slot(tensor)) for name, tensor in labels)
        run = Run(self._slot(time), time.dtype, tuple(time.shape), named, held)
        self._events, self._layer = run.events, None
        with full_precision(self._model), torch.no_grad(), self._watched(), self, _ReadingMethods(self._read):
            output = call()
        run.outputs = self._keys(_tensors(output))
        return run

    def restore(self) -> None:
        """Give the model's tensors that were changed in place their values back."""
        with torch.no_grad():
            for tensor, value in self._before.values():
                tensor.copy_(value)
        self._before.clear()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Told when layers begin and end."""
        with ExitStack() as stack:
            for name, module in layers_with_parameters(self._model).items():
                enter, leave = _hooks(self, name)
                stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True).remove)
                stack.callback(module.register_forward_hook(leave, with_kwargs=True, always_call=False).remove)
            yield

    def _slot(self, tensor: Tensor) -> Slot:
        """The slot of a tensor, new where it has none."""
        if tensor not in self._slots:
            self._slots[tensor] = Slot(self._count, self._key(tensor))
            self._count += 1
        found: Slot = self._slots[tensor]
        return found

    def _key(self, tensor: Tensor) -> int:
        reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self._storages.setdefault(reference.cdata, reference)
        return self._same.get(int(reference.cdata), int(reference.cdata))

    def _keys(self, tensors: Sequence[Tensor]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(self._key(tensor) for tensor in tensors))

    def _read(self, tensor: Tensor) -> None:
        self._events.append(Read(self._keys([tensor])))

    def _reference(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf in self._slots:
            return self._slots[leaf]
        name = self._parameters.get(id(leaf))
        if name is not None:
            return Parameter(name)
        return leaf if self._layer is None else Inner(f"{leaf.dtype}{tuple(leaf.shape)}")

    def _one_storage(self, func: Any, args: Any, kwargs: Any, results: Sequence[Tensor]) -> None:
        """Views of a tensor with data share, in a mode without data, the storage of its copy without data."""
        if not _makes_views(func):
            return
        sources = _operands(func, args, kwargs, written=False)
        if len(sources) == 1 and type(sources[0]) in (Tensor, nn.Parameter):
            source = self._key(sources[0])
            for result in results:
                if self._key(result) != source:
                    self._same[self._key(result)] = source

    def _without_data(self, func: Any, args: Any, written: Sequence[int]) -> Any:
        """The operands as the mode without data would take them.

        It would do so itself, but does not remember what an operator gives that it is handed tensors with data; most
        operators of a model are handed a parameter, and come again in every run.
        """
        if self._mode is None or written or _makes_views(func) or _reads_values(func):
            return args
        if not any(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves(args)):
            return args
        return pytree.tree_map_only((Tensor, nn.Parameter), self._own, args)

    def _own(self, tensor: Tensor) -> Tensor:
        mode = self._mode
        return mode.from_tensor(tensor) if mode is not None and type(tensor) in (Tensor, nn.Parameter) else tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        changed = _operands(func, args, kwargs, written=True)
        written = self._keys(changed)
        for tensor in (t for key in written for t in self._held.get(key, ())):
            self._before.setdefault(id(tensor), (tensor, tensor.detach().clone()))
        operands, inputs = pytree.tree_map(self._reference, (args, kwargs)), self._keys(_tensors((args, kwargs)))
        result = func(*self._without_data(func, args, written), **kwargs)
        outputs = pytree.tree_leaves(result)
        results = [leaf for leaf in outputs if isinstance(leaf, Tensor)]
        self._one_storage(func, args, kwargs, results)
        products = 0
        if self._layer is not None:
            products = count_multiply_adds(func, args, result)
        slots = tuple(self._slot(leaf) if isinstance(leaf, Tensor) else None for leaf in outputs)
        self._events.append(
            Operation(
                func,
                operands[0],
                operands[1],
                slots,
                inputs,
                written,
                self._keys([*results, *changed]),
                _reads_values(func),
                _is_random(func, args, kwargs),
                self._layer,
                products,
            )
        )
        return result

    def enter(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A layer begins."""
        if self._layer is None:
            self._layer = name
            self._events.append(Enter(name, self._keys(_tensors((args, kwargs)))))

    def leave(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A layer ends."""
        if self._layer != name:
            return
        self._layer = None
        operands = pytree.tree_map(self._reference, (args, kwargs))
        leaves = pytree.tree_leaves(output)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        slots = tuple(self._slot(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves)
        shape = tuple(tensors[0].shape) if len(tensors) == 1 else None
        self._events.append(Leave(name, operands[0], operands[1], slots, shape))


def _hooks(recorder: Recorder, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorder.enter(name, args, kwargs)

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        recorder.leave(name, args, kwargs, output)

    return enter, leave
