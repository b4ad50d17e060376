"""Calls of another kind than the calibrated ones: looked at when they come, refused where the table is not right."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import pytest
import torch
from support.models import SMALL_UNET_CONDITION, TIMES, fast_config, noise
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import modelopt_tdq as tdq
from modelopt_tdq.temporal_features import guard
from modelopt_tdq.temporal_features.module import FEATURES
from modelopt_tdq.temporal_features.proof import Proof

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad() -> Any:
    with torch.no_grad():
        yield


class Net(nn.Module):
    """A condition that calls may leave out: "sample" adds it to the sample only, "time" to what the head takes."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.time, self.head, self.last = (nn.Linear(4, 4) for _ in range(3))
        self.where = where

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        condition: Tensor | None = None,
        mode: str = "plain",
        options: dict[str, Any] | None = None,
    ) -> Tensor:
        hidden = self.time(timestep.reshape(-1, 1).expand(-1, 4) / 1000)
        if condition is not None and self.where == "sample":
            sample = sample + condition[:, None]
        if condition is not None and self.where == "time":
            hidden = hidden + condition
        if self.where == "twice" and condition is not None:
            hidden = 2 * hidden
        if self.where == "middle" and condition is not None:
            sample = sample * hidden[:, None]
        if mode == "strong" or (options or {}).get("strong"):
            hidden = 3 * hidden
        output: Tensor = self.last(sample + self.head(hidden)[:, None])
        return output


def call(time: float = 600.0, seed: int = 9, **given: Any) -> dict[str, Any]:
    return {"sample": noise(2, 6, 4, seed=seed), "timestep": torch.tensor(time), **given}


def maintained(where: str, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    fast = {"statistic": "max", "weights": "max", "protect_steps": False, "progress": False}
    algorithm = {"method": "tdq_temporal", "maintenance": "cache", "cache_bits": 32, **fast, **fields}

    def forward_loop(model: nn.Module) -> None:
        for index, time in enumerate(TIMES):
            model(**call(time, index))

    return mtq.quantize(Net(where).eval(), {**fast_config(high_precision=()), "algorithm": algorithm}, forward_loop)


def without_table(model: nn.Module) -> nn.Module:
    layers = copy.deepcopy(model)
    tdq.remove_features(layers)
    return layers


def test_a_call_with_what_the_calibration_left_out_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, looked = maintained("sample"), []
    search = guard.find_temporal_block

    def counted(*args: Any) -> Any:
        looked.append(args)
        return search(*args)

    monkeypatch.setattr(guard, "find_temporal_block", counted)
    layers = without_table(model)
    for batch in (2, 3):
        given = call(condition=noise(batch, 4), sample=noise(batch, 10, 4), timestep=torch.full((batch,), 600.0))
        assert torch.equal(model(**given), layers(**given))
    assert len(looked) == 1
    model(**call())
    model(**call(sample=noise(5, 3, 4)))
    assert len(looked) == 1
    copy.deepcopy(model)(**call(condition=noise(2, 4)))
    assert len(looked) == 1


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "a tensor": ("time", {"condition": noise(2, 4)}, "output of `head` depends on `condition` as well as on the time"),
    "that there is a tensor": ("twice", {"condition": noise(2, 4)}, "output of `head` is computed in another way"),
    "what is superseded": (
        "middle",
        {"condition": noise(2, 4)},
        "needs the output of `time`, which the table does not",
    ),
    "a text": ("time", {"mode": "strong"}, "output of `head` depends on `mode` as well as on the time"),
    "a flag in a mapping": (
        "time",
        {"options": {"strong": True}},
        "depends on `options.strong` as well as on the time",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_call_for_which_the_table_is_not_right_is_refused(what: str, tmp_path: Path) -> None:
    where, given, problem = WRONG[what]
    model = maintained(where)
    expected = model(**call())
    for _ in range(2):
        with pytest.raises(tdq.TdqError) as error:
            model(**call(**given))
        assert problem in error.value.problem
        assert error.value.field.partition(".")[0] in given
        assert "calibrate it with such calls" in error.value.cure
    assert torch.equal(model(**call()), expected)
    with pytest.raises(tdq.TdqError) as error:
        tdq.export_onnx(model, tmp_path / "model.onnx", call(**given))
    assert problem in error.value.problem
    assert not list(tmp_path.iterdir())


def test_a_text_that_makes_no_difference_is_taken() -> None:
    model = maintained("time")
    assert torch.equal(model(**call(mode="other")), model(**call()))


def test_with_dropped_layers_nobody_can_tell() -> None:
    model = maintained("sample", keep_layers=False)
    model(**call(sample=noise(3, 9, 4)))
    with pytest.raises(tdq.TdqError, match=r"condition.*made from calls with no `condition`.*layers.*were dropped"):
        model(**call(condition=noise(2, 4)))


def test_every_form_of_the_time_is_the_same_kind_of_call() -> None:
    model = maintained("sample")
    layers = without_table(model)
    for time in (torch.tensor(600), torch.tensor([600.0]), torch.tensor([600, 300])):
        given = {**call(condition=noise(2, 4)), "timestep": time}
        model._modules[FEATURES].proofs.clear()  # type: ignore[union-attr]
        assert torch.equal(model(**given), layers(**given))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_in_inference_mode_and_with_gradients(mode: Any) -> None:
    model = maintained("sample")
    with mode():
        given = call(condition=noise(2, 4))
        assert torch.equal(model(**given), without_table(model)(**given))


def test_hooks_of_others_see_their_own_calls_only() -> None:
    model, seen = maintained("sample"), []
    handle = model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    given = call(condition=noise(2, 4))
    model(**given)
    assert len(seen) == 1
    assert seen[0]["sample"] is given["sample"]
    handle.remove()
    model(**call(condition=noise(2, 4)))
    assert len(seen) == 1


def test_what_was_proven_is_saved_with_the_table(tmp_path: Path) -> None:
    model = maintained("time")
    proof = Proof.from_json(tdq.feature_table(model).metadata["proof"])
    assert {"sample.shape[0]", "sample.shape[1]"} == set(proof.tried)
    assert proof.facts == {"sample": "a 3-D tensor", "sample.shape[2]": "4", "mode": "plain"}
    assert proof.differences(proof.facts) == []
    assert proof.differences({**proof.facts, "mode": "x", "condition": "a 2-D tensor"}) == ["mode", "condition"]
    restored = mto.restore_from_modelopt_state(Net("time").eval(), mto.modelopt_state(model))
    restored.load_state_dict(model.state_dict())
    tdq.feature_table(model).save(tmp_path / "features")
    given = without_table(model)
    tdq.set_feature_table(given, tdq.FeatureTable.load(tmp_path / "features.safetensors"))
    for each in (restored, given, copy.deepcopy(model)):
        assert torch.equal(each(**call()), model(**call()))
        with pytest.raises(tdq.TdqError, match="depends on `condition` as well as on the time"):
            each(**call(condition=noise(2, 4)))


def test_without_features_nothing_is_looked_at() -> None:
    model = maintained("time")
    hooks = len(model._forward_pre_hooks)
    tdq.remove_features(model)
    assert len(model._forward_pre_hooks) == hooks - 1
    model(**call(condition=noise(2, 4)))
    pickle.loads(pickle.dumps(guard._Guard()))


def test_a_compiled_model_is_one_graph() -> None:
    torch._dynamo.reset()
    model = maintained("sample")
    mtq.fold_weight(model)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    compiled(**call())
    frames = counter.frame_count
    for time in TIMES:
        assert torch.equal(compiled(**call(time)), model(**call(time)))
    assert counter.frame_count == frames
    torch._dynamo.reset()


def test_residuals_of_a_control_net_are_taken() -> None:
    """A UNet that is calibrated alone serves with a ControlNet: its residuals do not reach the temporal features."""
    torch.manual_seed(0)
    family = SMALL_UNET_CONDITION
    fast = {"statistic": "max", "weights": "max", "protect_steps": False, "progress": False}
    algorithm = {"method": "tdq_temporal", "maintenance": "cache", "cache_bits": 32, **fast}

    def forward_loop(model: nn.Module) -> None:
        for arguments in family.data(times=(600.0, 20.0)):
            model(**arguments)

    model = mtq.quantize(family.make().eval(), {**fast_config(), "algorithm": algorithm}, forward_loop)
    given = {
        **family.data(times=(600.0,))[0],
        "down_block_additional_residuals": (noise(4, 8, 8, 8), noise(4, 8, 8, 8)),
        "mid_block_additional_residual": noise(4, 8, 8, 8),
    }
    assert torch.equal(model(**given).sample, without_table(model)(**given).sample)
