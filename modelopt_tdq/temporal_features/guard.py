"""Calls of another kind than those that the temporal features were proven for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._guards import detect_fake_mode

from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.call import named_arguments
from modelopt_tdq.temporal_features.block import TemporalBlock, find_temporal_block, named
from modelopt_tdq.temporal_features.looked_up import LookedUp, Superseded
from modelopt_tdq.temporal_features.module import FEATURES, TemporalFeatures
from modelopt_tdq.temporal_features.proof import Proof, call_facts, with_defaults

__all__ = ["guard_calls", "require_proven", "unguard_calls"]


def require_proven(model: nn.Module, arguments: Mapping[str, Any]) -> None:
    """See that what is looked up depends on the time alone in a call like this, too.

    Calls with the same facts (:func:`~modelopt_tdq.temporal_features.proof.call_facts`) as one that was looked at are
    let through at once. Another one is searched, without data where that is possible.

    Args:
        model: With temporal features, or without: then nothing is done.
        arguments: Of the call, by name.

    Raises:
        TdqError: In this call a layer that is looked up depends on something else, is computed in another way, or gives
            what the rest of the model uses and the table does not hold. Or its parameters were dropped, so that nobody
            can tell. Names what is different about the call.
    """
    features = model._modules.get(FEATURES)
    if not isinstance(features, TemporalFeatures) or "proof" not in features.description["metadata"]:
        return
    proof = Proof.from_json(features.description["metadata"]["proof"])
    timestep = str(features.description["timestep_argument"])
    given = {name: value for name, value in with_defaults(model, arguments, timestep).items() if value is not None}
    if timestep not in given:
        return  # the model cannot run; whoever delivers the time says so
    if any(not known.differences(call_facts(given, timestep, known.tried)) for known in (proof, *features.proofs)):
        return
    facts = call_facts(given, timestep, proof.tried)
    names = proof.differences(facts)
    if features.description["freed"]:
        raise _refusal(
            proof, facts, names, "nobody can tell whether it holds: the layers that it replaces were dropped"
        )
    with _layers_of_its_own(model), torch.inference_mode(False):
        try:
            block = find_temporal_block(model, proof.with_such_a_time(given, timestep), timestep, None)
        except TdqError as error:
            raise _refusal(proof, facts, names, f"in this call {error.problem}") from error
    problem = _problem(block, proof, features)
    if problem:
        raise _refusal(proof, facts, names, problem)
    features.proofs.append(block.proof)


def _problem(block: TemporalBlock, proof: Proof, features: TemporalFeatures) -> str | None:
    """Why the table is not right for a call with this block; None if it is."""
    superseded = features.description["superseded"]
    for name in [*proof.programs, *superseded]:
        if name in block.depends:
            return f"in this call the output of `{name}` depends on {named(block.depends[name])} as well as on the time"
        if name in block.kept or (name in superseded and name in block.features):
            return f"this call needs the output of `{name}`, which the table does not hold"
    for name, program in proof.programs.items():
        if block.proof.programs.get(name, program) != program:
            return f"in this call the output of `{name}` is computed in another way"
    return None


def _refusal(proof: Proof, facts: Mapping[str, str], names: list[str], problem: str) -> TdqError:
    first = names[0]
    was, now = (f"`{first}` = {each[first]}" if first in each else f"no `{first}`" for each in (proof.facts, facts))
    return TdqError(
        first,
        facts.get(first),
        f"the table of temporal features was made from calls with {was}; this one has {now}, and {problem}",
        "Call the model as in the calibration, calibrate it with such calls, or leave the layer out with `features`",
    )


@contextmanager
def _layers_of_its_own(model: nn.Module) -> Iterator[None]:
    """Without features, and without the hooks of others on the root, which are in the middle of another call."""
    kinds = {module: type(module) for module in model.modules() if isinstance(module, (LookedUp, Superseded))}
    names = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs")
    hooks = {name: vars(model)[name] for name in names}
    for name in names:
        setattr(model, name, OrderedDict())
    for module, kind in kinds.items():
        module.__class__ = kind.__bases__[1]
    try:
        yield
    finally:
        for module, kind in kinds.items():
            module.__class__ = kind
        for name, value in hooks.items():
            setattr(model, name, value)


class _Guard:
    """The pre-hook: a class rather than a closure, so that models stay picklable."""

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or detect_fake_mode() is not None:
            return  # a search cannot be followed by a compiler, nor run in another one
        require_proven(model, named_arguments(model, args, kwargs))


def guard_calls(model: nn.Module) -> None:
    """Look at every call of ``model``; nothing is looked at while it is compiled or exported."""
    unguard_calls(model)
    model.register_forward_pre_hook(_Guard(), with_kwargs=True)


def unguard_calls(model: nn.Module) -> None:
    """Undo :func:`guard_calls`; harmless where nothing was done."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, _Guard):
            model._forward_pre_hooks.pop(key)
            model._forward_pre_hooks_with_kwargs.pop(key, None)
