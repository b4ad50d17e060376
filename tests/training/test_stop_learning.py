"""A table that is set on a model that learns, and a model that stops to learn."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import pytest
import torch
from support.models import TinyDenoiser, calls, loop
from torch import nn
from training.test_qat import adam, batch, qat, train

import modelopt_tdq as tdq
from modelopt_tdq import TdqError
from modelopt_tdq.model.learning import find_learning
from modelopt_tdq.training.learned import learned_quantizers
from modelopt_tdq.training.weights import LearnedWeightQuantizer

INTERVALS = ["mlp", "thin", "table", "static"]


def _learned(intervals: str, **fields: object) -> nn.Module:
    model = qat(intervals=intervals, dropout=0.0, **fields)
    train(model, adam(model), range(3))
    return model


def _doubled(model: nn.Module) -> tdq.ScaleTable:
    table = tdq.scale_table(model)
    return dataclasses.replace(table, scale=table.scale * 2)


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    mto.save(model, file)
    file.seek(0)
    return mto.restore(TinyDenoiser().eval(), file)


KEEPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "eval": lambda m: m.eval(),
    "half and back": lambda m: m.half().float().eval(),
    "copied": lambda m: copy.deepcopy(m).eval(),
    "saved": lambda m: _saved(m).eval(),
    "other weights of its own": lambda m: (m.load_state_dict(copy.deepcopy(m.state_dict())), m.eval())[1],
}


@pytest.mark.parametrize("intervals", INTERVALS)
def test_a_table_that_is_set_stays(intervals: str) -> None:
    learned = _learned(intervals)  # in training mode, and it has learned since its table was made
    for what, made in KEEPS.items():
        model = copy.deepcopy(learned)
        doubled = _doubled(model)
        tdq.set_scale_table(model, doubled)
        model = made(model)
        before = model(*batch(0)[:2])
        assert torch.equal(tdq.scale_table(model).scale, doubled.scale), what
        assert torch.equal(model(*batch(0)[:2]), before), what
        quantizer = learned_quantizers(model)["conv1.input_quantizer"]
        assert torch.equal(quantizer._scale, doubled.scale[:, doubled.names.index("conv1.input_quantizer")]), what


@pytest.mark.parametrize("intervals", INTERVALS)
@pytest.mark.parametrize("saved", [False, True])
def test_training_does_not_undo_it_unasked(intervals: str, saved: bool) -> None:
    model = _learned(intervals)
    learned = tdq.scale_table(model)
    doubled = _doubled(model)
    tdq.set_scale_table(model, doubled)
    model = _saved(model) if saved else model
    model.train()
    with pytest.raises(TdqError, match=r"materialize\(model\).*stop_learning\(model\)"):
        model(*batch(0)[:2])
    assert torch.equal(tdq.scale_table(model).scale, doubled.scale)
    # each cure helps
    went_on = copy.deepcopy(model)
    tdq.materialize(went_on)
    assert torch.equal(tdq.scale_table(went_on).scale, learned.scale)
    losses = train(went_on, adam(went_on), range(3))
    assert all(torch.isfinite(torch.tensor(losses)))
    assert not torch.equal(tdq.scale_table(went_on).scale, learned.scale)
    tdq.stop_learning(model)
    train(model, torch.optim.SGD(model.parameters(), lr=1e-3), range(3))
    assert torch.equal(tdq.scale_table(model).scale, doubled.scale)


@pytest.mark.parametrize(
    ("intervals", "scheme"),
    [("mlp", "lsq"), ("mlp", "duq"), ("mlp", "qil"), ("thin", "qil"), ("table", "duq"), ("static", "lsq")],
)
def test_a_model_that_stops_to_learn_computes_the_same(intervals: str, scheme: str) -> None:
    model = _learned(intervals, scheme=scheme)
    expected = [copy.deepcopy(model).eval()(*call) for call in calls()]
    before = set(dict(model.named_parameters()))
    tdq.stop_learning(model)
    assert find_learning(model) is None
    assert not learned_quantizers(model)
    assert not any(isinstance(m, LearnedWeightQuantizer) for m in model.modules())
    assert {
        n for n in before - set(dict(model.named_parameters())) if "tdq_intervals" not in n and "quantizer" not in n
    } == set()
    model.eval()
    restored = _saved(model)
    for call, output in zip(calls(), expected, strict=True):
        # the weights are quantized by ModelOpt again, which multiplies where ours divides
        assert float((model(*call) - output).norm() / output.norm()) < 0.02
        assert torch.equal(restored(*call), model(*call))
    with pytest.raises(TdqError, match="does not learn"):
        tdq.stop_learning(model)


def test_scales_that_are_measured_cannot_be_set_nor_kept() -> None:
    model = qat(intervals="dynamic_absmax")
    torch.manual_seed(0)
    plain = mtq.quantize(TinyDenoiser().eval(), tdq.make_config(4, 4, statistic="max", progress=False), loop(calls()))
    for use in (lambda: tdq.set_scale_table(model, tdq.scale_table(plain)), lambda: tdq.stop_learning(model)):
        with pytest.raises(TdqError, match="measured on the activation"):
            use()
    assert find_learning(model) is not None


def test_a_scale_set_by_another_algorithm_is_refused() -> None:
    model = _learned("static").eval()
    with pytest.raises(TdqError, match=r"conv1\.input_quantizer.*stop_learning\(model\)"):
        mtq.calibrate(model, "max", loop(calls()))
    tdq.stop_learning(model)
    mtq.calibrate(model, "max", loop(calls()))
    assert len(tdq.scale_table(model)) == 1
