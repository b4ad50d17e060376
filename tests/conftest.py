"""Settings for all tests: one thread, fixed seeds, no random examples from one run to the next."""

from __future__ import annotations

import copy
import functools
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

# `support` for every test, wherever pytest is started and whichever folders are packages
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

torch.set_num_threads(1)
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Random weights and inputs are the same in every run and in every order of the tests."""
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    """What the imports left stays: the garbage collector need not look at half a million objects again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)  # what is left is little; a trace makes many small objects and keeps them


def pytest_unconfigure() -> None:
    """Extensions complain of what nobody collects."""
    gc.unfreeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Slower, and with nothing of torch in another form than users have it."""
    parser.addoption("--torch-as-it-is", action="store_true", help="leave torch's exporter as it is")


@pytest.fixture(autouse=True, scope="session")
def torchs_own(request: pytest.FixtureRequest) -> Iterator[list[tuple[Any, str, Any]]]:
    """Lets torch.onnx find out once per opset what it finds out anew in every export, though it is the same in all.

    That is, the sources of all its operators, a second each; which of them are made of others; how torch takes them
    apart; and that a rewriting cannot begin at a node of another kind. Graphs are not traced a second time to take
    them apart, and not run once more to find out where to cast.

    Returns:
        Class or module, name and torch's own form of what does its work in another way (``test_exporter.py``).
    """
    if request.config.getoption("--torch-as-it-is"):
        yield []
        return
    try:
        from onnxscript.rewriter._rewrite_rule import RewriteRule
        from support.exporter import Decomposition, promote
        from torch._export import utils
        from torch.onnx._internal.exporter import _decomp, _fx_passes
        from torch.onnx._internal.exporter._registration import ONNXRegistry
        from torch.onnx._internal.fx.passes.type_promotion import _TypePromotionInterpreter

        read = functools.cache(ONNXRegistry.from_torchlib)
        implicit = functools.cache(utils._materialize_cpp_cia_ops)
        decompositions = functools.cache(_decomp.create_onnx_friendly_decomposition_table)
        decomposition = functools.cache(lambda operators: Decomposition(operators, decompositions(operators)))
        try_rewrite = RewriteRule.try_rewrite
        decompose = _fx_passes.decompose_with_registry
        run_node = _TypePromotionInterpreter.run_node
    except (ImportError, AttributeError):  # of no version of torch known so far: exports only take longer
        yield []
        return

    def copied(opset_version: int) -> Any:
        registry = copy.copy(read(opset_version))
        registry.functions = {name: list(found) for name, found in registry.functions.items()}
        return registry

    def tried(rule: Any, model: Any, graph: Any, node: Any, **given: Any) -> Any:
        """Onnxscript prepares much, or looks at all nodes of the graph, before it looks at this one."""
        kind = rule.__dict__.get("first_kind", "unknown")
        if kind == "unknown":
            pattern = getattr(getattr(rule, "_matcher", None), "pattern", None)
            kind = rule.first_kind = pattern and pattern.output_nodes[0].op_identifier()
        if kind and kind[:2] != (node.domain, node.op_type):
            return None
        return try_rewrite(rule, model, graph, node, **given)

    def decomposed(program: Any, registry: Any) -> Any:
        made = decomposition(frozenset(_decomp.get_onnx_implemented_overloads(registry)))(program)
        return decompose(program, registry) if made is None else made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fx_passes, "decompose_with_registry", decomposed)
        patch.setattr(_TypePromotionInterpreter, "run_node", promote)
        patch.setattr(RewriteRule, "try_rewrite", tried)
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(copied))
        patch.setattr(utils, "_materialize_cpp_cia_ops", implicit)
        # nobody reads which line each node comes from
        patch.setattr(torch.fx.config, "do_not_emit_stack_traces", True, raising=False)
        # the exporter takes entries out of the table that it gets
        patch.setattr(
            _decomp, "create_onnx_friendly_decomposition_table", lambda ops: dict(decompositions(frozenset(ops)))
        )
        yield [
            (_fx_passes, "decompose_with_registry", decompose),
            (_TypePromotionInterpreter, "run_node", run_node),
            (RewriteRule, "try_rewrite", try_rewrite),
        ]


@pytest.fixture(autouse=True, scope="module")
def plain_diffusers() -> Iterator[None]:
    """ModelOpt patches diffusers to save and load its state; taken back, so that other tests see diffusers as it is."""
    from diffusers import ModelMixin

    names = ("from_pretrained", "save_pretrained")
    before = {name: ModelMixin.__dict__[name] for name in names}
    yield
    if "_modelopt_cache" not in ModelMixin.__dict__:
        return
    from modelopt.torch.opt.plugins import huggingface

    for name, method in before.items():
        setattr(ModelMixin, name, method)
    del ModelMixin._modelopt_cache
    huggingface._PATCHED_CLASSES.discard(ModelMixin)


@pytest.fixture(scope="module")
def diffusers_checkpoints(plain_diffusers: None) -> None:
    """Models are saved and loaded with ModelOpt's state."""
    import modelopt.torch.opt as mto

    mto.enable_huggingface_checkpointing()
