"""What `protect_steps` asks of the model: calls no larger than those of the calibration, and no more than it takes."""

from __future__ import annotations

from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from support.models import TIMES, TinyDenoiser, calls, fast_config, loop
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.calibration import protect

FIELDS = {"statistic": "mse", "protect_steps": True, "smoothing": 0.0}


class _Calls:
    """Forward pre-hook: batch sizes of the calls of a model, and how many were in full precision."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.exact = 0

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.sizes.append(len(args[0] if args else kwargs["sample"]))
        self.exact += not module.conv1.input_quantizer._if_quant


def _quantized(model: nn.Module, forward_loop: Any, bits: int = 8) -> tuple[Tensor, _Calls, dict[int, Tensor]]:
    """The scales, the calls, and the outputs that were taken from the calibration."""
    counted, taken = _Calls(), {}
    model.register_forward_pre_hook(counted, with_kwargs=True)
    original = protect.recorded_outputs

    def recorded(*args: Any) -> dict[int, Tensor]:
        taken.update(original(*args))
        return dict(taken)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protect, "recorded_outputs", recorded)
        mtq.quantize(model, fast_config(activation_bits=bits, **FIELDS), forward_loop)
    return tdq.scale_table(model).scale, counted, taken


def _model() -> nn.Module:
    torch.manual_seed(0)
    return TinyDenoiser().eval()


def test_outputs_of_the_calibration_are_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protect, "_clear", lambda *_: set())
    scale, counted, _ = _quantized(_model(), loop(calls(samples=4, batch=2)))
    assert max(counted.sizes) == 2
    calibration, apart, same, judged = 2 * len(TIMES), 1, 2, 2 * 2 * len(TIMES)
    assert len(counted.sizes) == calibration + apart + same + judged
    monkeypatch.setattr(protect, "_SAME", -1.0)
    expected, more, nothing = _quantized(_model(), loop(calls(samples=4, batch=2)))
    assert not nothing
    assert more.exact > counted.exact
    assert torch.equal(scale, expected)


def test_few_samples_are_judged_where_the_verdict_is_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    found, clear = {}, set[int]()
    original = protect._clear

    def seen(*given: Any) -> set[int]:
        clear.update(original(*given))
        return set(clear)

    for name, own in {"few": seen, "all": lambda *_: set()}.items():
        monkeypatch.setattr(protect, "_clear", own)
        scale, counted, _ = _quantized(_model(), loop(calls(samples=8, batch=2)), 4)
        found[name] = scale, sum(counted.sizes)
    assert len(clear) in (1, 2, 3)  # or this test shows nothing
    assert found["all"][1] - found["few"][1] == 2 * (8 - 2) * len(clear)
    assert torch.equal(found["few"][0], found["all"][0])


def test_clear_is_what_all_rows_together_leave_no_doubt_of() -> None:
    static = {row: torch.full((2,), 4.0, dtype=torch.float64) for row in range(5)}
    temporal = {
        0: torch.tensor([3.0, 3.1]),
        1: torch.tensor([5.0, 5.1]),  # clearly worse
        2: torch.tensor([3.9, 4.0]),  # within the deviation of the others
        3: torch.tensor([3.0, 2.9]),
        4: torch.tensor([3.9, 2.0]),  # better in both, and by very different amounts
    }
    assert protect._clear(static, temporal) == set()  # the last row makes all deviations large
    del static[4]
    assert protect._clear(static, temporal) == {0, 1, 3}
    del static[3]
    assert protect._clear(static, temporal) == set()  # three degrees of freedom


def test_they_are_those_of_the_samples_in_the_order_of_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, references = _model(), []
    monkeypatch.setattr(protect, "_clear", lambda *_: set())
    original = protect.prediction_error

    def spied(model: nn.Module, replay: Any, times: Any, known: dict[int, Tensor], *rest: Any, **named: Any) -> Any:
        for number, batch in enumerate(replay.batches(times, most=named["most"])):
            references.append((known[number], plain(**batch.call)))
        return original(model, replay, times, known, *rest, **named)

    monkeypatch.setattr(protect, "prediction_error", spied)
    _quantized(_model(), loop(calls(samples=6, batch=3)))
    assert len(references) == 2 * 2 * len(TIMES)
    for found, expected in references:
        torch.testing.assert_close(found, expected)


class _Dropping(TinyDenoiser):
    def forward(self, sample: Tensor, timestep: Tensor | float, context: Tensor | None = None) -> Tensor:
        return nn.functional.dropout(super().forward(sample, timestep, context), 0.1)


def test_not_of_a_model_that_draws_random_numbers() -> None:
    torch.manual_seed(0)
    assert not _quantized(_Dropping().eval(), loop(calls()))[2]


def test_not_of_a_calibration_in_other_circumstances() -> None:
    def forward_loop(model: nn.Module) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loop(calls())(model)

    def late(model: nn.Module) -> None:
        """The last times of a trajectory run with other weights, as experts or adapters do."""
        for sample, time in calls():
            weight = model.conv_out.weight.data
            model.conv_out.weight.data = weight * (1.5 if time < 100 else 1.0)
            model(sample, time)
            model.conv_out.weight.data = weight

    for other in (forward_loop, late):
        scale, _, taken = _quantized(_model(), other)
        assert not taken
        assert bool(scale.isfinite().all())
