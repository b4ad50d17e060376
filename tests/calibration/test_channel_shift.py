"""Shifts of channels: exact in full precision, the middles of ranges over time, worth it where channels lie apart."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.models import at, fast_config, loop, noise
from support.once import Once
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.calibration.channel_ranges import ChannelRanges, shared_ranges
from modelopt_tdq.core.fake_quant import fake_quantize
from modelopt_tdq.core.metrics import sqnr_db
from modelopt_tdq.core.scales import Scales
from modelopt_tdq.model.full_precision import full_precision

TIMES = (0.0, 200.0, 500.0, 900.0)


class Apart(nn.Module):
    """Channels that lie far apart and move with time; an embedding that is time alone; a convolution that pads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.shortcut = nn.Conv2d(8, 8, 1)
        self.padded, self.beside = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.embed = nn.Linear(8, 8)
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("place", torch.tensor([0.0, 9.0, -7.0, 0.5, 3.0, 0.0, -2.0, 20.0]))

    def forward(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        t = torch.as_tensor(timestep).to(sample).reshape(-1) / 1000
        h = self.conv_in(sample) + (self.place * (t.unsqueeze(1) - 0.4)).reshape(-1, 8, 1, 1)
        h = self.shortcut(h)
        h = self.padded(h) + self.beside(h)
        emb = self.embed(torch.sin(t.unsqueeze(1) * self.place))
        tokens = (h + emb.reshape(-1, 8, 1, 1)).flatten(2).transpose(1, 2) + self.place
        return self.q(tokens) * torch.tanh(self.k(tokens))


SHIFTED = ("shortcut", "embed", "q", "k")


def data(samples: int = 6, seed: int = 0) -> list[tuple[Tensor, float]]:
    return [(noise(samples, 3, 4, 4, seed=seed + i), time) for i, time in enumerate(TIMES)]


def apart() -> nn.Module:
    torch.manual_seed(0)
    return Apart().eval()


once = Once()


def shifted(model: nn.Module | None = None, calls: Any = None, **fields: Any) -> Any:
    config = fast_config(**{"channel_shift": "auto", **fields})
    if model is not None or calls is not None:
        return mtq.quantize(apart() if model is None else model, config, loop(data() if calls is None else calls))
    return once(config, lambda: mtq.quantize(apart(), config, loop(data())))


def quantizer(model: nn.Module, layer: str) -> Any:
    return model.get_submodule(f"{layer}.input_quantizer")


def quality_db(model: nn.Module) -> float:
    with torch.no_grad():
        exact = apart()
        return sum(sqnr_db(exact(*call), model(*call)) for call in data(seed=50)) / len(TIMES)


@pytest.mark.parametrize("smoothing", ["none", "auto", 0.5])
def test_nothing_changes_in_full_precision(smoothing: Any) -> None:
    model = shifted(calls=data(24), channel_smoothing=smoothing)
    assert any(quantizer(model, name).channel_shift is not None for name in SHIFTED)
    with full_precision(model), torch.no_grad():
        for call in data(seed=9):
            torch.testing.assert_close(model(*call), apart()(*call), rtol=1e-4, atol=1e-4)


def test_shifts_are_the_middles_of_the_ranges_at_each_time() -> None:
    model = shifted()
    seen: list[Tensor] = []
    plain = apart()
    plain.q.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        loop(data())(plain)
    ends = [torch.aminmax(x.flatten(0, 1), dim=0) for x in seen]
    expected = torch.stack([(low + high) / 2 for low, high in ends])
    found = quantizer(model, "q")
    torch.testing.assert_close(found.channel_shift.flatten(1), expected, rtol=1e-5, atol=1e-5)
    assert found.shift_times.tolist() == list(TIMES)
    largest = torch.stack([((high - low) / 2).max() for low, high in ends])
    torch.testing.assert_close(found.scales.scale, largest / 127, rtol=1e-4, atol=0.0)


def test_layers_that_read_one_tensor_share_a_shift_and_where_one_pads_there_is_none() -> None:
    model = shifted()
    assert torch.equal(quantizer(model, "q").channel_shift, quantizer(model, "k").channel_shift)
    for name in ("conv_in", "padded", "beside"):
        assert getattr(quantizer(model, name), "channel_shift", None) is None


def test_what_time_alone_decides_is_exact() -> None:
    """All samples have the same values at a time, which are the middles."""
    model = shifted()
    with torch.no_grad():
        for time in TIMES:
            x = torch.sin(torch.tensor([[time / 1000]]) * model.place)
            with at(model, time):
                torch.testing.assert_close(quantizer(model, "embed")(x), x, rtol=1e-6, atol=1e-6)


def test_it_is_worth_it_where_channels_lie_apart() -> None:
    plain, moved = (quality_db(shifted(channel_shift=shift, margin=0.2)) for shift in ("none", "auto"))
    assert moved > plain + 3


def test_static_scales_have_static_shifts() -> None:
    model = shifted(bins=1)
    rows = [len(q.channel_shift) for q in tdq.temporal_quantizers(model).values() if q.channel_shift is not None]
    assert rows
    assert set(rows) == {1}
    assert quality_db(model) > quality_db(shifted(bins=1, channel_shift="none"))


def test_it_is_off_by_default_and_other_values_are_refused() -> None:
    assert all(q.channel_shift is None for q in tdq.temporal_quantizers(shifted(channel_shift="none")).values())
    with pytest.raises(tdq.TdqError, match="channel_shift"):
        fast_config(channel_shift="static")


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([8, 4, (4, 3)]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 999),
)
def test_codes_and_values_by_the_definition(bits: Any, divides: bool, offset: bool, dequant: bool, seed: int) -> None:
    """q = rne((x - (o + v) c) / (s c)), x_hat / c = q s' + (o' + v), against NumPy."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    x, v = torch.randn(2, 3, 5, generator=generator) * 3, torch.randn(5, generator=generator)
    s, c = uniform(1) * 0.1 + 0.01, uniform(5) + 0.5 if divides else None
    o = torch.randn(1, generator=generator) if offset else None
    back = (uniform(1) * 0.1 + 0.01, torch.randn(1, generator=generator)) if dequant else (None, None)
    scale, moved, value_scale, value_offset = Scales(s, o, *back).over_channels(c, v)
    found = fake_quantize(x, scale, moved, bits, value_scale, value_offset)
    ones = torch.ones(5) if c is None else c
    p = ((0 if o is None else o) + v) * ones
    codes = oracle.codes(x.numpy(), (s * ones).numpy(), p.numpy(), bits)
    way_back = (s, 0 if o is None else o) if not dequant else back
    expected = torch.from_numpy(codes).float() * way_back[0] + (way_back[1] + v)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_each_sample_has_the_shift_of_its_time() -> None:
    model = shifted()
    x = torch.cat([call[0][:2] for call in data(seed=9)])
    times = torch.tensor(TIMES).repeat_interleave(2)
    with torch.no_grad():
        together = model(x, times)
        apart_ = torch.cat([model(x[2 * i : 2 * i + 2], time) for i, time in enumerate(TIMES)])
    torch.testing.assert_close(together, apart_, rtol=1e-5, atol=1e-5)


def test_samples_of_one_call_are_ranged_by_their_own_times() -> None:
    one = shifted()
    x = torch.cat([sample for sample, _ in data()])
    times = torch.tensor(TIMES).repeat_interleave(6)
    both = shifted(calls=[(x, times)])
    ours, theirs = (quantizer(model, "q").channel_shift for model in (one, both))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_saved_restored_and_copied(tmp_path: Path) -> None:
    model = shifted(channel_smoothing="auto")
    mto.save(model, tmp_path / "model.pt")
    restored = mto.restore(Apart().eval(), tmp_path / "model.pt")
    copied = copy.deepcopy(model)
    mtq.fold_weight(copied)
    with torch.no_grad():
        for call in data(seed=9):
            assert torch.equal(restored(*call), model(*call))
            assert torch.equal(copied(*call), model(*call))


def test_a_new_calibration_begins_without_them() -> None:
    model = shifted(apart(), channel_smoothing="auto")
    mtq.calibrate(model, fast_config()["algorithm"], loop(data()))
    assert all(q.channel_shift is None for q in tdq.temporal_quantizers(model).values())
    torch.testing.assert_close(quality_db(model), quality_db(shifted(channel_shift="none")), rtol=1e-4, atol=0.0)


def test_tables_of_other_shifts_are_refused() -> None:
    model, other = shifted(), shifted(calls=data(seed=30))
    with pytest.raises(tdq.TdqError, match="other channels"):
        tdq.set_scale_table(model, tdq.scale_table(other))
    with pytest.raises(tdq.TdqError, match="other channels"):
        tdq.set_scale_table(model, tdq.scale_table(shifted(channel_shift="none")))
    tdq.set_scale_table(model, tdq.scale_table(model))


def test_rows_that_somebody_computed_with_are_noticed() -> None:
    model = shifted(apart())
    quantizer(model, "q")._channel_shift_bits.mul_(2)
    with pytest.raises(tdq.TdqError, match=r"q\.input_quantizer"):
        model(*data()[0])


@pytest.mark.parametrize("statistic", ["mse", "output", "percentile", "entropy"])
def test_every_statistic(statistic: str) -> None:
    fields = {"statistic": statistic, "protect_steps": True, "percentile": 99.9}
    assert quality_db(shifted(**fields)) > quality_db(shifted(**fields, channel_shift="none"))


def test_offsets_of_all_channels_beside_them() -> None:
    assert quality_db(shifted(asymmetric=True, margin=0.2)) > quality_db(shifted(channel_shift="none", margin=0.2)) + 3


def test_training_sees_what_is_deployed() -> None:
    config = tdq.make_config(8, 8, method="tdq_qat", channel_shift="auto", progress=False)
    model = mtq.quantize(apart(), config, loop(data()))
    assert quantizer(model, "q").channel_shift is not None
    with torch.no_grad():
        for call in data(seed=9):
            deployed, trained = model.eval()(*call), model.train()(*call)
            assert float((trained - deployed).square().mean() / deployed.square().mean()) < 1e-3
    loss = (model(*data()[0]) - apart()(*data()[0]).detach()).square().mean()
    loss.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    calls = [(x.to(dtype), time) for x, time in data()]
    model = shifted(apart().to(dtype), calls)
    found = quantizer(model, "q").channel_shift
    assert found is not None
    assert found.dtype == torch.float32
    with torch.no_grad():
        assert bool(model(*calls[1]).isfinite().all())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 400), min_size=1, max_size=120), st.integers(1, 4), st.integers(0, 999))
def test_ranges_hold_every_value_in_the_row_of_its_time(times: list[int], width: int, seed: int) -> None:
    """Whatever the batches, and where neighbouring times share a row."""
    values = torch.randn(len(times), width, 3, generator=torch.Generator().manual_seed(seed))
    known = torch.tensor(times, dtype=torch.float32)
    one, by_one = ChannelRanges(), ChannelRanges()
    one.see(values.movedim(1, 0).flatten(1), known)
    for i in range(len(times)):
        by_one.see(values[i], known[i : i + 1])
    rows, low, high = shared_ranges([one])
    assert rows == sorted(rows)
    assert len(rows) <= 64
    for own, other in zip((low, high), shared_ranges([by_one])[1:], strict=True):
        assert torch.equal(own, other)
    if len(set(times)) <= 64:
        assert rows == sorted(map(float, set(times)))
        for i, time in enumerate(times):
            row = rows.index(float(time))
            assert bool((values[i] >= low[row].unsqueeze(1)).all())
            assert bool((values[i] <= high[row].unsqueeze(1)).all())
    assert torch.equal(low.amin(0), values.movedim(1, 0).flatten(1).amin(1))
    assert torch.equal(high.amax(0), values.movedim(1, 0).flatten(1).amax(1))
