"""Tokens and frames with times of their own: each is quantized as if all had its time."""

from __future__ import annotations

import copy
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import pytest
import torch
from support.models import fast_config, noise
from support.tables import with_dequantization
from support.token_models import (
    TIMES,
    VIDEOS,
    Frames,
    Tokens,
    different,
    quantized,
    quantized_video,
    sample,
    token_by_token,
    video_call,
)
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq import TdqError
from modelopt_tdq.core.fake_quant import fake_quantize
from modelopt_tdq.model.token_times import Layout, Reader, find_layout, spread, tokens_of_a_frame

KINDS = (Tokens, Frames)


@pytest.fixture(scope="module")
def models() -> dict[type[nn.Module], nn.Module]:
    return {kind: quantized(kind) for kind in KINDS}


def _random_table(model: nn.Module, seed: int) -> tdq.ScaleTable:
    names = tuple(tdq.temporal_quantizers(model))
    generator = torch.Generator().manual_seed(seed)
    scale = 0.01 * 8 ** torch.rand(len(TIMES), len(names), generator=generator)
    offset = scale * torch.randint(-30, 30, scale.shape, generator=generator)
    return with_dequantization(tdq.ScaleTable(torch.tensor(TIMES), scale, names, offset))


def _corrected(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layers = {name.rpartition(".")[0] for name in tdq.temporal_quantizers(model)}
    widths = {name: model.get_submodule(name).weight.shape[0] for name in layers}
    gain = {n: 0.5 + torch.rand(len(TIMES), w, generator=generator) for n, w in widths.items()}
    bias = {n: torch.randn(len(TIMES), w, generator=generator) for n, w in widths.items()}
    tdq.set_layer_correction(model, tdq.LayerCorrection(torch.tensor(TIMES), gain, bias))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("with_all", [False, True])
def test_each_as_if_all_had_its_time(models: Any, kind: type[nn.Module], batch: int, with_all: bool) -> None:
    model = models[kind]
    if with_all:  # offsets, scales for the way back, divided channels, corrections over time
        model = copy.deepcopy(model)
        for quantizer in tdq.temporal_quantizers(model).values():
            layer = model.get_submodule(quantizer._quantizer_name.rpartition(".")[0])
            width = layer.weight.shape[1]
            quantizer.set_channels(
                (0.5 + torch.rand(width)).reshape(-1, *(1,) * len(getattr(layer, "kernel_size", ())))
            )
        tdq.set_scale_table(model, _random_table(model, 1))
        _corrected(model, 2)
    for seed in range(3):
        x, times = sample(kind, batch, seed), different(kind, batch, seed)
        with torch.no_grad():
            found = model(x, times)
        expected = token_by_token(model, x, times)
        assert torch.equal(found, expected)
        assert not torch.equal(found, model(x, times[:, :1]))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_knows_it_too(models: Any, kind: type[nn.Module], tmp_path: Any) -> None:
    model = models[kind]
    mto.save(model, tmp_path / "m.pt")
    restored = mto.restore(kind().eval(), tmp_path / "m.pt")
    x, times = sample(kind), different(kind)
    with torch.no_grad():
        assert torch.equal(restored(x, times), model(x, times))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled(models: Any, kind: type[nn.Module]) -> None:
    folded = copy.deepcopy(models[kind])
    _corrected(folded, 3)
    mtq.fold_weight(folded)
    compiled = torch.compile(folded, backend="aot_eager", fullgraph=True)
    x = sample(kind)
    with torch.no_grad():
        for times in (different(kind), torch.full_like(different(kind), 300.0)):
            assert torch.allclose(compiled(x, times), folded(x, times), atol=1e-5)


class Mixed(nn.Module):
    """Reads tokens of its own and of a text; the text takes the time, as far as the table lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(8, 8)
        self.text = nn.Linear(8, 8)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        time = timestep.float().reshape(len(timestep), -1, 1) / 1000
        text = self.text(noise(len(sample), 3, 8))
        return self.tokens(sample * (0.1 + 3 * time)) + text.mean(1, keepdim=True)


def _mixed(**fields: Any) -> nn.Module:
    def forward_loop(model: nn.Module) -> None:
        for seed, time in enumerate(TIMES):
            model(noise(2, 5, 8, seed=seed), torch.tensor([time]))

    torch.manual_seed(0)
    return mtq.quantize(Mixed().eval(), fast_config(**fields), forward_loop)


def test_what_has_one_value_at_all_times_needs_no_match() -> None:
    model = _mixed()
    column = tdq.scale_table(model).scale[:, list(tdq.scale_table(model).names).index("text.input_quantizer")]
    assert bool((column == column[0]).all())
    x, times = noise(2, 5, 8, seed=7), different(Tokens)
    with torch.no_grad():
        assert torch.equal(model(x, times), token_by_token(model, x, times))


def test_what_cannot_be_matched_is_refused_by_name() -> None:
    model = _mixed()
    table = tdq.scale_table(model)
    scale = table.scale.clone()
    scale[:, list(table.names).index("text.input_quantizer")] *= torch.tensor([1.0, 2.0, 2.0, 4.0])
    tdq.set_scale_table(model, tdq.ScaleTable(table.timesteps, scale, table.names))
    x = noise(2, 5, 8)
    with torch.no_grad(), pytest.raises(TdqError, match=r"text\.input_quantizer takes .* \(2, 3, 8\)") as error:
        model(x, different(Tokens))
    assert error.value.field == "timestep"
    assert "'enable': False" in str(error.value)
    with torch.no_grad():  # where its two scales are the same, and where samples have one time each
        assert bool(model(x, different(Tokens, among=(300.0, 600.0))).isfinite().all())
        assert bool(model(x, torch.tensor([[0.0], [900.0]]).expand(2, 5)).isfinite().all())


def test_frames_that_a_kernel_mixes_are_refused() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.volume = nn.Conv3d(4, 4, 3, padding=1)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.volume(sample * (1 + timestep.reshape(len(timestep), 1, -1, 1, 1)))

    def forward_loop(model: nn.Module) -> None:
        for time in TIMES:
            model(sample(Frames), torch.tensor([time]))

    model = mtq.quantize(Mixing().eval(), fast_config(), forward_loop)
    with torch.no_grad(), pytest.raises(TdqError, match=r"volume\.input_quantizer .* whose layer adds over its places"):
        model(sample(Frames), different(Frames))


@pytest.mark.parametrize("name", VIDEOS)
def test_videos_whose_first_frame_is_given(name: str) -> None:
    """Calibrated as text-to-video: every quantizer gives each token what its own time says."""
    model = quantized_video(name)
    table = tdq.scale_table(model)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for key, quantizer in tdq.temporal_quantizers(model).items():
        quantizer.register_forward_hook(lambda m, args, out, key=key: seen.update({key: (args[0], out)}))
    times = torch.tensor([[0.0, 900.0]]).expand(VIDEOS[name], 2)
    with torch.no_grad():
        model(**video_call(name, times, seed=5))
    followed = 0
    for column, key in enumerate(table.names):
        read, given = seen[key]
        first, last = table.scale[0, column], table.scale[-1, column]
        if read.shape[1] == 32:
            expected = [
                fake_quantize(part, s, None, 8) for part, s in zip(read.chunk(2, 1), (first, last), strict=True)
            ]
            assert torch.equal(given, torch.cat(expected, 1))
            followed += int(first != last)
        else:  # of the text
            assert first == last
            assert torch.equal(given, fake_quantize(read, first, None, 8))
    assert followed >= 8


LINEAR, VOLUME, IMAGE = Reader(0, 1), Reader(3, 2), Reader(2, 0)


@pytest.mark.parametrize(
    ("times", "shape", "reader", "per_frame", "layout"),
    [
        ((2, 5), (2, 5, 8), LINEAR, (), Layout(1)),
        ((2, 5), (2, 5, 3, 8), LINEAR, (), Layout(1)),
        ((1, 5), (3, 5, 8), LINEAR, (), Layout(1)),  # one row of times for all samples
        ((2, 5), (10, 8), LINEAR, (), Layout(0)),
        ((2, 5), (10, 8, 6, 6), IMAGE, (), Layout(0)),
        ((2, 5), (2, 8, 5, 6, 6), VOLUME, (), Layout(2)),
        ((2, 5), (2, 20, 8), LINEAR, (4,), Layout(1, 4)),
        ((2, 5), (2, 20, 8), LINEAR, (), None),  # four of each, or the tokens of a text
        ((2, 5), (2, 15, 8), LINEAR, (4,), None),
        ((2, 5), (2, 5), LINEAR, (), None),  # channels
        ((2, 5), (2, 5, 8, 8), IMAGE, (), None),  # channels
        ((2, 5), (2, 8, 5, 8), IMAGE, (), None),  # rows of an image
        ((2, 5), (4, 5, 8), LINEAR, (), None),
        ((1, 5), (5, 5, 8), LINEAR, (), None),  # either
        ((2, 5), (2, 5, 8), None, (), None),  # a product of attention
    ],
)
def test_where_times_are(times: Any, shape: Any, reader: Any, per_frame: Any, layout: Any) -> None:
    assert find_layout(times, shape, reader, per_frame) == layout


def test_spread_over_channels_behind_the_tokens_and_before() -> None:
    values = torch.arange(12.0).reshape(1, 2, 6)
    assert spread(values, Layout(1), 3, 2).shape == (1, 2, 6)
    volume = spread(values, Layout(2), 5, 1)
    assert volume.shape == (1, 6, 2, 1, 1)
    assert torch.equal(volume[0, :, 1, 0, 0], values[0, 1])
    assert torch.equal(spread(values, Layout(0), 4, 1)[1, :, 0, 0], values[0, 1])


def test_tokens_of_a_frame_are_those_of_patches() -> None:
    videos = [noise(1, 4, 3, 8, 12), noise(1, 3, 5, 8)]
    assert tokens_of_a_frame(videos, 3) == {96, 24, 6}
    assert tokens_of_a_frame(videos, 5) == frozenset()
