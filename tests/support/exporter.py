"""What torch.onnx does in every export though it changes nothing: left out here, since it takes a third of the time.

``pytest --torch-as-it-is`` leaves nothing out.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export._trace import _ignore_backend_decomps
from torch.export.exported_program import (
    _override_composite_implicit_decomp,
    _split_decomp_table_to_cia_and_python_decomp,
)
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.onnx._internal.fx.passes.type_promotion import get_type_promotion_rule
from torch.utils._pytree import tree_leaves, tree_map_only

_ATEN = torch.ops.aten
#: Of the second one torch.onnx reads the type only, too.
_CASTS = (_ATEN.to.dtype, _ATEN.to.dtype_layout)
_CHECK = _ATEN._assert_tensor_metadata.default


class _AsAWhole(Exception):  # noqa: N818
    """A graph with a node that cannot be taken apart by itself."""


def _changes_inputs(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _inputs(node: Node) -> list[FakeTensor]:
    """What the node is applied to; nothing if it cannot be traced by itself."""
    values = [source.meta.get("val") for source in node.all_input_nodes]
    operators = node.op == "call_function" and hasattr(node.target, "_schema") and not _changes_inputs(node)
    return values if operators and all(isinstance(value, FakeTensor) for value in values) else []


def _is_composite(target: Any) -> bool:
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return isinstance(target, torch._ops.OpOverload) and target.has_kernel_for_dispatch_key(key)


def _is_fixed(values: Sequence[Tensor]) -> bool:
    return all(isinstance(size, int) for value in values for size in (*value.shape, *value.stride()))


def _key(node: Node) -> str:
    """The same for nodes that are taken apart in the same way."""
    sources = node.all_input_nodes

    def described(source: Node) -> Any:
        value = source.meta["val"]
        return sources.index(source), value.dtype, value.device, tuple(value.shape), value.stride()

    return repr((str(node.target), *(map_arg(part, described) for part in (node.args, node.kwargs))))


def _of(mode: FakeTensorMode, value: Tensor) -> Tensor:
    """The same in another graph."""
    if not _is_fixed([value]):
        return value
    with mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _pass_on(program: Any, old: Node, new: Node) -> None:
    """A node in the place of another."""
    old.replace_all_uses_with(new)
    program.graph_signature.replace_all_uses(old.name, new.name)
    old.graph.erase_node(old)


def _replace(program: Any, node: Node, parts: GraphModule) -> None:
    """The parts of a node in its place."""
    mode, inputs, made = _inputs(node)[0].fake_mode, iter(node.all_input_nodes), {}
    for part in parts.graph.nodes:
        if part.op == "placeholder":
            made[part] = next(inputs)
        elif part.op == "call_function":
            with node.graph.inserting_before(node):
                made[part] = node.graph.node_copy(part, made.__getitem__)
            made[part].meta = {**node.meta, "val": tree_map_only(Tensor, lambda v: _of(mode, v), part.meta["val"])}
    result = parts.graph.output_node().args[0]
    if isinstance(result, Node):
        _pass_on(program, node, made[result])
        return
    for user in list(node.users):
        _pass_on(program, user, made[result[user.args[1]]])  # type: ignore[index]
    node.graph.erase_node(node)


def _cast(program: Any, node: Node) -> None:
    """Casts to the same type are none; others are made, rather than perhaps made."""
    source, dtype = node.all_input_nodes[0], node.meta["val"].dtype
    if source.meta["val"].dtype == dtype:
        _pass_on(program, node, source)
        return
    with node.graph.inserting_before(node):
        made = node.graph.call_function(_ATEN._to_copy.default, (source,), {"dtype": dtype})
    made.meta = dict(node.meta)
    _pass_on(program, node, made)


class Decomposition:
    """Takes programs apart as torch does, but traces only the operators that are made of others, each by itself.

    Args:
        registered: The operators that ONNX has.
        table: Those that are made of others, and how.
    """

    def __init__(self, registered: frozenset[Any], table: Mapping[Any, Any]) -> None:
        self._registered = registered
        self._table = table
        self._composite, self._others = _split_decomp_table_to_cia_and_python_decomp(dict(table))
        self._known: dict[str, GraphModule | None] = {}

    def __call__(self, program: Any) -> Any:
        """The program, taken apart; None if all of it has to be traced for that.

        Args:
            program: Of ``torch.export``.
        """
        signature = program.graph_signature
        changes = signature.buffers_to_mutate or getattr(signature, "user_inputs_to_mutate", None)
        modules = [module for module in program.graph_module.modules() if isinstance(module, GraphModule)]
        if changes or len(modules) > 1 or program.graph_module is not modules[0]:
            return None
        nodes = list(program.graph_module.graph.nodes)
        try:
            parts = self._parts([node for node in nodes if not self._stays(node)])
        except _AsAWhole:
            return None
        for node in nodes:
            if node in parts:
                _replace(program, node, parts[node])
            elif node.target is _CHECK:
                node.graph.erase_node(node)
            elif node.target in _CASTS:
                _cast(program, node)
        program.graph_module.recompile()
        return program

    def _stays(self, node: Node) -> bool:
        """Whether this node is left as it is; or is a cast or a check, which are simple."""
        if node.op in ("placeholder", "output"):
            return True
        if node.op != "call_function" or _changes_inputs(node):
            return False
        if node.target in _CASTS:
            source, made = node.all_input_nodes[0].meta["val"], node.meta["val"]
            return not node.kwargs.get("copy") and (source.device, source.layout) == (made.device, made.layout)
        if node.target in (_CHECK, operator.getitem):
            return True
        return self._is_known(node) and (node.target in self._composite or not _is_composite(node.target))

    def _is_known(self, node: Node) -> bool:
        """Whether ONNX has the operator."""
        return node.target in self._registered and node.target not in self._table and not _changes_inputs(node)

    def _parts(self, nodes: Sequence[Node]) -> dict[Node, GraphModule]:
        """The graph of each of these, taken apart; without those of ONNX for which sizes would have to be worked out.

        Raises:
            _AsAWhole: There is none for an operator that ONNX does not have.
        """
        inputs = {node: values for node in nodes if (values := _inputs(node))}
        keys = {node: _key(node) for node, values in inputs.items() if _is_fixed(values)}
        found = {node: self._known[key] for node, key in keys.items() if key in self._known}
        left = [node for node in inputs if node not in found]
        if left:
            with (
                torch.no_grad(),
                enable_python_dispatcher(),
                _ignore_backend_decomps(),
                inputs[left[0]][0].fake_mode,
                _override_composite_implicit_decomp(self._composite),
            ):
                traced: dict[str, GraphModule | None] = {}
                for node in left:
                    key = keys.get(node, node.name)
                    if key not in traced:
                        traced[key] = self._traced(node, inputs[node])
                    found[node] = traced[key]
            self._known.update((key, traced[key]) for key in keys.values() if key in traced)
        if any(found.get(node) is None and not self._is_known(node) for node in nodes):
            raise _AsAWhole
        return {node: made for node, made in found.items() if made is not None}

    def _traced(self, node: Node, inputs: Sequence[Tensor]) -> GraphModule | None:
        sources = node.all_input_nodes

        def run(*tensors: Tensor) -> Any:
            given = dict(zip(sources, tensors, strict=True))
            args, kwargs = map_arg((node.args, node.kwargs), given.__getitem__)
            return node.target(*args, **kwargs)  # type: ignore[operator]

        made = make_fx(run, decomposition_table=self._others)(*inputs)
        for part in made.graph.find_nodes(op="call_function", target=_CHECK):
            made.graph.erase_node(part)
        made.graph.eliminate_dead_code()
        for part in made.graph.nodes:
            if part.op in ("placeholder", "output"):
                continue
            # a size that is worked out here may be known elsewhere in the graph already
            tensors = all(isinstance(value, Tensor) for value in tree_leaves(part.meta.get("val")))
            known = part.target is operator.getitem or self._is_known(part)
            if part.op != "call_function" or not known or not tensors:
                return None
        results = made.graph.output_node().args[0]
        apart = all(user.target is operator.getitem for user in node.users)
        return made if isinstance(results, Node) or apart else None


def promote(interpreter: Any, node: Node) -> Any:
    """As torch inserts casts for a node, but what it gives is known already."""
    if node.op != "call_function" or "val" not in node.meta:
        return Interpreter.run_node(interpreter, node)
    with interpreter._set_current_node(node):
        rule = get_type_promotion_rule(node, interpreter.type_promotion_table)
        if rule is not None:
            interpreter._maybe_promote_node(node, rule)
    return node.meta["val"]
