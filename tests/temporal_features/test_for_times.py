"""The tape that computes all times in one run: what a search would find, or not used."""

from __future__ import annotations

import pytest
import torch
from support.models import noise
from temporal_models import CASES
from torch import Tensor, nn

from modelopt_tdq import find_temporal_block
from modelopt_tdq.temporal_features.block import for_times


class OtherForMany(nn.Module):
    """Takes a time per sample, and computes something else then."""

    def __init__(self, factor: float, fails: bool = False) -> None:
        super().__init__()
        self.factor, self.fails = factor, fails
        self.head, self.out = nn.Linear(1, 4), nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        many = timestep.numel() > 1
        if many and self.fails:
            raise ValueError("one time")
        time = timestep.reshape(-1, 1) * (self.factor if many else 1.0) / 1000
        return self.out(sample + self.head(time))


def test_several_times_in_one_run_without_another_search() -> None:
    times, call = torch.tensor([0.0, 20.0, 600.0]), {"sample": noise(2, 4), "timestep": torch.tensor(600.0)}
    for factor, fails, used in ((1.0, False, True), (2.0, False, False), (1.0, True, False)):
        model = OtherForMany(factor, fails).eval()
        block = find_temporal_block(model, call, times=None)
        made = for_times(block, model, call, times)
        assert (made.tape.times == 3) == used
        assert (made is block) != used
        assert made.layers == block.layers == ("head",)
        with torch.no_grad():
            expected = model.head(times.reshape(-1, 1) / 1000)
            torch.testing.assert_close(made.compute(model, times)["head"], expected)


@pytest.mark.parametrize("name", ["dit", "cogvideox"])
def test_it_is_the_block_that_a_search_with_several_times_finds(name: str) -> None:
    case, times = CASES[name], torch.tensor([20.0, 600.0, 901.0])
    model = case.model()
    made = for_times(find_temporal_block(model, case.arguments, times=None), model, case.arguments, times)
    found = find_temporal_block(model, case.arguments, times=3)
    for field in ("layers", "features", "shapes", "weights", "costs", "kept", "parameters", "multiply_adds"):
        assert getattr(made, field) == getattr(found, field), field
    assert made.superseded() == found.superseded()
    with torch.no_grad():
        one, other = made.compute(model, times), found.compute(model, times)
    assert all(torch.equal(one[name], other[name]) for name in found.features)
