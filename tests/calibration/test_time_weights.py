"""Weights of times: where they act, that equal ones change nothing, and how a config keeps them."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.evidence import evidence
from support.models import TIMES, TinyDenoiser, calls, fast_config, loop, noise, quantized
from torch import nn

import modelopt_tdq as tdq
from modelopt_tdq import TdqError, TdqWarning
from modelopt_tdq.calibration import chosen_smoothing, correction_fit
from modelopt_tdq.calibration.choose import Evidence
from modelopt_tdq.calibration.columns import columns, worth_an_offset
from modelopt_tdq.calibration.correct import _verdict
from modelopt_tdq.calibration.smoothed_layer import SmoothedLayer
from modelopt_tdq.calibration.smoothing_trial import Settings, Trial
from modelopt_tdq.config import CalibrationFields, TdqCalibConfig
from modelopt_tdq.core.time_weights import squared_weights, weighted_mean
from modelopt_tdq.model.replay import Replay
from modelopt_tdq.model.timestep import deliver_timestep

#: One time counts, the others as good as nothing.
ALONE = 1e-8
EQUAL = {20.0: 0.7, 300.0: 0.7, 900.0: 0.7}


def weighed(rows: int = 4, asymmetric: bool = False, only: int | None = None, bits: int = 4) -> Evidence:
    known = evidence([noise(4096, seed=row) * 3.0**row for row in range(rows)], bits, asymmetric)
    if only is None:
        return known
    weights = {float(row): 1.0 if row == only else ALONE for row in range(rows)}
    return Evidence(known.statistics, bits, asymmetric, None, squared_weights(weights, list(weights)))


def same(one: nn.Module, other: nn.Module) -> bool:
    old, new = one.state_dict(), other.state_dict()
    return old.keys() == new.keys() and all(torch.equal(new[name], value) for name, value in old.items())


# --- the weights of some times ---


def test_a_time_has_the_weight_of_the_nearest_squared_and_relative_to_the_largest() -> None:
    found = squared_weights({900.0: 2.0, 100.0: 1.0, 0.0: 4.0}, [0.0, 49.0, 51.0, 499.0, 501.0, 5000.0])
    assert found.tolist() == [1.0, 1.0, 1 / 16, 1 / 16, 1 / 4, 1 / 4]


@given(st.floats(1e-100, 1e100), st.integers(1, 7), st.integers(1, 50))
def test_equal_weights_are_exactly_one(weight: float, known: int, asked: int) -> None:
    found = squared_weights({float(time): weight for time in range(known)}, [float(time) for time in range(asked)])
    assert torch.equal(found, torch.ones(asked, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(7, 33), (1000,), (20, 3, 5)])
def test_a_mean_by_equal_weights_is_the_mean_to_the_last_bit(shape: tuple[int, ...]) -> None:
    values = noise(*shape)
    assert torch.equal(weighted_mean(values, torch.ones(shape[0], dtype=torch.float64)), values.mean(0))


def test_times_in_other_units_are_warned_of() -> None:
    with pytest.warns(TdqWarning, match="no effect.*from 0.02 to 0.9.*visited 20 to 900.*model's own units"):
        quantized(time_weights={time / 1000: 1.0 + time for time in TIMES})
    with warnings.catch_warnings():
        warnings.simplefilter("error", TdqWarning)
        quantized(time_weights={0.02: 1.0})  # one weight is meant for all


# --- where they act ---


@pytest.mark.parametrize(
    ("statistic", "only"), [("mse", 0), ("mse", 3), ("percentile", 0), ("percentile", 3), ("entropy", 3)]
)
def test_a_static_scale_is_that_of_the_time_that_counts(statistic: str, only: int) -> None:
    config = TdqCalibConfig(statistic=statistic, percentile=99.0, bins=1)
    scale, _ = columns(weighed(only=only), config, True)
    equal, _ = columns(weighed(), config, True)
    own, _ = columns(weighed(), TdqCalibConfig(statistic=statistic, percentile=99.0, smoothing=0.0), True)
    assert scale.tolist() == pytest.approx([float(own[only])] * 4, rel=0.02)
    if only == 0:
        assert float(equal[0]) > 2 * float(scale[0])


def test_bins_are_spent_where_times_count_and_pool_by_weights() -> None:
    known = weighed(6)
    own, _ = columns(known, TdqCalibConfig(smoothing=0.0), True)
    weights = {float(row): 1.0 if row < 2 else ALONE for row in range(6)}
    counted = Evidence(known.statistics, 4, False, None, squared_weights(weights, list(weights)))
    config = TdqCalibConfig(bins="optimal", max_bins=3)
    plain, _ = columns(known, config, True)
    chosen, _ = columns(counted, config, True)
    assert torch.equal(chosen[:2], own[:2])  # rows of their own for the two that count
    assert float(plain[0]) == float(plain[1])  # whose errors are small, and which share one otherwise
    halves, _ = columns(weighed(6, only=0), TdqCalibConfig(bins=2), True)
    assert float(halves[0]) == float(halves[2]) == float(own[0])


def test_rows_of_their_own_do_not_change() -> None:
    config = TdqCalibConfig(smoothing=0.2)
    assert torch.equal(columns(weighed(only=1), config, True)[0], columns(weighed(), config, True)[0])


def test_static_is_kept_by_what_it_loses_at_times_that_count() -> None:
    """One scale for all suits rows 1 and 2, and loses 0.4 dB in all by what it does to row 0, which is small."""
    known = evidence([noise(4096) * size for size in (0.05, 1.0, 1.0)], 4, False)
    config = TdqCalibConfig(smoothing=0.0, keep_static_below=0.1)
    weights = squared_weights({0.0: ALONE, 1.0: 1.0}, [0.0, 1.0, 2.0])
    over_time, _ = columns(known, config, True)
    static, _ = columns(Evidence(known.statistics, 4, False, None, weights), config, True)
    assert float(over_time[0]) < 0.1 * float(over_time[1])
    assert float(static[0]) == float(static[1])


def test_offsets_are_taken_for_times_that_count() -> None:
    rows = [noise(4096), noise(4096, seed=1).abs() * 0.3]  # the second is one-sided, and small
    known, config = evidence(rows, 4, True), TdqCalibConfig(asymmetric="auto", smoothing=0.0)
    first, second = (
        Evidence(known.statistics, 4, True, None, squared_weights(w, [0.0, 1.0]))
        for w in ({0.0: 1.0, 1.0: ALONE}, {0.0: ALONE, 1.0: 1.0})
    )
    assert not worth_an_offset(first, config, True)
    assert worth_an_offset(second, config, True)


def test_the_verdict_on_corrections_is_that_of_times_that_count() -> None:
    gains = torch.tensor([[1.0, -0.01, -0.01], [1.0, -0.01, -0.01]], dtype=torch.float64)
    assert _verdict(gains, torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64))[1] == pytest.approx(0.98 / 3)
    assert _verdict(gains, torch.tensor([1e-9, 1.0, 1.0], dtype=torch.float64))[1] == pytest.approx(-0.01, rel=1e-6)


#: Everything that errors of several times decide.
EVERYTHING: tuple[dict[str, Any], ...] = (
    {"bins": 1, "statistic": "mse"},
    {"bins": 1, "statistic": "mse", "correction": "auto", "asymmetric": "auto"},
    {"bins": "optimal", "max_bins": 2, "statistic": "output", "keep_static_below": 0.5},
    {"rounding": "compensated"},
    {"rounding": "auto"},
    {"correction": "static"},
)


@pytest.mark.parametrize("fields", EVERYTHING, ids=lambda fields: "-".join(map(str, fields.values())))
def test_equal_weights_change_nothing_to_the_last_bit_and_others_do(fields: dict[str, Any]) -> None:
    coarse = {"weight_bits": 3, "activation_bits": 4, "replay_samples": 8, **fields}
    plain = quantized(**coarse)
    assert same(plain, quantized(time_weights=EQUAL, **coarse))
    last = {time: 1.0 if time == TIMES[-1] else ALONE for time in TIMES}
    assert not same(plain, quantized(time_weights=last, **coarse))


def test_equal_weights_choose_the_same_for_channels() -> None:
    fields = {"weight_bits": 3, "activation_bits": 4, "channel_smoothing": "auto", "channel_shift": "auto"}
    plain = quantized(correction="auto", **fields)
    assert same(plain, quantized(correction="auto", time_weights=EQUAL, **fields))


def test_ways_of_smoothing_are_judged_at_times_that_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized()
    layer = SmoothedLayer("mix", model.get_submodule("mix"))
    replay = Replay(model, deliver_timestep(model, "timestep"), 1)
    settings, times = Settings((1.0,), (1.0,), False, False), [0.0, 1.0]
    trial = Trial(layer, [], settings, temporal=True, times=times, turns=replay.turns)
    trial.squares = torch.tensor([[1.0, 2.0, 10.0], [40.0, 20.0, 100.0]], dtype=torch.float64)
    assert trial.error(torch.tensor([1.0, 1.0], dtype=torch.float64)).tolist() == pytest.approx([0.5, 0.4])
    assert trial.error(torch.tensor([1.0, 0.01], dtype=torch.float64)).tolist() == pytest.approx([0.104, 0.202])

    found = {0: torch.tensor([[1.0, 10.0]]), 1: torch.tensor([[1.0, 1000.0]])}  # -10 and -30 dB
    monkeypatch.setattr(chosen_smoothing, "prediction_error", lambda *_, **__: found)
    for weights, expected in ((None, -20.0), ({0.0: 1.0, 1.0: ALONE}, -10.0), ({0.0: 1.0, 1.0: 3.0}, -28.0)):
        config = TdqCalibConfig(time_weights=weights)
        judge = chosen_smoothing._Judge(model, {}, replay, times, settings, config, {}, {}, {})
        assert judge() == pytest.approx(expected)


def test_of_a_layer_corrected_in_each_way_the_errors_at_times_that_count_are_added() -> None:
    gain, bias = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
    found = []
    for weights in ([1.0, 1.0], [1.0, 1e-12]):
        errors = correction_fit._Errors(nn.Linear(1, 1), gain, bias, torch.tensor(weights, dtype=torch.float64))
        for errors.row, right in enumerate((1.0, 2.0)):
            errors.order = (0.0,)
            errors(torch.ones(1, 1), torch.full((1, 1), right))
        found.append(errors.relative().tolist())
    assert found[0] == pytest.approx([0.25, 0.25 + 0.0625, 0.0])
    assert found[1] == pytest.approx([0.0, 0.0, 0.0], abs=1e-9)


def test_static_corrections_are_those_of_the_time_that_counts() -> None:
    fields: dict[str, Any] = {"weight_bits": 3, "activation_bits": 4}
    over_time = tdq.layer_correction(quantized(correction="per_step", **fields))
    last = {time: 1.0 if time == TIMES[-1] else ALONE for time in TIMES}
    static = tdq.layer_correction(quantized(correction="static", time_weights=last, **fields))
    assert over_time is not None
    assert static is not None
    for name in static.names:
        assert torch.allclose(static.gain[name][0], over_time.gain[name][0], atol=1e-6)  # rows ascend in time
        assert torch.allclose(static.bias[name][0], over_time.bias[name][0], atol=1e-6)


def test_corrections_alone_take_them_too() -> None:
    import modelopt.torch.quantization as mtq

    def corrected(**fields: Any) -> nn.Module:
        model = quantized(weight_bits=3, activation_bits=4)
        algorithm = {"method": "tdq_correct", "correction": "static", "progress": False, **fields}
        return mtq.calibrate(model, algorithm, loop(calls()))

    plain = corrected()
    assert same(plain, corrected(time_weights=EQUAL))
    assert not same(plain, corrected(time_weights={20.0: 1.0, 900.0: 10.0}))


# --- the field ---


def test_kept_by_recipes_and_in_saved_states(tmp_path: Path) -> None:
    weights = {999.0: 1.5, 1.25: 0.25, 0.0: 3.0}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"algorithm": {"time_weights": weights}}))
    assert tdq.recipe(str(file))["algorithm"]["time_weights"] == weights
    written = json.loads(json.dumps(TdqCalibConfig(time_weights=weights).model_dump(mode="json")))
    assert TdqCalibConfig(**written).time_weights == weights
    assert TdqCalibConfig(time_weights={"20": "0.5", "1e2": 1}).time_weights == {20.0: 0.5, 100.0: 1.0}

    model = quantized(bins=1, statistic="mse", time_weights=weights)
    mto.save(model, tmp_path / "model.pt")
    torch.manual_seed(0)
    restored = mto.restore(TinyDenoiser().eval(), tmp_path / "model.pt")
    assert same(model, restored)
    states = [mto.modelopt_state(each)["modelopt_state_dict"] for each in (model, restored)]
    for state in states:
        assert [mode[1]["config"]["time_weights"] for mode in state if "tdq" in mode[0]] == [weights]


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ({}, "no time has a weight.*one weight at least"),
        ({5.0: 0.0}, r"\{5.0: 0.0\}.*finite and positive.*small positive"),
        ({5.0: 1.0, 6.0: -1.0}, r"\{6.0: -1.0\}"),
        ({5.0: float("nan")}, "nan"),
        ({5.0: float("inf")}, "inf"),
        ({float("inf"): 1.0}, "inf"),
        ({"late": 1.0}, "time_weights"),
        ([1.0, 2.0], "time_weights.*Allowed"),
    ],
)
def test_what_is_no_weight_is_refused(weights: Any, told: str) -> None:
    with pytest.raises(TdqError, match=told) as caught:
        fast_config(time_weights=weights)
    assert caught.value.field == "time_weights"


def test_every_algorithm_that_adds_errors_of_times_has_the_field() -> None:
    from modelopt_tdq.config import ALGORITHMS

    having = {name for name, config in ALGORITHMS.items() if "time_weights" in config.model_fields}
    assert having >= {"tdq", "tdq_correct", "tdq_qat", "tdq_reconstruct"}
    assert copy.deepcopy(CalibrationFields(time_weights=EQUAL)).time_weights == EQUAL
