"""Which calls are kept, and that they run again as they were."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from support.models import FAMILIES, TIMES, TinyDenoiser, noise
from torch import Tensor, nn

from modelopt_tdq import TdqError
from modelopt_tdq.model.call import first_output
from modelopt_tdq.model.replay import Replay
from modelopt_tdq.model.timestep import deliver_timestep

Call = dict[str, Any]


class Recorder(nn.Module):
    """Takes what a diffusion model takes; returns a function of all of it."""

    def forward(
        self,
        sample: Tensor,
        timestep: Any,
        text: Tensor | None = None,
        extra: dict[str, Tensor] | None = None,
        ids: Tensor | None = None,
        flag: bool = True,
    ) -> Tensor:
        time = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1, 1)
        out = sample.flatten(1).sum(1, keepdim=True) + time
        if text is not None:
            out = out + text.flatten(1).sum(1, keepdim=True)
        if extra is not None:
            out = out + extra["scale"]
        return out + (0 if ids is None else ids.sum())


def _recorded(calls: Iterable[Call], samples: int = 3, model: nn.Module | None = None) -> Replay:
    model = Recorder() if model is None else model
    replay = Replay(model, deliver_timestep(model, "timestep"), samples)
    with replay.recording(model):
        for call in calls:
            model(**call)
    return replay


def _kept(replay: Replay, times: Iterable[float] = TIMES) -> dict[int, dict[str, Any]]:
    return {batch.row: batch.call for batch in replay.batches(sorted(times))}


def _guided(latents: Tensor, time: float) -> Call:
    """A batch for classifier-free guidance: every latent twice, with two texts."""
    text = torch.cat([torch.zeros(len(latents), 4), latents[:, 0, 0, :4]])
    return {"sample": torch.cat([latents, latents]), "timestep": torch.tensor(time), "text": text}


def _data(samples: int = 8) -> dict[float, Tensor]:
    return {time: noise(samples, 3, 8, 8, seed=int(time)) for time in TIMES}


def _split(data: dict[float, Tensor], batch: int, order: list[int]) -> list[Call]:
    return [_guided(part, time) for time, x in data.items() for part in x[order].split(batch)]


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_same_samples_whatever_the_batch_size_and_the_order(batch: int) -> None:
    expected = _kept(_recorded(_split(_data(), 4, list(range(8)))))
    found = _kept(_recorded(_split(_data(), batch, [5, 1, 7, 0, 3, 2, 6, 4])))
    assert found.keys() == expected.keys() == set(range(len(TIMES)))
    for row, call in expected.items():
        assert call["sample"].shape[0] == 3
        assert torch.equal(found[row]["sample"], call["sample"])
        assert torch.equal(found[row]["text"], call["text"])


def test_the_same_samples_when_they_differ_by_a_rounding_error() -> None:
    data = _data()
    moved = {time: x * (1 + 1e-7) for time, x in data.items()}
    expected, found = (_kept(_recorded(_split(d, 4, list(range(8))))) for d in (data, moved))
    for row, call in expected.items():
        torch.testing.assert_close(found[row]["sample"], call["sample"], rtol=1e-5, atol=1e-6)


def test_samples_that_begin_alike_are_told_apart() -> None:
    """Black upper rows of a picture, the same latent under two texts."""
    x = noise(6, 3, 8, 8)
    x[:, :, :4] = 0
    forwards, backwards = (
        _kept(_recorded([{"sample": part, "timestep": 1.0} for part in y.split(1)]), [1.0])[0]["sample"]
        for y in (x, x.flip(0))
    )
    assert torch.equal(forwards, backwards)
    assert len(forwards) == 3


def test_memory_does_not_grow_with_the_samples() -> None:
    def kept(samples: int) -> int:
        replay = _recorded(_split(_data(samples), 2, list(range(samples))))
        return sum(len(heap) for heap in replay._heaps.values())

    assert kept(4) == kept(16) == 3 * len(TIMES)


def test_calls_run_again_as_they_were() -> None:
    model = Recorder()
    extra = {"scale": noise(4, 1, seed=3)}
    call = {**_guided(noise(2, 3, 8, 8), 5.0), "extra": extra, "ids": noise(7, 3), "flag": False}
    replay = _recorded([call], samples=8, model=model)
    again = _kept(replay, [5.0])[0]
    assert again["flag"] is False
    assert torch.equal(again["ids"], call["ids"])
    assert sorted(model(**again).flatten().tolist()) == pytest.approx(sorted(model(**call).flatten().tolist()))


@pytest.mark.parametrize(
    ("time", "again"),
    [
        (7, 7),
        (7.5, 7.5),
        (torch.tensor(7), torch.tensor(7)),
        (torch.tensor([7.5], dtype=torch.float16), torch.tensor([7.5], dtype=torch.float16)),
        (torch.tensor([7, 7]), torch.tensor([7, 7])),
    ],
    ids=repr,
)
def test_the_time_keeps_its_form(time: Any, again: Any) -> None:
    call = _kept(_recorded([{"sample": noise(2, 3, 8, 8), "timestep": time}]), [float(torch.as_tensor(time).max())])[0]
    found = call["timestep"]
    assert type(found) is type(again)
    if isinstance(again, Tensor):
        assert found.dtype == again.dtype
        assert torch.equal(found, again)
    else:
        assert found == again


def test_a_time_per_sample_sorts_the_samples() -> None:
    x = noise(4, 3, 8, 8)
    found = _kept(_recorded([{"sample": x, "timestep": torch.tensor([2.0, 1.0, 2.0, 1.0])}]), [1.0, 2.0])
    for row, own in ((0, [1, 3]), (1, [0, 2])):
        assert {float(v) for v in found[row]["sample"][:, 0, 0, 0]} == {float(v) for v in x[own][:, 0, 0, 0]}
        assert found[row]["timestep"].tolist() == [row + 1.0] * 2


def test_frames_share_the_time_of_their_sample() -> None:
    """Six frames, two times: the time of a frame is that of the slow index."""
    x = noise(6, 3, 8, 8)
    replay = _recorded([{"sample": x, "timestep": torch.tensor([2.0, 1.0])}], model=Frames())
    found = _kept(replay, [1.0, 2.0])
    assert {float(v) for v in found[0]["sample"][:, 0, 0, 0]} == {float(v) for v in x[3:, 0, 0, 0]}
    assert found[0]["timestep"].tolist() == [1.0] * 3


class Frames(Recorder):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
        return sample


def test_the_caller_may_change_its_tensors_afterwards() -> None:
    x = noise(2, 3, 8, 8)
    call = {"sample": x, "timestep": torch.tensor([4.0]), "ids": torch.ones(7, 3)}
    replay = _recorded([call])
    expected = x.clone()
    for value in call.values():
        value.zero_()
    found = _kept(replay, [4.0])[0]
    assert torch.equal(found["sample"].sum((1, 2, 3)).sort()[0], expected.sum((1, 2, 3)).sort()[0])
    assert bool((found["ids"] == 1).all())
    assert found["timestep"].tolist() == [4.0]


def test_samples_of_another_shape_do_not_enter_the_batch() -> None:
    small, large = noise(2, 3, 8, 8), noise(5, 3, 16, 16)
    calls = [{"sample": x, "timestep": 3.0} for x in (small, large)]
    found = _kept(_recorded(calls, samples=7), [3.0])[0]["sample"]
    assert found.shape == (5, 3, 16, 16)


def test_arguments_without_a_name() -> None:
    class Positional(TinyDenoiser):
        def forward(self, *args: Any, timestep: Any = 0) -> Tensor:
            return super().forward(args[0], timestep)

    model = Positional()
    replay = Replay(model, deliver_timestep(model, "timestep"), 2)
    with replay.recording(model):
        model(noise(1, 3, 8, 8), timestep=3)  # recording asks for nothing
    with pytest.raises(TdqError, match="passed by name"):
        next(replay.batches([3.0]))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_runs_again(name: str) -> None:
    family = FAMILIES[name]
    model = family.make().eval()
    with torch.no_grad():
        replay = _recorded(family.data(), samples=8, model=model)
        for batch, original in zip(replay.batches(sorted(_times(family))), reversed(family.data()), strict=True):
            found, expected = first_output(model(**batch.call)), first_output(model(**original))
            # the order of the samples is that of their hashes
            key = lambda y: y.flatten(1).double().sum(1).sort()[0]  # noqa: E731
            torch.testing.assert_close(key(found), key(expected), rtol=1e-4, atol=1e-3)


def _times(family: Any) -> list[float]:
    return [float(call["timestep"].flatten()[0]) for call in family.data()]


def test_the_first_tensor_of_an_output() -> None:
    x = torch.ones(1)
    assert first_output(x) is x
    assert first_output((x, None)) is x
    assert first_output([[x]]) is x
    assert first_output({"sample": x}) is x


def _embedded(time: float, text: Tensor) -> Call:
    return {"sample": noise(2, 1, 2, 2, seed=int(time)), "timestep": torch.tensor(time), "text": text.clone()}


def test_what_is_equal_over_time_is_kept_once() -> None:
    text = noise(2, 16)
    replay = _recorded(_embedded(time, text) for time in TIMES)
    held = [tensor for time in TIMES for sample in replay.samples(time) for tensor in [sample["text"]]]
    assert len(held) == 2 * len(TIMES)
    assert len({tensor.data_ptr() for tensor in held}) == 2
    for batch in replay.batches(sorted(TIMES)):
        assert torch.equal(torch.sort(batch.call["text"][:, 0])[0], torch.sort(text[:, 0])[0])


def test_who_writes_to_the_arguments_of_a_call_writes_to_no_sample() -> None:
    text = noise(1, 16)
    calls = [{"sample": noise(1, 1, 2, 2), "timestep": torch.tensor(time), "text": text} for time in TIMES]
    replay = _recorded(calls, samples=1)
    for _ in range(2):
        for batch in replay.batches(sorted(TIMES)):
            assert torch.equal(batch.call["text"], text)
            batch.call["text"].zero_()
            batch.call["sample"].zero_()


def test_samples_are_kept_on_the_cpu_and_run_where_they_came_from() -> None:
    """There is no second device here: what came from one is told by the name of the argument."""
    replay = _recorded(_embedded(time, noise(2, 16)) for time in TIMES)
    replay._places = dict.fromkeys(replay._places, torch.device("meta"))
    assert all(sample["text"].device.type == "cpu" for _, _, sample in replay._sorted(TIMES[0]))
    assert all(tensor.is_meta for tensor in replay.samples(TIMES[0])[0].values())
    assert all(tensor.is_meta for batch in replay.batches([TIMES[0]]) for tensor in batch.call.values())


def test_outputs_go_with_their_samples() -> None:
    model = Recorder()
    replay = _recorded((_embedded(time, noise(2, 16)) for time in TIMES), model=model)
    found = list(replay.batches(sorted(TIMES), most=1))
    assert [batch.row for batch in found] == [0, 0, 1, 1, 2, 2, 3, 3]
    for batch in [*found, *replay.batches(sorted(TIMES))]:
        assert batch.output is not None
        torch.testing.assert_close(batch.output, model(**batch.call))
    assert replay.largest_batch == 2
