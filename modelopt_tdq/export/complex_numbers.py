"""Models that compute with complex numbers, as rotary embeddings do, in real ones: ONNX has no operators for them.

A complex tensor [...] becomes a real one [..., 2]. What torch.export has traced is run once more with such tensors, and
traced again. Operators of the last dimension alone change; those of shapes leave it where it is. Complex inputs of the
model are such tensors in the graph, too.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from modelopt_tdq.export.inputs import as_real
from modelopt_tdq.export.program import traced, without_guards

__all__ = ["in_real_numbers", "real_inputs"]

_ATEN = torch.ops.aten

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Complex:
    """Stands for a complex tensor [...]: [..., 2], its real and imaginary part."""

    pairs: Tensor

    @property
    def rank(self) -> int:
        return self.pairs.dim() - 1

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        return self.pairs[..., 0], self.pairs[..., 1]

    def axis(self, dimension: int) -> int:
        """The same dimension of the pairs."""
        return dimension if dimension >= 0 else dimension - 1


class _UnknownError(Exception):
    """An operator on complex numbers that is not known here."""


def _of(real: Tensor, imaginary: Tensor) -> _Complex:
    one, other = torch.broadcast_tensors(real, imaginary)  # type: ignore[no-untyped-call]
    return _Complex(torch.stack([one, other], -1))


def _product(one: Any, other: Any) -> _Complex:
    if isinstance(one, _Complex) and isinstance(other, _Complex):
        (a, b), (c, d) = one.parts, other.parts
        return _of(a * c - b * d, a * d + b * c)
    number, factor = (one, other) if isinstance(one, _Complex) else (other, one)
    if isinstance(factor, complex):
        return _product(number, _Complex(number.pairs.new_tensor([factor.real, factor.imag])))
    if not isinstance(number, _Complex):
        return _of(factor * number.real, factor * number.imag)
    return _Complex(number.pairs * (factor.unsqueeze(-1) if isinstance(factor, Tensor) else factor))


def _quotient(one: Any, other: Any) -> _Complex:
    if isinstance(other, _Complex):
        real, imaginary = other.parts
        inverse = _Complex(torch.stack([real, -imaginary], -1) / other.pairs.square().sum(-1, keepdim=True))
        return _product(one, inverse)
    return _product(one, 1 / other)


def _sum(one: Any, other: Any, *, alpha: float = 1) -> _Complex:
    (a, b), (c, d) = _parts(one), _parts(other)
    return _of(a + alpha * c, b + alpha * d)


def _parts(value: Any) -> tuple[Any, Any]:
    """Real and imaginary part of complex numbers, real ones, or one number."""
    if isinstance(value, _Complex):
        return value.parts
    if isinstance(value, Tensor):
        return value, torch.zeros_like(value)
    return torch.tensor(complex(value).real), torch.tensor(complex(value).imag)


def _cast(value: Any, *rest: Any, **named: Any) -> _Complex:
    """To another complex type: the numbers stay what they are."""
    return value if isinstance(value, _Complex) else _of(*_parts(value))


def _real_type(named: dict[str, Any]) -> dict[str, Any]:
    """Arguments that make a real tensor for those that make a complex one."""
    dtype = named.get("dtype")
    if dtype is not None and dtype.is_complex:
        named = {**named, "dtype": dtype.to_real()}
    return {name: value for name, value in named.items() if name != "memory_format"}


def _zeros(*args: Any, **named: Any) -> _Complex:
    """Made by shape, or like a tensor, which stands in front of the shape."""
    like, shape = (args[0], args[1:]) if isinstance(args[0], (Tensor, _Complex)) else (None, args)
    made = _real_type(named)
    if like is None:
        return _Complex(torch.zeros([*shape[0], 2], **made))
    real = like.parts[0] if isinstance(like, _Complex) else like
    return _Complex(real.new_zeros([*(shape[0] if shape else real.shape), 2], **made))


def _exponential(z: _Complex) -> _Complex:
    size, angle = z.parts[0].exp(), z.parts[1]
    return _of(size * angle.cos(), size * angle.sin())


def _put(z: _Complex, value: Any, *rest: Any) -> _Complex:
    """Written in place: views of the pairs share their memory as those of complex numbers do."""
    real, imaginary = _parts(value)
    z.pairs[..., 0].copy_(real)
    z.pairs[..., 1].copy_(imaginary)
    return z


def _put_at(z: _Complex, indices: Any, value: Any, accumulate: bool = False) -> _Complex:
    _ATEN.index_put_(z.pairs, indices, _of(*_parts(value)).pairs, accumulate)
    return z


def _in_place(function: Callable[..., _Complex]) -> Callable[..., _Complex]:
    return lambda z, *rest, **named: _put(z, function(z, *rest, **named))


def _chosen(condition: Tensor, one: Any, other: Any) -> _Complex:
    return _of(*(torch.where(condition, *parts) for parts in zip(_parts(one), _parts(other), strict=True)))


def _gathered(z: _Complex, dimension: int, index: Tensor, **named: Any) -> _Complex:
    pairs = index.unsqueeze(-1).expand(*index.shape, 2)
    return _Complex(torch.gather(z.pairs, z.axis(dimension), pairs))


def _along(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operator whose second argument is a dimension, by default the first."""

    def applied(z: _Complex, dimension: int = 0, *rest: Any, **named: Any) -> _Complex:
        return _Complex(function(z.pairs, z.axis(named.pop("dim", dimension)), *rest, **named))

    return applied


def _split(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operator that cuts along a dimension, its third argument."""

    def applied(z: _Complex, sizes: Any, dimension: int = 0) -> list[_Complex]:
        return [_Complex(part) for part in function(z.pairs, sizes, z.axis(dimension))]

    return applied


def _joined(function: Callable[..., Any]) -> Callable[..., Any]:
    def applied(numbers: Sequence[_Complex], dimension: int = 0) -> _Complex:
        return _Complex(function([z.pairs for z in numbers], numbers[0].axis(dimension)))

    return applied


def _shaped(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operator whose second argument is a shape, or how often each dimension is repeated."""
    last = 1 if function is torch.Tensor.repeat else 2
    return lambda z, shape, **named: _Complex(function(z.pairs, [*shape, last]))


#: Parts of a graph that run in another state of torch. (The third argument of autocast is whether it is on.)
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
_REGIONS = (_AUTOCAST, torch.ops.higher_order.wrap_with_set_grad_enabled)

#: By operator, or one overload of it: what it is of pairs.
_OF_PAIRS: dict[Any, Callable[..., Any]] = {
    _ATEN.view_as_complex: _Complex,
    _ATEN.view_as_real: lambda z: z.pairs,
    _ATEN.complex: _of,
    _ATEN.polar: lambda size, angle: _of(size * angle.cos(), size * angle.sin()),
    _ATEN.real: lambda z: z.parts[0],
    _ATEN.imag: lambda z: z.parts[1],
    _ATEN.abs: lambda z: z.pairs.square().sum(-1).sqrt(),
    _ATEN.conj: lambda z: _of(z.parts[0], -z.parts[1]),
    _ATEN._conj: lambda z: _of(z.parts[0], -z.parts[1]),
    _ATEN.conj_physical: lambda z: _of(z.parts[0], -z.parts[1]),
    _ATEN.resolve_conj: lambda z: z,
    _ATEN.mul: _product,
    _ATEN.add: _sum,
    _ATEN.sub: lambda one, other: _sum(one, other, alpha=-1),
    _ATEN.div: _quotient,
    _ATEN.exp: _exponential,
    _ATEN.mul_: _in_place(_product),
    _ATEN.add_: _in_place(_sum),
    _ATEN.copy_: _put,
    _ATEN.fill_: _put,
    _ATEN.index_put_: _put_at,
    _ATEN.zeros: _zeros,
    _ATEN.empty: _zeros,
    _ATEN.zeros_like: _zeros,
    _ATEN.empty_like: _zeros,
    _ATEN.new_zeros: _zeros,
    _ATEN.new_empty: _zeros,
    _ATEN.where: _chosen,
    _ATEN.masked_fill: lambda z, mask, value: _chosen(mask, value, z),
    _ATEN.gather: _gathered,
    _ATEN.neg: lambda z: _Complex(-z.pairs),
    _ATEN.to: _cast,
    _ATEN._to_copy: _cast,
    _ATEN.clone: lambda z, **named: z,
    _ATEN.contiguous: lambda z, **named: z,
    _ATEN.detach: lambda z: z,
    _ATEN.detach_: lambda z: z,
    _ATEN.alias: lambda z: z,
    _ATEN.lift_fresh_copy: lambda z: z,
    _ATEN.unsqueeze: _along(torch.unsqueeze),
    _ATEN.squeeze.dim: _along(torch.squeeze),
    _ATEN.slice: _along(_ATEN.slice),
    _ATEN.select: _along(torch.select),
    _ATEN.narrow: _along(torch.narrow),
    _ATEN.index_select: _along(torch.index_select),
    _ATEN.index: lambda z, indices: _Complex(_ATEN.index(z.pairs, indices)),
    _ATEN.split_with_sizes: _split(torch.split),
    _ATEN.split: _split(torch.split),
    _ATEN.chunk: _split(torch.chunk),
    _ATEN.unbind: lambda z, dim=0: [_Complex(part) for part in torch.unbind(z.pairs, z.axis(dim))],
    _ATEN.cat: _joined(torch.cat),
    _ATEN.stack: _joined(torch.stack),
    _ATEN.pad_sequence: lambda numbers, *rest: _Complex(_ATEN.pad_sequence([z.pairs for z in numbers], *rest)),
    _ATEN.transpose: lambda z, one, other: _Complex(z.pairs.transpose(z.axis(one), z.axis(other))),
    _ATEN.permute: lambda z, order: _Complex(z.pairs.permute([*(d % z.rank for d in order), z.rank])),
    _ATEN.flatten: lambda z, start=0, end=-1: _Complex(z.pairs.flatten(z.axis(start), z.axis(end))),
    _ATEN.unflatten: lambda z, dim, sizes: _Complex(z.pairs.unflatten(z.axis(dim), sizes)),
    _ATEN.view: _shaped(torch.Tensor.reshape),
    _ATEN.reshape: _shaped(torch.Tensor.reshape),
    _ATEN._unsafe_view: _shaped(torch.Tensor.reshape),
    _ATEN.expand: _shaped(torch.Tensor.expand),
    _ATEN.repeat: _shaped(torch.Tensor.repeat),
    _ATEN.sym_size: lambda z, dim: z.pairs.shape[z.axis(dim)],
    operator.getitem: lambda numbers, place: numbers[place],
}


def _leaves(value: Any) -> Iterator[Any]:
    """``value``, or what is in it if it is a list."""
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _holds_complex(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.is_complex() for leaf in _leaves(value))


def _computes_complex(module: GraphModule) -> bool:
    return any(_holds_complex(node.meta.get("val")) for node in module.graph.nodes)


def _holds_pairs(value: Any) -> bool:
    return any(isinstance(leaf, _Complex) for leaf in _leaves(value))


class _InPairs(Interpreter):
    """Runs a graph with pairs in place of complex numbers."""

    def __init__(self, module: GraphModule, complex_attributes: set[str]) -> None:
        super().__init__(module)
        self._complex_attributes = complex_attributes
        self._makes = False  # whether the operator that runs gives complex numbers

    def run_node(self, n: Node) -> Any:
        self._makes = n.op == "call_function" and _holds_complex(n.meta.get("val"))
        value = super().run_node(n)
        complex_input = n.op == "placeholder" and _holds_complex(n.meta.get("val")) and isinstance(value, Tensor)
        return _Complex(value) if complex_input else value

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return _Complex(value) if target in self._complex_attributes else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        inner = next((value for value in given if isinstance(value, GraphModule)), None)
        if inner is not None and (_holds_pairs(given) or _computes_complex(inner)):
            place = args.index(inner)
            if target not in _REGIONS or (target is _AUTOCAST and args[2]):
                raise _UnknownError(str(target))
            return _InPairs(inner, set()).run(*args[place + 1 :])
        packet = getattr(target, "overloadpacket", target)
        if not self._makes and not _holds_pairs(given):
            return super().call_function(target, args, kwargs)
        if packet is _ATEN._assert_tensor_metadata:
            return None
        of_pairs = _OF_PAIRS.get(target) or _OF_PAIRS.get(packet)
        if of_pairs is None:
            raise _UnknownError(str(target))
        return of_pairs(*args, **kwargs)


class _Real(nn.Module):
    """A traced module, its parameters and buffers under the same names."""

    def __init__(self, program: GraphModule) -> None:
        super().__init__()
        complex_attributes = set()
        for node in program.graph.nodes:
            if node.op != "get_attr":
                continue
            path, _, name = str(node.target).rpartition(".")
            owner = program.get_submodule(path)
            value = getattr(owner, name)
            if str(node.target) in complex_attributes or not _holds_complex(value):
                continue
            complex_attributes.add(str(node.target))
            pairs = as_real(value.detach()).contiguous()
            delattr(owner, name)
            owner.register_buffer(name, pairs)
        for name, child in program.named_children():
            self.add_module(name, child)
        for name, parameter in program.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in program.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self._run = [_InPairs(program, complex_attributes)]  # in a list: no module of this one

    def forward(self, *tensors: Tensor) -> Any:
        return self._run[0].run(*tensors)


def in_real_numbers(program: Any, tensors: tuple[Tensor, ...], dynamic_shapes: Any) -> Any:
    """A program without complex numbers; the same one if it has none, or some that are not known here.

    Args:
        program: Of ``torch.export``.
        tensors: That it was traced with. The program that is returned takes their :func:`real_inputs`.
        dynamic_shapes: Likewise.
    """
    inside = any(
        _holds_complex(node.meta.get("val")) for node in program.graph.nodes if node.op not in ("output", "call_module")
    )
    if not inside:
        return program
    module = _Real(without_guards(program))
    try:
        return traced(module.eval(), real_inputs(tensors), dynamic_shapes)
    except Exception as error:
        if isinstance(error, _UnknownError) or isinstance(error.__cause__, _UnknownError):
            _log.info("complex numbers stay in the graph: %s", error)
            return program
        raise


def real_inputs(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Complex ones [...] as their real and imaginary parts [..., 2]; the others as they are."""
    return tuple(map(as_real, tensors))
