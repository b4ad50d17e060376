"""Corrections of layers' outputs: what is fitted, what is chosen, and that nothing else changes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import TIMES, TinyDenoiser, at, calls, fast_config, loop, noise, quantized
from support.processes import results
from support.unchanged import unchanged_by
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq import TdqError
from modelopt_tdq.calibration import correct, correction_fit
from modelopt_tdq.calibration.protect import prediction_error
from modelopt_tdq.core.metrics import sqnr_db
from modelopt_tdq.model.full_precision import full_precision
from modelopt_tdq.model.output_correction import correctable_layers, output_corrections
from modelopt_tdq.model.replay import Replay
from modelopt_tdq.model.timestep import deliver_timestep

QUANTIZED = ("conv1", "mix", "conv2")

#: The last layer is corrected too, though it is not quantized.
LAYERS = (*QUANTIZED, "conv_out")
COARSE = {"weight_bits": 3, "activation_bits": 4, "replay_samples": 64}


def corrected(correction: str = "per_step", data: Any = None, model: nn.Module | None = None, **fields: Any) -> Any:
    return quantized(model, data, **{**COARSE, "correction": correction, **fields})


def rows(model: nn.Module) -> tdq.LayerCorrection:
    found = tdq.layer_correction(model)
    assert found is not None
    return found


def close(one: tdq.LayerCorrection, other: tdq.LayerCorrection, tolerance: float = 1e-5) -> bool:
    return one.names == other.names and all(
        torch.allclose(left[name], right[name], rtol=tolerance, atol=tolerance)
        for left, right in ((one.gain, other.gain), (one.bias, other.bias))
        for name in one.names
    )


# --- one layer ---


@given(st.integers(2, 6), st.integers(1, 4), st.integers(0, 2), st.integers(0, 1000))
def test_without_doubt_the_fit_is_least_squares(samples: int, fold: int, trailing: int, seed: int) -> None:
    """Samples that agree leave nothing to shrink."""
    generator = torch.Generator().manual_seed(seed)
    shape = (fold, *((3,) if trailing == 0 else ()), 5, *(4,) * trailing)
    one = torch.randn(*shape, generator=generator)
    y = one.repeat(samples, *(1,) * (one.dim() - 1))
    gain = 0.8 + 0.4 * torch.rand(5, generator=generator)
    bias = torch.randn(5, generator=generator)
    placed = (value.reshape(-1, *(1,) * trailing) for value in (gain, bias))
    scale, shift = placed
    z = y * scale + shift
    moments = correction_fit._moments(y, z, samples, trailing)
    found_gain, found_bias = correction_fit._fitted(moments, y.numel() // samples // 5)
    if fold * 3 ** (trailing == 0) * 4**trailing > 2:
        assert torch.allclose(found_gain, gain, atol=1e-3)
        assert torch.allclose(found_bias, bias, atol=1e-3)


@given(st.integers(2, 8), st.integers(0, 1000))
def test_the_fit_is_shrunk_and_never_beyond(samples: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(samples, 7, 4, 4, generator=generator)
    z = 1.1 * y + 0.3 * torch.randn(samples, 7, 1, 1, generator=generator)
    moments = correction_fit._moments(y, z, samples, 2)
    gain, _ = correction_fit._fitted(moments, 16)
    plain = np.array([np.polyfit(y[:, c].flatten().numpy(), z[:, c].flatten().numpy(), 1)[0] for c in range(7)])
    shift, wanted = gain.numpy() - 1, np.clip(plain, 0.5, 2.0) - 1
    assert (np.abs(shift) <= np.abs(wanted) + 1e-5).all()
    assert (shift * wanted >= -1e-6).all()
    assert (np.abs(shift) < np.abs(wanted) - 1e-6).any()


def test_one_sample_corrects_nothing() -> None:
    moments = correction_fit._moments(torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4), 1, 2)
    gain, bias = correction_fit._fitted(moments, 16)
    assert torch.equal(gain, torch.ones(3))
    assert torch.equal(bias, torch.zeros(3))


def test_the_moments_do_not_depend_on_the_place_of_the_channels() -> None:
    y, z = noise(4, 5, 6, 7), noise(4, 5, 6, 7, seed=1)
    last = correction_fit._moments(y.movedim(1, -1), z.movedim(1, -1), 2, 0)
    assert torch.allclose(correction_fit._moments(y, z, 2, 2), last, atol=1e-5)


# --- the model ---


def outputs(model: nn.Module, data: Sequence[tuple[Tensor, Tensor]]) -> dict[str, dict[float, Tensor]]:
    """[N, C] mean over positions, of each layer at each time."""
    found: dict[str, dict[float, Tensor]] = {name: {} for name in LAYERS}
    time = [0.0]

    def hook(name: str, layer: nn.Module, args: Any, output: Tensor) -> None:
        channels = output.movedim(-1, 1) if isinstance(layer, nn.Linear) else output
        old = found[name].get(time[0])
        mean = channels.flatten(2).mean(2)
        found[name][time[0]] = mean if old is None else torch.cat([old, mean])

    handles = [model.get_submodule(name).register_forward_hook(functools.partial(hook, name)) for name in LAYERS]
    with torch.no_grad():
        for sample, t in data:
            time[0] = float(t)
            model(sample, t)
    for handle in handles:
        handle.remove()
    return found


def mean_errors(model: nn.Module, data: Any) -> dict[str, float]:
    """Squared error of each layer's mean output, over channels and times."""
    with full_precision(model):
        exact = outputs(model, data)
    found = outputs(model, data)
    return {
        name: sum(float((found[name][t].mean(0) - exact[name][t].mean(0)).square().sum()) for t in TIMES)
        for name in LAYERS
    }


def test_errors_with_corrections_fitted_on_the_way_are_those_with_them_in_place() -> None:
    """As smoothing is chosen by: the same samples, a call for each time."""
    model = corrected("none")
    timestep = deliver_timestep(model, "timestep")
    replay = Replay(model, timestep, 8)
    with replay.recording(model), full_precision(model), torch.no_grad():
        loop(calls(samples=8, batch=8))(model)
    replay.agree()
    layers = {name: model.get_submodule(name) for name in LAYERS}
    plain = prediction_error(model, replay, sorted(TIMES), {}, "", False)
    found = correction_fit.corrected_prediction_error(model, layers, replay, sorted(TIMES), full_precision)
    tdq.set_layer_correction(model, correction_fit.fit_corrections(model, layers, replay, sorted(TIMES), False))
    expected = prediction_error(model, replay, sorted(TIMES), {}, "", False)
    assert found.keys() == expected.keys()
    for row, powers in expected.items():
        torch.testing.assert_close(found[row], powers, rtol=1e-3, atol=0.0)
        assert float(powers[:, 0].sum()) < 0.98 * float(plain[row][:, 0].sum())


def test_means_are_taken_back_in_every_layer_and_step() -> None:
    data = calls(samples=32, batch=8)
    plain, better = (corrected(kind, data) for kind in ("none", "per_step"))
    assert tdq.layer_correction(plain) is None
    assert rows(better).names == LAYERS
    assert {len(gain) for gain in rows(better).gain.values()} == {len(TIMES)}
    before, after = mean_errors(plain, data), mean_errors(better, data)
    # what is left was shrunk away
    assert all(after[name] < 0.05 * before[name] for name in LAYERS), (before, after)


def prediction_db(model: nn.Module, data: Any) -> list[float]:
    found = []
    with torch.no_grad():
        for sample, time in data:
            with full_precision(model):
                exact = model(sample, time)
            found.append(sqnr_db(exact, model(sample, time)))
    return found


def test_predictions_on_other_samples_are_better() -> None:
    data, others = calls(samples=32, batch=8), calls(samples=32, batch=32, seed=77)
    plain, better = (prediction_db(corrected(kind, data), others) for kind in ("none", "auto"))
    assert sum(better) > sum(plain) + 0.5 * len(plain)
    assert all(new > old - 0.1 for new, old in zip(better, plain, strict=True))


def test_the_rest_of_the_model_is_as_without() -> None:
    data = calls(samples=8)
    plain, better = (corrected(kind, data) for kind in ("none", "per_step"))
    assert torch.equal(tdq.scale_table(plain).scale, tdq.scale_table(better).scale)
    tdq.set_layer_correction(better, None)
    with torch.no_grad():
        assert torch.equal(plain(*data[0]), better(*data[0]))
    assert "forward" not in vars(better.conv1)
    assert type(better.conv1.output_quantizer) is type(plain.conv1.output_quantizer)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_batch_size_changes_nothing(batch: int) -> None:
    whole, split = (
        rows(corrected(data=calls(samples=8, batch=size, order=order)))
        for size, order in ((8, range(8)), (batch, [3, 1, 7, 0, 2, 6, 4, 5]))
    )
    assert close(whole, split)


def share(rank: int) -> list[tuple[Tensor, Tensor]]:
    """The last time is seen by the second process alone; all data for -1."""
    everything = calls(samples=6, batch=2)
    first = [call for i, call in enumerate(everything) if i % 3 == 0 and float(call[1]) != TIMES[-1]]
    second = [call for call in everything if not any(call is other for other in first)]
    return {0: first, 1: second, -1: everything}[rank]


def in_process(rank: int) -> Any:
    model = corrected("auto", share(rank), rounding="auto")
    found = rows(model)
    return found.gain, found.bias, found.timesteps, {name: model.get_submodule(name).weight for name in QUANTIZED}


@pytest.mark.slow
def test_several_processes_round_and_fit_as_one_does(tmp_path: Path) -> None:
    gain, bias, timesteps, weights = in_process(-1)
    one = tdq.LayerCorrection(timesteps, gain, bias)
    for found in results(in_process, 2, tmp_path):
        assert all(torch.equal(weight, found[3][name]) for name, weight in weights.items())
        assert close(one, tdq.LayerCorrection(found[2], found[0], found[1]))


def test_static_is_the_mean_over_time() -> None:
    data = calls(samples=8)
    every, one = rows(corrected("per_step", data)), rows(corrected("static", data))
    for name in LAYERS:
        assert torch.allclose(one.gain[name], every.gain[name].mean(0, keepdim=True))
        assert torch.allclose(one.bias[name], every.bias[name].mean(0, keepdim=True))


@pytest.mark.parametrize("bits", [4, 8])
def test_auto_fits_to_what_calibration_kept(bits: int) -> None:
    runs = []
    data = calls(samples=64, batch=16)

    def counted(model: nn.Module) -> None:
        runs.append(1)
        loop(data)(model)

    fields = {"weight_bits": bits, "activation_bits": bits, "replay_samples": 64}
    torch.manual_seed(0)
    model = mtq.quantize(TinyDenoiser().eval(), fast_config(**fields, correction="auto"), counted)
    assert len(runs) == 1
    assert rows(model).names
    plain = quantized(data=data, **fields)
    others = calls(samples=64, batch=16, seed=1)
    with full_precision(plain), torch.no_grad():
        exact = [plain(*call) for call in others]
    errors = [[sqnr_db(z, m(*call)) for z, call in zip(exact, others, strict=True)] for m in (plain, model)]
    assert np.mean(errors[1]) > np.mean(errors[0]) + 0.03


def test_static_scales_get_static_corrections() -> None:
    found = rows(corrected("auto", calls(samples=32, batch=8), bins=1, weight_bits=2))
    assert {len(gain) for gain in found.gain.values()} == {1}


def test_a_time_that_gets_worse_is_not_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    real = correct.fit_corrections

    def spoiled(*args: Any) -> tdq.LayerCorrection:
        found = real(*args)
        for bias in found.bias.values():
            bias[1] += 5.0
        return found

    monkeypatch.setattr(correct, "fit_corrections", spoiled)
    monkeypatch.setattr(correct, "_kind", lambda errors: "per_step")
    found = rows(corrected("auto", calls(samples=16)))
    for name in found.names:
        assert torch.equal(found.gain[name][1], torch.ones_like(found.gain[name][1]))
        assert not found.bias[name][1].any()
        assert found.bias[name][0].any()


def test_corrections_that_do_not_help_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    real = correct.fit_corrections

    def spoiled(*args: Any) -> tdq.LayerCorrection:
        found = real(*args)
        for bias in found.bias.values():
            bias.add_(5.0)
        return found

    monkeypatch.setattr(correct, "fit_corrections", spoiled)
    assert tdq.layer_correction(corrected("auto", calls(samples=16))) is None


def test_a_budget_makes_the_layers_static_that_gain_least() -> None:
    data = calls(samples=16)
    channels = 3 * 8 + 3
    everything = 8 * channels * len(TIMES)
    for budget, static in ((everything, 0), (everything - 1, 1), (8 * channels, 4)):
        found = rows(corrected("per_step", data, correction_budget=budget / 2**20))
        assert sum(len(gain) == 1 for gain in found.gain.values()) == static
        assert found.nbytes <= budget
    with pytest.raises(TdqError, match="correction_budget"):
        corrected("per_step", data, correction_budget=(8 * channels - 1) / 2**20)


def test_a_time_for_each_sample() -> None:
    model = corrected(data=calls(samples=8))
    x = noise(3, 3, 8, 8)
    times = torch.tensor([900.0, 20.0, 300.0])
    with torch.no_grad():
        together = model(x, times)
        apart = torch.cat([model(x[i : i + 1], times[i]) for i in range(3)])
    assert torch.allclose(together, apart, atol=1e-4)


def test_what_a_correction_computes() -> None:
    model = corrected("none")
    gain = {"conv1": 1 + torch.rand(2, 8), "mix": 1 + torch.rand(1, 8)}
    bias = {"conv1": torch.randn(2, 8), "mix": torch.randn(1, 8)}
    correction = tdq.LayerCorrection(torch.tensor([100.0, 500.0]), gain, bias)
    x, tokens = noise(2, 8, 8, 8), noise(2, 5, 8)
    with torch.no_grad(), at(model, 400.0):
        plain = model.conv1(x), model.mix(tokens)
        tdq.set_layer_correction(model, correction)
        assert torch.equal(model.conv1(x), plain[0] * gain["conv1"][1][:, None, None] + bias["conv1"][1][:, None, None])
        assert torch.equal(model.mix(tokens), plain[1] * gain["mix"][0] + bias["mix"][0])
        with full_precision(model):
            exact = model.conv1(x)
        mtq.disable_quantizer(model, "conv1.*")
        assert torch.equal(model.conv1(x), exact)
    assert set(output_corrections(model)) == {"mix"}
    found = rows(model)
    assert found.names == ("mix",)
    assert torch.equal(found.gain["mix"], gain["mix"])


def test_saved_restored_copied_and_cast(tmp_path: Path) -> None:
    model = corrected(data=calls(samples=8))
    x, t = calls()[0]
    with torch.no_grad():
        expected = model(x, t)
    mto.save(model, tmp_path / "model.pt")
    restored = mto.restore(TinyDenoiser().eval(), tmp_path / "model.pt")
    for other in (restored, copy.deepcopy(model)):
        assert close(rows(other), rows(model), 0.0)
        with torch.no_grad():
            assert torch.equal(other(x, t), expected)
    state = mto.modelopt_state(model)
    again = mto.restore_from_modelopt_state(TinyDenoiser().eval(), state)
    with pytest.raises(TdqError, match="not loaded"):
        tdq.layer_correction(again)
    again.load_state_dict(model.state_dict())
    assert close(rows(again), rows(model), 0.0)
    half = copy.deepcopy(model).half()
    assert close(rows(half), rows(model), 0.0)
    with torch.no_grad():
        assert half(x.half(), t).dtype == torch.float16


def test_a_new_calibration_forgets_them() -> None:
    model = corrected(data=calls(samples=8))
    mtq.calibrate(model, {"method": "tdq", "progress": False, "correction": "none"}, loop(calls(samples=4)))
    assert tdq.layer_correction(model) is None


# --- as an algorithm of its own ---


@pytest.mark.parametrize("first", ["max", "tdq", {"method": "tdq_qat", "progress": False}])
def test_behind_other_algorithms(first: Any) -> None:
    data = calls(samples=16)
    config = {**fast_config(weight_bits=3), "algorithm": [first, {"method": "tdq_correct", "progress": False}]}
    torch.manual_seed(0)
    model = mtq.quantize(TinyDenoiser().eval(), config, loop(data))
    assert rows(model).names == LAYERS
    better = prediction_db(model, calls(samples=16, batch=16, seed=50))
    tdq.set_layer_correction(model, None)
    assert sum(better) > sum(prediction_db(model, calls(samples=16, batch=16, seed=50))) + 0.5 * len(better)


CORRECT = {"method": "tdq_correct", "progress": False, "correction": "per_step"}


def folded() -> nn.Module:
    model = corrected("none")
    mtq.fold_weight(model)
    return model


class Mixing(TinyDenoiser):
    """Its samples depend on each other."""

    def forward(self, sample: Tensor, timestep: Any, context: Any = None) -> Tensor:
        return super().forward(sample - 0.5 * sample.mean(0, keepdim=True), timestep, context)


class SequenceFirst(nn.Module):
    """Its layer sees the batch in the second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        tokens = sample.flatten(2).transpose(0, 1)  # [3, B, 64]
        return self.layer(tokens.reshape(*tokens.shape[:2], 8, 8)).transpose(0, 1)


FAULTS: dict[str, tuple[str, Any, Any]] = {
    "no loop": ("forward_loop", lambda: corrected("none"), None),
    "an idle loop": ("forward_loop", lambda: corrected("none"), lambda model: None),
    "folded weights": ("correction", folded, loop(calls())),
    "samples that are mixed": ("correction", lambda: corrected("none", model=Mixing().eval()), loop(calls())),
}


@pytest.mark.parametrize("case", FAULTS)
def test_refuses_and_changes_nothing(case: str) -> None:
    field, make, forward_loop = FAULTS[case]
    model = make()

    def failing() -> None:
        with pytest.raises(TdqError) as raised:
            mtq.calibrate(model, CORRECT, forward_loop)
        assert raised.value.field == field

    unchanged_by(model, failing)


def test_layers_called_by_keyword() -> None:
    class ByKeyword(TinyDenoiser):
        def forward(self, sample: Tensor, timestep: Any, context: Any = None) -> Tensor:
            h = self.conv_in(input=sample)
            h = h + self.mix(input=self.conv1(input=h).movedim(1, -1)).movedim(-1, 1)
            return self.conv_out(input=self.conv2(input=h))

    torch.manual_seed(0)
    assert rows(corrected(data=calls(samples=8), model=ByKeyword().eval())).names == LAYERS


def test_auto_does_not_mind_layers_whose_weights_the_user_left_in_float() -> None:
    model = corrected("none", calls(samples=8))
    mtq.disable_quantizer(model, "mix.weight_quantizer")
    algorithm = {"method": "tdq", "progress": False, "correction": "auto"}
    mtq.calibrate(model, algorithm, loop(calls(samples=8)))
    assert tdq.layer_correction(model) is None


@pytest.mark.parametrize("make", [Mixing, SequenceFirst])
def test_auto_leaves_alone_what_cannot_be_fitted(make: Any) -> None:
    torch.manual_seed(0)
    config = fast_config(**COARSE, correction="auto", high_precision=())
    assert tdq.layer_correction(mtq.quantize(make().eval(), config, loop(calls()))) is None


@pytest.mark.parametrize(
    ("field", "gain"),
    [
        ("names", {"conv9": torch.ones(1, 8)}),
        ("names", {"": torch.ones(1, 8)}),
        ("gain", {"mix": torch.ones(1, 9)}),
    ],
)
def test_a_correction_of_another_model_is_refused(field: str, gain: dict[str, Tensor]) -> None:
    model = corrected(data=calls(samples=8))
    other = tdq.LayerCorrection(torch.tensor([0.0]), gain, {n: torch.zeros_like(g) for n, g in gain.items()})

    def failing() -> None:
        with pytest.raises(TdqError) as raised:
            tdq.set_layer_correction(model, other)
        assert raised.value.field == field

    unchanged_by(model, failing)


def test_only_quantized_layers_without_output_quantizers_can_be_corrected() -> None:
    config = fast_config(**COARSE)
    config["quant_cfg"].append({"quantizer_name": "conv2.output_quantizer", "cfg": {"num_bits": 8, "axis": None}})
    model = mtq.quantize(TinyDenoiser().eval(), config, loop(calls(samples=8)))
    assert set(correctable_layers(model)) == {"conv1", "mix"}


def test_averaged_buffers_are_noticed() -> None:
    model = corrected(data=calls(samples=8))
    with torch.no_grad():
        for buffer in model.conv1.output_quantizer.buffers():
            buffer.add_(1)
    with pytest.raises(TdqError, match="computed with the buffers"):
        model(*calls()[0])


def test_rounding_that_was_learned_is_corrected_against_the_original_weights() -> None:
    data = calls(samples=16)
    method = {"method": "tdq_reconstruct", "samples": 32, "iterations": 20, "intervals": "table"}
    algorithm = {"weights": "max", "statistic": "max", "protect_steps": False, "progress": False, **method}
    errors = {}
    torch.manual_seed(0)
    exact = TinyDenoiser().eval()
    for correction in ("none", "per_step"):
        config = {**fast_config(weight_bits=3), "algorithm": {**algorithm, "correction": correction}}
        model = mtq.quantize(copy.deepcopy(exact), config, loop(data))
        others = calls(samples=16, batch=16, seed=50)
        with torch.no_grad():
            errors[correction] = sum(sqnr_db(exact(*call), model(*call)) for call in others) / len(others)
    assert rows(model).names == LAYERS
    assert errors["per_step"] > errors["none"] + 0.3
