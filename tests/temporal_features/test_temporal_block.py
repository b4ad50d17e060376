"""Which layers depend on the time alone: proven by changing every other input, on models of every family."""

from __future__ import annotations

import pytest
import torch
from support.slow import slow_but
from temporal_models import CASES, Case, others, with_changed
from torch import Tensor, nn

from modelopt_tdq import find_temporal_block
from modelopt_tdq.temporal_features.block import TemporalBlock

#: One of each kind: heads, classes beside the time, shared and single modulations, a condition of sizes.
QUICK = ("unet", "unet with classes", "dit", "pixart with sizes", "sd3", "cogvideox", "wan")

Outputs = dict[str, list[Tensor]]

PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
TIMES = (600.0, 20.0, 901.0)


@torch.no_grad()
def outputs(model: nn.Module, arguments: dict[str, object]) -> Outputs:
    """What every module without children gives, call by call."""
    found: Outputs = {}

    def keep(name: str) -> None:
        def hook(module: nn.Module, args: object, output: object) -> None:
            if isinstance(output, Tensor):
                found.setdefault(name, []).append(output.clone())

        handles.append(model.get_submodule(name).register_forward_hook(hook))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for name, module in model.named_modules():
        if name and not any(True for _ in module.children()):
            keep(name)
    model(**arguments)
    for handle in handles:
        handle.remove()
    return found


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.fixture(scope="module", params=slow_but(CASES, *QUICK))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[str(request.param)]


@pytest.fixture(scope="module")
def model(case: Case) -> nn.Module:
    return case.model()


@pytest.fixture(scope="module")
def block(case: Case, model: nn.Module) -> TemporalBlock:
    return find_temporal_block(model, case.arguments, times=2)


@pytest.fixture(scope="module")
def as_given(case: Case, model: nn.Module) -> Outputs:
    return outputs(model, case.arguments)


def test_its_layers_change_with_the_time_and_with_nothing_else_and_none_is_missing(
    case: Case, model: nn.Module, block: TemporalBlock, as_given: Outputs
) -> None:
    changed = outputs(model, with_changed(case.arguments, set(others(case.arguments))))
    later = outputs(model, case.at(20.0))
    for name in block.layers:
        assert equal(as_given[name], changed[name]), name
        assert not equal(as_given[name], later[name]), name
    products = {name for name in as_given if isinstance(model.get_submodule(name), PRODUCTS)}
    temporal = {n for n in products if equal(as_given[n], changed[n]) and not equal(as_given[n], later[n])}
    assert temporal == products & set(block.layers)


def test_its_features_are_those_of_the_family(case: Case, block: TemporalBlock) -> None:
    assert len(block.features) == case.number
    assert all(name.endswith(case.features) for name in block.features)
    assert all(any(name.endswith(end) for name in block.features) for end in case.features)
    assert block.superseded().keys() == set(block.layers) - set(block.features)


def test_the_other_layers_depend_on_what_it_says_and_on_nothing_else(
    case: Case, model: nn.Module, block: TemporalBlock, as_given: Outputs
) -> None:
    seen = {name: outputs(model, with_changed(case.arguments, {name})) for name in others(case.arguments)}
    later = outputs(model, case.at(20.0))
    for layer, named in block.depends.items():
        moved = {name for name, found in seen.items() if not equal(as_given[layer], found[layer])}
        assert moved == set(named), layer
    through_time = {name for name in as_given if not equal(as_given[name], later[name])}
    weighted = {name for name in as_given if any(True for _ in model.get_submodule(name).parameters())}
    assert through_time & weighted == set(block.layers) | set(block.depends)


def test_computes_what_the_model_computes_at_each_time(case: Case, model: nn.Module, block: TemporalBlock) -> None:
    with torch.no_grad():
        computed = block.compute(model, torch.tensor(TIMES))
    for index, time in enumerate(TIMES):
        seen = outputs(model, case.at(time))
        for name, values in computed.items():
            assert tuple(values.shape[1:]) == block.features[name]
            expected = seen[name][0].float()
            error = (values[index] - expected).norm() / expected.norm()
            assert float(error) < 1e-5 * len(expected) ** 0.5, (name, time)
