"""Ways in which another call may differ: other values of everything that is no tensor, other sizes in any layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from support.models import FAMILIES, noise
from temporal_models import CASES
from torch import Tensor, nn

from modelopt_tdq.temporal_features.variation import (
    batch_changes,
    named_leaves,
    number_changes,
    other_values,
    size_changes,
    with_changes,
)


@dataclass(frozen=True)
class Settings:
    scale: float
    name: str
    tensor: Tensor


class Model(nn.Module):
    def forward(self, sample: Tensor, timestep: Tensor, mode: Literal["a", "b", "c"] = "a", **others: Any) -> Tensor:
        return sample


@given(st.one_of(st.booleans(), st.integers(-9, 9), st.floats(-9, 9), st.text(max_size=3)))
def test_other_values_are_others_of_the_same_kind(value: Any) -> None:
    tries = other_values(value)
    assert tries
    assert all(type(other) is type(value) and other != value for other in tries)
    assert len(set(tries)) == len(tries)
    if not isinstance(value, (bool, str)) and value:
        assert 0 in tries[:2]


def test_what_has_no_other_value() -> None:
    assert other_values(None) == []
    assert other_values(torch.float32) == []
    assert other_values("a", Literal["a", "b"] | None) == ["b"]


def test_every_number_is_a_question_and_a_list_of_them_is_one() -> None:
    arguments = {
        "sample": noise(2, 4),
        "timestep": 3.0,
        "mode": "a",
        "scale": 0.5,
        "shapes": [(1, 4, 8), (1, 4, 8)],
        "options": {"flag": True, "inner": {"count": 3}},
        "settings": Settings(2.0, "x", noise(1)),
        "nothing": None,
    }
    questions = {question.ways[0].labels[0]: question for question in number_changes(Model(), arguments, "timestep")}
    wanted = {"mode", "scale", "shapes", "options.flag", "options.inner.count", "settings.scale", "settings.name"}
    assert questions.keys() == wanted
    assert {name for name, question in questions.items() if question.tied} == {"shapes", "options.inner.count"}
    assert {n for n, q in questions.items() if not q.ways[0].conclusive} == {"mode", "settings.name"}
    assert len(questions["mode"].ways) == 2
    first = with_changes(arguments, [question.ways[0] for question in questions.values()])
    assert (first["mode"], first["scale"], first["shapes"]) == ("b", 3.0, [(2, 8, 16), (2, 8, 16)])
    assert first["options"] == {"flag": False, "inner": {"count": 6}}
    assert first["settings"].scale == 7.5
    assert first["settings"].tensor is arguments["settings"].tensor  # type: ignore[attr-defined]
    assert arguments["settings"].scale == 2.0  # type: ignore[attr-defined]
    assert (first["timestep"], first["nothing"]) == (3.0, None)
    assert first["sample"] is arguments["sample"]
    assert dict(named_leaves(arguments))["options.inner.count"] == 3


def shapes(arguments: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in named_leaves(arguments) if isinstance(leaf, Tensor)}


FREE = {
    "stable diffusion": {"sample": (2, 3), "encoder_hidden_states": (1,)},
    "flux": {"hidden_states": (1,), "encoder_hidden_states": (1,), "img_ids": (0,), "txt_ids": (0,)},
    "wan": {"hidden_states": (2, 3, 4), "encoder_hidden_states": (1,)},
    "sdxl": {"sample": (2, 3), "encoder_hidden_states": (1,)},
    "unet with classes": {"sample": (2, 3)},
}


@pytest.mark.parametrize("name", FREE)
def test_sizes_of_images_videos_and_texts_are_doubled_and_halved_and_nothing_else(name: str) -> None:
    arguments = CASES[name].arguments
    layouts, axes, _ = size_changes(arguments, "timestep", smaller_first=False)
    before, after = shapes(arguments), shapes(with_changes(arguments, layouts[:1]))
    changed = {n: tuple(a for a, (b, c) in enumerate(zip(before[n], after[n], strict=True)) if b != c) for n in before}
    assert {n: own for n, own in changed.items() if own} == FREE[name]
    assert all(after[n][axis] == 2 * before[n][axis] for n, own in FREE[name].items() for axis in own)
    alone = {aspect for question in axes for aspect in question.ways[0].aspects}
    assert alone >= {f"{n}.shape[{axis}]" for n, own in FREE[name].items() for axis in own}
    smaller, _, _ = size_changes(CASES["unet"].arguments, "timestep", smaller_first=True)
    assert shapes(with_changes(CASES["unet"].arguments, smaller[:1]))["sample"][2:] == (4, 4)


def test_frames_may_come_before_channels_and_lengths_go_together() -> None:
    arguments = FAMILIES["cogvideox"].data()[0]
    layouts, _, groups = size_changes(arguments, "timestep", smaller_first=False)
    assert any(
        set(change.replaced) == {"hidden_states"} and "hidden_states.shape[1]" in change.aspects for change in layouts
    )
    mask = {"sample": noise(2, 6, 4), "text": noise(2, 7, 4), "mask": torch.ones(2, 7).bool(), "timestep": noise(2)}
    _, _, groups = size_changes(mask, "timestep", smaller_first=False)
    assert [question.ways[0].aspects for question in groups] == [("text.shape[1]", "mask.shape[1]")]


@pytest.mark.parametrize(
    ("time", "wanted"), [(torch.tensor(3.0), [()]), (torch.ones(1), [(2,), (1,)]), (torch.ones(2), [(3,)])]
)
def test_a_sample_more_has_a_time_where_times_are_per_sample(time: Tensor, wanted: list[tuple[int, ...]]) -> None:
    batch = 1 if time.numel() == 1 and time.dim() else 2
    arguments = {"sample": noise(batch, 3, 8, 8), "ids": noise(5, 3), "timestep": time}
    changes = batch_changes(arguments, "timestep")
    found = [shapes(with_changes(arguments, [change])) for change in changes]
    assert [each["timestep"] for each in found] == wanted
    assert all(each["sample"] == (batch + 1, 3, 8, 8) and each["ids"] == (5, 3) for each in found)
    assert batch_changes({"timestep": time}, "timestep") == []
