"""What a model reads of masks and constants while it is traced: the right values, and which inputs they are of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import noise
from torch import Tensor, nn

from modelopt_tdq.export.known_values import KnownValues

MASK = torch.tensor([[True, True, True, False, False], [True, True, False, False, False]])


def _lengths_as_positions(x: Tensor, mask: Tensor) -> Tensor:
    lengths = mask.sum(1).tolist()
    positions = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        positions[row, :length] = torch.arange(length)
    return x[:, : max(lengths)] + torch.arange(40.0).reshape(10, 4)[positions]


def _written_up_to_a_tensor(x: Tensor, mask: Tensor) -> Tensor:
    seen, lengths = torch.zeros(2, 5, dtype=torch.bool), mask.sum(1, dtype=torch.int)
    for row in range(2):
        seen[row, : lengths[row]] = True
    return x.masked_fill(~seen.unsqueeze(-1), 0)


def _each_sample_by_itself(x: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([torch.cat([row[seen], row[~seen]]) for row, seen in zip(x, mask)])  # noqa: B905


def _written_by_truth_values(x: Tensor, mask: Tensor) -> Tensor:
    made = x.new_zeros(2, 5, 4)
    made[mask] = x[mask] * 2
    return made


def _through_views(x: Tensor, mask: Tensor) -> Tensor:
    copy = mask.clone()
    copy[0][1:] = False
    return x[copy]


#: From x [2, 5, 4] and a mask [2, 5] that is read.
READ: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "item": lambda x, m: x[:, : m.sum(1).max().item()],
    "int": lambda x, m: x[:, : int(m.sum(1).max())],
    "tolist": _lengths_as_positions,
    "numpy": lambda x, m: x * torch.from_numpy(m.sum(1).numpy() * 2)[:, None, None],
    "a slice": lambda x, m: x[:, : m.sum(1).max()],
    "written up to a tensor": _written_up_to_a_tensor,
    "written by truth values": _written_by_truth_values,
    "truth values": lambda x, m: x[m],
    "truth values of others": lambda x, m: x[:, m.any(0)],
    "each sample by itself": _each_sample_by_itself,
    "through views": _through_views,
    "nonzero": lambda x, m: x[:, m[0].nonzero()[:, 0]],
    "masked_select": lambda x, m: torch.masked_select(x, m.unsqueeze(-1)),
    "repeat_interleave": lambda x, m: x.repeat_interleave(m.sum(1), 0) + x.repeat_interleave(m.sum(), dim=0)[:1],
    "repeat_interleave of all": lambda x, m: x.repeat_interleave(m[:, :2].long().sum() // 2),
    "new_zeros": lambda x, m: torch.cat([x, x.new_zeros(2, m.sum(1).max(), 4)], 1),
    "a range": lambda x, m: x[:, : len(torch.arange(m[0].sum()))],
    "unique": lambda x, m: x[:, : len(m.long().unique())],
    "like another": lambda x, m: x[m.to(x).bool() & torch.ones_like(x[..., 0]).bool()],
}

#: Likewise, but nothing of the mask is read: it stays an input like any other.
NOT_READ: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "filled": lambda x, m: x.masked_fill(m.unsqueeze(-1), 0),
    "table": lambda x, m: x + torch.arange(8.0).reshape(2, 4)[m.long()],
    "its size": lambda x, m: x * m.shape[1] + m.dim() + m.numel(),
    "constants": lambda x, m: x[:, torch.tensor([True, False, True, True, False])] * torch.full((2,), 3).tolist()[1],
    "a rotary table": lambda x, m: x * torch.from_numpy(torch.arange(4).numpy() ** 0.5).float(),
}


class _Traced(nn.Module):
    def __init__(self, function: Callable[..., Tensor], known: KnownValues) -> None:
        super().__init__()
        self.function, self.known, self.mix = function, known, nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        with self.known.of({"x": x, "mask": mask}):
            result = self.function(self.mix(x), mask)
        return result, *self.known.guards

    def plain(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.function(self.mix(x), mask)


def _trace(function: Callable[..., Tensor], inputs: dict[str, Tensor], open_inputs: Any = ()) -> tuple[Any, _Traced]:
    torch.manual_seed(0)
    module = _Traced(function, KnownValues(inputs, open_inputs)).eval()
    with torch.no_grad():
        return torch.export.export(module, (noise(2, 5, 4), MASK), strict=False), module


@pytest.mark.parametrize("name", [*READ, *NOT_READ])
def test_the_same_values(name: str) -> None:
    program, module = _trace((READ | NOT_READ)[name], {"mask": MASK})
    assert module.known.decided == ({"mask"} if name in READ else set())
    assert not module.known.unknown
    other = noise(2, 5, 4, seed=1)
    with torch.no_grad():
        found, *guards = program.module()(other, MASK)
        assert not guards
        assert torch.equal(found, module.plain(other, MASK))
        if name in NOT_READ:
            assert torch.equal(program.module()(other, ~MASK)[0], module.plain(other, ~MASK))


def test_what_is_written_from_elsewhere_is_not_known_any_more() -> None:
    def function(x: Tensor, mask: Tensor) -> Tensor:
        copy = mask.clone()
        row = copy[0]
        row.copy_(x[0, :, 0] > 0)
        return x * 2 if copy.sum().item() > 3 else x

    known = KnownValues({"mask": MASK})
    module = _Traced(function, known).eval()
    with torch.no_grad(), pytest.raises(Exception, match="data-dependent"):
        torch.export.export(module, (noise(2, 5, 4), MASK), strict=False)
    assert not known.decided
    (line,) = known.unknown
    assert line.startswith("test_known_values.py:")
    assert "copy.sum().item()" in line


@pytest.mark.parametrize("make", [lambda: torch.rand(3), lambda: torch.zeros(3).uniform_()])
def test_random_numbers_are_not_known(make: Callable[[], Tensor]) -> None:
    with pytest.raises(Exception, match="data-dependent"):
        _trace(lambda x, mask: x if make().sum().item() > 1 else -x, {"mask": MASK})


@pytest.mark.parametrize(
    "function",
    [
        lambda x, mask: x * 2 if mask.any(0)[1] else x * 3,
        lambda x, mask: x * 2 if (mask[:, 1] == 1).all() else x * 3,
    ],
)
def test_one_truth_value_is_guarded(function: Callable[..., Tensor]) -> None:
    program, module = _trace(function, {"mask": MASK})
    assert not module.known.decided
    (line,) = module.known.guarded
    assert "mask" in line
    assert module.known.guarded[line] == {"mask"}
    hidden = MASK & torch.tensor([True, False, True, True, True])
    for mask, same in ((MASK, True), (MASK | True, True), (hidden, False)):
        found, guard = program.module()(noise(2, 5, 4), mask)
        assert bool(guard) is same
        if same:
            assert torch.equal(found, module.plain(noise(2, 5, 4), mask))


def test_inputs_that_stay_open_are_guarded() -> None:
    known = KnownValues({"x": noise(2, 5, 4), "mask": MASK}, {"x"})

    class Zeros(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
            with known.of({"x": x, "mask": mask}):
                kept = x[: (x != 0).flatten(1).any(1).sum()] if (x == 0).all() else x[mask]
            return kept, *known.guards

    program = torch.export.export(Zeros(), (noise(2, 5, 4), MASK), strict=False)
    assert known.decided == {"mask"}
    assert list(known.guarded.values()) == [{"x"}]
    assert [bool(guard) for guard in program.module()(noise(2, 5, 4, seed=1), MASK)[1:]] == [True]
    assert [bool(guard) for guard in program.module()(torch.zeros(2, 5, 4), MASK)[1:]] == [False]


def test_fractions_of_inputs_that_stay_open_are_not_read() -> None:
    known = KnownValues({"x": noise(2, 5, 4), "mask": MASK}, {"x"})

    class Fraction(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            with known.of({"x": x, "mask": mask}):
                return x if x.max().item() > 1 else -x

    with pytest.raises(Exception, match="data-dependent"):
        torch.export.export(Fraction(), (noise(2, 5, 4), MASK), strict=False)
    assert not known.guards
    assert known.unknown
