"""Values that a model reads while it is traced: lengths, positions, places of a mask.

Python code that asks a tensor for its numbers (``.item()``, ``.tolist()``, ``.numpy()``, ``if``, an index of truth
values) decides how large other tensors are, or which operators run. torch.export knows no numbers, and fails. Where
they follow from constants, or from inputs whose values the caller has given, they are computed beside the trace, and
what was read becomes part of the graph.

The graph of everything else is what it is without this. Inputs that were read in this way are named in ``decided``:
their values have to be constants of the graph, or it would be wrong with other ones. Inputs of which one truth value
was read, as of "is the image all zeros?", stay inputs, and ``guards`` of the graph say whether the same would be read
again. So it is with floating-point inputs, such as latents, of which no more than truth values and integers are read.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["KnownValues", "code_in_model"]

#: What a tensor's numbers are read by, beside operators that say so themselves.
_READ = frozenset({"tolist", "numpy", "__array__"})
_READ_ONE = frozenset({"item", "__bool__", "__int__", "__index__", "__float__"})

#: Of these, some arguments give their shape and type only: the first one, or all but the first.
_LIKE_FIRST = frozenset({"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "new_tensor"})
_LIKE_OTHERS = frozenset({"type_as", "expand_as", "view_as", "reshape_as", "to"})

#: Their sizes may be given as tensors.
_SIZED = frozenset({"new_zeros", "new_ones", "new_full", "expand", "view", "reshape", "repeat", "narrow"})

_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


def _parts(value: Any) -> Iterator[Any]:
    """The leaves of arguments, those of slices too."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, slice):
            yield from (leaf.start, leaf.stop, leaf.step)
        elif isinstance(leaf, torch.Size):
            yield from leaf
        else:
            yield leaf


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    """The same arguments with ``function`` of every leaf."""

    def applied(leaf: Any) -> Any:
        if isinstance(leaf, slice):
            return slice(*map(function, (leaf.start, leaf.stop, leaf.step)))
        return function(leaf)

    return tree_map(applied, value)


def _is_traced(tensor: Tensor) -> bool:
    """Whether it stands for numbers that are not there."""
    return type(tensor) not in (Tensor, torch.nn.Parameter)


def _is_fraction(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _changes(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether a function changes its first argument, by torch's own rules for names."""
    special = name.startswith("__") and name.endswith("__")
    if special:
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__int__", "__index__", "__invert__"))
    return name.endswith("_") or kwargs.get("out") is not None or bool(kwargs.get("inplace"))


def _changed(args: Any, kwargs: Mapping[str, Any]) -> Any:
    """What such a function changes."""
    if kwargs.get("out") is not None:
        return kwargs["out"]
    return args[0] if args else kwargs.get("input")


class _Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What kind of operators run: those that read numbers, and those whose result cannot be told beforehand."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads = self.uncertain = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tags = func.tags
        if func.namespace not in ("aten", "prims", "prim") or torch.Tag.nondeterministic_seeded in tags:
            self.uncertain = True
        elif func is torch.ops.aten.index.Tensor:  # by numbers: of one size
            self.reads |= any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        elif torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags:
            self.reads = True
        return func(*args, **(kwargs or {}))


@contextmanager
def _beside_the_trace() -> Iterator[_Seen]:
    """Operators really run, and nobody but the result sees them."""
    without_python = torch._C._DisablePythonDispatcher()
    with torch._C.DisableTorchFunction(), _disable_current_modes(), without_python, _Seen() as seen:
        yield seen


class KnownValues(TorchFunctionMode):
    """While a model is traced: what its code reads is computed where it can be.

    Args:
        inputs: Values of inputs of the graph, by name.
        open_inputs: Names of those of them that stay inputs, whatever is read.

    Attributes:
        decided: Names of the others that were read.
        guards: Truth values [] in the trace, for each time that something was read without its inputs being decided.
        guarded: Where in the model's code that was, and which inputs it follows from.
        unknown: Where numbers were read that are not known.
    """

    def __init__(self, inputs: Mapping[str, Tensor], open_inputs: Collection[str] = ()) -> None:
        super().__init__()
        self.inputs = dict(inputs)
        self.decided: set[str] = set()
        self.guards: list[Tensor] = []
        self.guarded: dict[str, set[str]] = {}
        self._open = frozenset(open_inputs)
        self.unknown: dict[str, None] = {}
        self._values = WeakTensorKeyDictionary()
        #: By storage of a value: the inputs that it follows from; None if what is in it is not known any more.
        self._sources: dict[int, tuple[StorageWeakRef, set[str] | None]] = {}

    def of(self, traced: Mapping[str, Tensor]) -> KnownValues:
        """Begin a trace whose inputs are these tensors."""
        self._values, self._sources, self.guards = WeakTensorKeyDictionary(), {}, []
        with _beside_the_trace():
            values = {name: value.detach().clone() for name, value in self.inputs.items()}
        for name, value in values.items():
            self._values[traced[name]] = value
            self._add_sources(value, {name})
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        tensors = [leaf for leaf in _parts((args, kwargs)) if isinstance(leaf, Tensor)]
        if not tensors:
            return self._made(func, args, kwargs)
        real = self._real_arguments(name, args, kwargs)
        if real is not None:
            return self._known(func, name, (args, kwargs), real)
        return self._unknown(func, name, args, kwargs)

    def _unknown(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name in _READ or name in _READ_ONE:
            self.unknown.setdefault(code_in_model(traceback.extract_stack()))
        try:
            return self._partly_known(func, name, args, kwargs)
        finally:
            if _changes(name, kwargs):
                for tensor in tree_leaves(_changed(args, kwargs)):
                    self._forget(tensor)

    def _read(self, traced: Any, real: Any) -> bool:
        """Note that the numbers in these arguments are read; not if they are not to be."""
        leaves = zip(_parts(traced), _parts(real), strict=True)
        read = [(one, value, self._sources_of(value) or set()) for one, value in leaves if isinstance(value, Tensor)]
        if any(self._open & names and _is_fraction(value) for _, value, names in read):
            return False
        for one, value, names in read:
            if names and (self._open & names or (value.dtype == torch.bool and not value.dim())):
                self.guards.append((one == value.clone()).all())
                self.guarded.setdefault(code_in_model(traceback.extract_stack()), set()).update(names)
            else:
                self.decided |= names
        self.decided -= self._open
        return True

    def _value(self, tensor: Tensor) -> Tensor | None:
        value: Tensor | None = tensor
        if _is_traced(tensor):
            value = self._values.get(tensor)  # type: ignore[no-untyped-call]
        return None if value is None or self._sources_of(value) is None else value

    def _key(self, value: Tensor) -> StorageWeakRef:
        return StorageWeakRef(value.untyped_storage())  # type: ignore[no-untyped-call]

    def _sources_of(self, value: Tensor) -> set[str] | None:
        found = self._sources.get(self._key(value).cdata)
        return set() if found is None else found[1]

    def _add_sources(self, value: Tensor, names: set[str]) -> None:
        key = self._key(value)
        _, known = self._sources.get(key.cdata, (key, set[str]()))
        if known is not None:
            self._sources[key.cdata] = (key, known | names)

    def _forget(self, tensor: Any) -> None:
        """What is in this tensor, and in all that share its memory, is not known any more."""
        value = self._value(tensor) if isinstance(tensor, Tensor) else None
        if value is not None:
            key = self._key(value)
            self._sources[key.cdata] = (key, None)

    def _real_arguments(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """The values of all arguments; None if one is not known."""
        if any(isinstance(leaf, _SYMBOLS) for leaf in _parts((args, kwargs))):
            return None
        formal = set()
        if name in _LIKE_FIRST:
            formal = {id(args[0])} if args else set()
        elif name in _LIKE_OTHERS:
            formal = {id(leaf) for leaf in _parts((args[1:], kwargs)) if isinstance(leaf, Tensor)}
        unknown = False

        def real(leaf: Any) -> Any:
            nonlocal unknown
            if not isinstance(leaf, Tensor):
                return leaf
            value = self._value(leaf)
            if id(leaf) in formal and all(isinstance(size, int) for size in leaf.shape):
                value = torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device)
            unknown = unknown or value is None
            return value

        with torch._C.DisableTorchFunction(), _disable_current_modes():
            found = _each(real, (args, kwargs))
        return None if unknown else found

    def _known(self, func: Any, name: str, given: tuple[Any, Any], real: tuple[Any, Any]) -> Any:
        with _beside_the_trace() as seen:
            value = func(*real[0], **real[1])
        sources = self._all_sources(real)
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        reads = not seen.uncertain and (seen.reads or name in _READ)
        if seen.uncertain or (reads and not self._read(given, real)):
            return self._unknown(func, name, *given)
        if _changes(name, given[1]):
            for leaf in tree_leaves(_changed(*real)):
                self._add_sources(leaf, sources)
            if not any(_is_traced(leaf) for leaf in _parts(given) if isinstance(leaf, Tensor)):
                return value  # a constant of the model, which must not be changed twice
            result = self._partly_known(func, name, *given)
        elif not tensors:
            return value if reads else func(*given[0], **given[1])
        elif reads:
            result = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)
        else:
            result = func(*given[0], **given[1])
        self._pair(result, value, sources)
        return result

    def _all_sources(self, real: Any) -> set[str]:
        found = [self._sources_of(leaf) for leaf in _parts(real) if isinstance(leaf, Tensor)]
        return set[str]().union(*(sources for sources in found if sources))

    def _pair(self, result: Any, value: Any, sources: set[str]) -> None:
        traced, real = tree_leaves(result), tree_leaves(value)
        if len(traced) != len(real):
            return
        for one, other in zip(traced, real, strict=True):
            tensors = isinstance(one, Tensor) and isinstance(other, Tensor) and _is_traced(one)
            if tensors and one.shape == other.shape and one.dtype == other.dtype:
                self._values[one] = other
                self._add_sources(other, sources)

    def _made(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What is made of no tensor, such as a range."""
        result = func(*args, **kwargs)
        symbols = any(isinstance(leaf, _SYMBOLS) for leaf in _parts((args, kwargs)))
        if not symbols and isinstance(result, Tensor) and _is_traced(result):
            with _beside_the_trace() as seen:
                value = func(*args, **kwargs)
            if not seen.uncertain:
                self._pair(result, value, set())
        return result

    def _partly_known(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Some arguments are known; those that decide about sizes are given as numbers."""
        if name in ("__getitem__", "__setitem__"):
            return func(args[0], self._index(args[1]), *args[2:], **kwargs)
        if name in _SIZED:
            return func(args[0], *(_each(self._number, part) for part in args[1:]), **_each(self._number, kwargs))
        if name == "masked_select":
            source, mask = _two(args, kwargs, "mask")
            value = self._value(mask)
            if value is not None and self._read(mask, value):
                shape = torch.broadcast_shapes(source.shape, value.shape)  # type: ignore[no-untyped-call]
                with _beside_the_trace():
                    places = value.expand(shape).nonzero(as_tuple=True)
                return source.expand(shape)[places]
        if name == "repeat_interleave" and len(args) + len(kwargs) > 1:
            source, repeats = _two(args, kwargs, "repeats")
            value = self._value(repeats) if isinstance(repeats, Tensor) else None
            dim = args[2] if len(args) > 2 else kwargs.get("dim")
            sizes = source.numel() if dim is None else source.shape[dim]
            if value is not None and isinstance(sizes, int) and self._read(repeats, value):
                with _beside_the_trace():
                    index = torch.repeat_interleave(value.expand(sizes))
                return source.flatten()[index] if dim is None else source.index_select(dim, index)
        return func(*args, **kwargs)

    def _number(self, leaf: Any) -> Any:
        """A known tensor of one integer, as that."""
        value = self._value(leaf) if isinstance(leaf, Tensor) else None
        if value is None or value.dim() or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            return leaf
        if not self._read(leaf, value):
            return leaf
        with _beside_the_trace():
            return int(value)

    def _index(self, index: Any) -> Any:
        """An index whose known truth values are the places of those that are true, and its known numbers numbers."""
        found: list[Any] = []
        for item in index if isinstance(index, tuple) else (index,):
            value = self._value(item) if isinstance(item, Tensor) else None
            of_truth = value is not None and value.dtype in (torch.bool, torch.uint8) and value.dim() > 0
            if value is not None and of_truth and self._read(item, value):
                with _beside_the_trace():
                    found += value.nonzero(as_tuple=True)
            elif isinstance(item, (slice, Tensor)):
                found.append(_each(self._number, item))
            else:
                found.append(item)
        return tuple(found)


def _two(args: Any, kwargs: Any, second: str) -> tuple[Any, Any]:
    """The first two arguments."""
    return (args[0] if args else kwargs["input"]), (args[1] if len(args) > 1 else kwargs[second])


def code_in_model(stack: traceback.StackSummary) -> str:
    """The innermost line of a stack that belongs neither to torch nor to this package, as "file:line, code"; or ""."""
    own = (__file__.rpartition("export")[0], torch.__file__.rpartition("__init__")[0])
    for frame in reversed(stack):
        if not frame.filename.startswith(own):
            name = frame.filename.replace("\\", "/").rpartition("/")[2]
            return f"{name}:{frame.lineno}, `{(frame.line or '').strip()}`"
    return ""
