"""Quantization-aware training: what is used when, what learns, and that it survives saving, copying and resuming."""

from __future__ import annotations

import copy
import io
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import pytest
import torch
from support.models import FAMILIES, TIMES, TinyDenoiser, at, calls, loop, noise
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq import TdqError
from modelopt_tdq.core.fake_quant import fake_quantize
from modelopt_tdq.training.learned import learned_intervals, learned_quantizers

_FAST: dict[str, Any] = {"statistic": "max", "weights": "max", "progress": False, "method": "tdq_qat"}


def qat(model: nn.Module | None = None, bits: int = 4, **fields: Any) -> nn.Module:
    """A TinyDenoiser that learns, in training mode."""
    torch.manual_seed(0)
    model = TinyDenoiser() if model is None else model
    made = mtq.quantize(model, tdq.make_config(bits, bits, **{**_FAST, **fields}), loop(calls()))
    return made.train()


def batch(seed: int, samples: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, times and targets."""
    generator = torch.Generator().manual_seed(seed)
    times = torch.randint(0, 1000, (samples,), generator=generator)
    return noise(samples, 3, 8, 8, seed=seed), times, noise(samples, 3, 8, 8, seed=seed + 1000)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """An ordinary training loop; the losses."""
    losses = []
    for step in steps:
        torch.manual_seed(step)  # dropout
        x, time, target = batch(step)
        loss = (model(x, time) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def error(model: nn.Module) -> Tensor:
    """The loss on the first batch."""
    x, time, target = batch(0)
    return (model(x, time) - target).square().mean().detach()


def adam(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW(tdq.parameter_groups(model, lr))


#: Every scheme on a network over time, and every other interval with a scheme of one scale and one of two.
PAIRS = [("mlp", scheme) for scheme in ("lsq", "pact", "nipq", "duq", "qil")]
PAIRS += [(intervals, scheme) for intervals in ("thin", "table", "static") for scheme in ("lsq", "duq")]


@pytest.mark.parametrize(("intervals", "scheme"), PAIRS)
def test_every_scheme_learns_with_every_interval(intervals: str, scheme: str) -> None:
    model = qat(intervals=intervals, scheme=scheme)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = adam(model)
    losses = train(model, optimizer, range(12))
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    assert float(error(model)) < losses[0]
    still = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    # a lower end that no value reaches has no gradient
    assert [n for n in still if not n.endswith("_learned_lower")] == []
    assert bool(tdq.scale_table(model).is_static.all()) == (intervals == "static")


@pytest.mark.parametrize("intervals", ["dynamic_absmax", "dynamic_statistics", "dynamic_statistics_time"])
def test_dynamic_baselines_train_and_have_no_table(intervals: str, tmp_path: Any) -> None:
    model = qat(intervals=intervals)
    losses = train(model, adam(model), range(12))
    assert float(error(model)) < losses[0]
    assert bool(torch.isfinite(model.eval()(*batch(0)[:2])).all())
    for use in (
        lambda: tdq.scale_table(model),
        lambda: tdq.materialize(model),
        lambda: tdq.export_onnx(model, tmp_path / "m.onnx", {"sample": noise(1, 3, 8, 8), "timestep": torch.ones(1)}),
    ):
        with pytest.raises(TdqError, match="measured on the activation"):
            use()


def test_a_dynamic_baseline_has_no_scheme() -> None:
    with pytest.raises(TdqError, match="measured, not learned"):
        tdq.make_config(4, 4, method="tdq_qat", intervals="dynamic_absmax", scheme="pact")


@pytest.mark.parametrize("field", ["intervals", "scheme", "encoding", "initialization"])
def test_unknown_choices_name_the_known_ones(field: str) -> None:
    with pytest.raises(TdqError, match="Allowed: ") as raised:
        tdq.make_config(4, 4, method="tdq_qat", **{field: "cosine"})
    assert raised.value.field == field


@pytest.mark.parametrize("scheme", ["lsq", "duq"])
@pytest.mark.parametrize("intervals", ["mlp", "table"])
def test_eval_uses_the_table_and_the_table_is_the_source(intervals: str, scheme: str) -> None:
    model = qat(intervals=intervals, scheme=scheme, dropout=0.0)
    train(model, adam(model), range(6))
    learned = learned_intervals(model)
    assert learned.source is not None
    model.eval()
    table = tdq.scale_table(model)
    assert table.timesteps.tolist() == sorted(TIMES)
    intervals_at_rows = learned.source(table.timesteps).detach()
    for column, (name, quantizer) in enumerate(learned_quantizers(model).items()):
        made = quantizer.deployed(intervals_at_rows[:, column])
        assert torch.equal(table.scale[:, column], made.scale), name
    x = noise(2, 3, 8, 8) * 3
    quantizer = model.get_submodule("conv1.input_quantizer")
    column = list(learned_quantizers(model)).index("conv1.input_quantizer")
    for row, time in enumerate(table.timesteps):
        made = quantizer.deployed(intervals_at_rows[row : row + 1, column])
        expected = fake_quantize(x, made.scale, made.offset, 4, made.dequant_scale, made.dequant_offset)
        with at(model, time):
            assert torch.equal(quantizer(x), expected)


def test_training_uses_the_times_of_the_samples() -> None:
    model = qat(intervals="table", dropout=0.0)
    seen: list[Tensor] = []
    model.get_submodule("conv1").register_forward_pre_hook(lambda m, a: None)
    x, time, _ = batch(0, samples=3)
    model(x, time).sum()
    timestep = next(iter(learned_quantizers(model).values()))._timestep
    assert timestep.last_intervals is not None
    seen.append(timestep.last_intervals)
    table = tdq.scale_table(copy.deepcopy(model).eval()).resample(time)
    assert seen[0].shape == (3, 3)
    order = time.argsort()
    torch.testing.assert_close(seen[0][order].detach(), table.scale)


def test_rows_can_be_chosen() -> None:
    assert tdq.scale_table(qat(rows=11).eval()).timesteps.tolist() == [float(t) for t in range(11)]
    assert tdq.scale_table(qat(rows=[5.0, 1.0]).eval()).timesteps.tolist() == [1.0, 5.0]
    with pytest.raises(TdqError, match="no times"):
        qat(rows=[])


@pytest.mark.parametrize("how", ["optimizer", "data", "load"])
def test_the_table_follows_the_source(how: str) -> None:
    """Also where an EMA copies its averages into `.data` while the model is in eval mode."""
    model = qat()
    model.eval()
    model(*batch(0)[:2])
    before = tdq.scale_table(model)
    other = qat()
    train(other, adam(other), range(4))
    if how == "optimizer":
        train(model.train(), adam(model), range(4))
        model.eval()
    elif how == "data":
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.data.copy_(theirs.data)
    else:
        model.load_state_dict(other.eval().state_dict())
    model(*batch(0)[:2])
    after = tdq.scale_table(model)
    assert not torch.equal(before.scale, after.scale)
    other.eval()(*batch(0)[:2])
    assert torch.equal(after.scale, tdq.scale_table(other).scale)


def test_the_table_follows_every_parameter_of_the_source() -> None:
    """Not only those next to its output."""
    model = qat()
    train(model, adam(model), range(4))
    model.eval()(*batch(0)[:2])
    source = learned_intervals(model).source
    assert source is not None
    seen = source.fingerprint()
    assert torch.equal(seen, copy.deepcopy(source).fingerprint())
    first, *others = source.parameters()
    for parameter in others:
        before = parameter.data.clone()
        parameter.data.view(-1)[-1] += 1e-6 + parameter.data.abs().max()
        assert (source.fingerprint() != seen).sum() == 1
        parameter.data.copy_(before)
    before = tdq.scale_table(model).scale
    first.data.mul_(-3)
    model(*batch(0)[:2])
    after = tdq.scale_table(model).scale
    assert not torch.equal(before, after)
    assert torch.equal(
        after, torch.stack([source(learned_intervals(model).rows)[:, i] for i in range(after.shape[1])], 1)
    )


def test_a_state_dict_holds_the_table_of_the_source_it_holds() -> None:
    model = qat(dropout=0.5)
    train(model, adam(model), range(3))
    state = model.state_dict()  # in training mode, no call since the last step
    scale = state["conv1.input_quantizer._scale_bits"].view(torch.float32)
    learned = learned_intervals(model)
    assert learned.source is not None
    column = learned_quantizers(model)["conv1.input_quantizer"]._column
    assert torch.equal(scale, learned.eval().source(learned.rows)[:, column])
    assert float(scale.std()) > 0


@pytest.mark.parametrize("intervals", ["mlp", "table", "dynamic_statistics_time"])
def test_resuming_continues_the_same_trajectory(intervals: str) -> None:
    model = qat(intervals=intervals, scheme="lsq")
    optimizer = adam(model)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    mto.save(model, file)
    saved = copy.deepcopy(optimizer.state_dict())
    expected = train(model, optimizer, range(3, 6))

    file.seek(0)
    torch.manual_seed(123)
    restored = mto.restore(TinyDenoiser(), file).train()
    again = adam(restored)
    again.load_state_dict(saved)
    assert train(restored, again, range(3, 6)) == expected
    x, time, _ = batch(9)
    assert torch.equal(restored.eval()(x, time), model.eval()(x, time))


def test_a_checkpoint_of_other_settings_is_refused_and_nothing_is_loaded() -> None:
    state = qat(intervals="mlp").state_dict()
    model = qat(intervals="mlp", dropout=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(TdqError, match=r"trained with 0\.2") as raised:
        model.load_state_dict(state)
    assert raised.value.field == "dropout"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    qat(intervals="mlp").load_state_dict(state)


def test_a_copy_learns_by_itself() -> None:
    model = qat()
    model(*batch(0)[:2])
    other = copy.deepcopy(model)
    train(other, adam(other), range(3))
    x, time, _ = batch(5)
    fresh = qat()
    assert torch.equal(model.eval()(x, time), fresh.eval()(x, time))
    assert not torch.equal(other.eval()(x, time), fresh(x, time))


def test_calibrating_again_starts_from_plain_quantizers() -> None:
    model = qat()
    train(model, adam(model), range(3))
    mtq.calibrate(model.eval(), tdq.make_config(4, 4, **{**_FAST, "method": "tdq"})["algorithm"], loop(calls()))
    assert learned_quantizers(model) == {}
    assert not [n for n, _ in model.named_parameters() if "quantizer" in n or "tdq" in n]
    assert tdq.scale_table(model).scale.shape == (4, 3)
    with pytest.raises(TdqError, match="does not learn"):
        tdq.parameter_groups(model, 1e-3)


def test_parameter_groups_follow_the_recipe() -> None:
    model = qat(scheme="duq")
    groups = {group["name"]: group for group in tdq.parameter_groups(model, 1e-3, weight_decay=0.02)}
    assert {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()} == {
        "model": (1e-3, 0.02),
        "interval_mlp": (1e-3, 0.02),
        "scales": (1e-4, 0.0),
    }
    names = {id(p): n for n, p in model.named_parameters()}
    inside = {group: {names[id(p)] for p in g["params"]} for group, g in groups.items()}
    assert sum(map(len, inside.values())) == len(names)
    assert all("tdq_intervals" in n for n in inside["interval_mlp"])
    assert len([n for n in inside["scales"] if n.endswith("weight_scale")]) == 3
    assert len([n for n in inside["scales"] if n.endswith("_learned_output")]) == 3
    static = {g["name"]: g for g in tdq.parameter_groups(qat(intervals="static"), 1e-3)}
    assert set(static) == {"model", "scales"}
    assert len(static["scales"]["params"]) == 1 + 3


def test_pact_has_a_penalty_and_lsq_none() -> None:
    model = qat(scheme="pact")
    with pytest.raises(TdqError, match="training mode"):
        tdq.interval_penalty(model)
    model(*batch(0)[:2])
    assert float(tdq.interval_penalty(model).detach()) > 0
    model = qat()
    model(*batch(0)[:2])
    assert float(tdq.interval_penalty(model)) == 0.0


def test_nan_is_traced_to_its_quantizer_and_time() -> None:
    model = qat()
    x, time, _ = batch(0)
    x = x.clone()
    x[1] = torch.nan
    loss = model(x, time).square().mean()
    with pytest.raises(TdqError, match=rf"at times \[{float(time[1])}\]") as raised:
        tdq.require_finite(loss, model, x, time)
    assert raised.value.value == "conv1.input_quantizer"
    tdq.require_finite(torch.tensor(1.0), model, x, time)
    x, time, _ = batch(0)
    with pytest.raises(TdqError, match="every quantizer's input and output is finite"):
        tdq.require_finite(torch.tensor(torch.nan), model, x, time)


def test_bf16_autocast() -> None:
    model = qat(intervals="mlp")
    x, time, target = batch(0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = (model(x, time).float() - target).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_training_only_a_part_is_refused() -> None:
    model = qat().eval()
    model.get_submodule("conv1").train()
    with pytest.raises(TdqError, match="Call train"):
        model(*batch(0)[:2])


@pytest.mark.parametrize("name", ["unet", "unet_condition", "dit"])
def test_attention_and_every_layer_of_diffusers_models_train(name: str) -> None:
    family = FAMILIES[name]
    model = family.make()
    mtq.quantize(model, tdq.make_config(4, 4, **_FAST), family.forward_loop())
    model.train()
    arguments = family.data()[0]
    output = model(**arguments)
    output = output[0] if isinstance(output, tuple) else output.sample
    output.square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


def test_a_restored_model_uses_the_table_that_was_saved() -> None:
    """And not one that this machine would make, whose last bits may differ."""
    model = qat(dropout=0.0)
    train(model, adam(model), range(3))
    file = io.BytesIO()
    mto.save(model.eval(), file)
    file.seek(0)
    restored = mto.restore(TinyDenoiser(), file).eval()
    quantizer = learned_quantizers(restored)["conv1.input_quantizer"]
    marked = quantizer._scale * 1.0001
    quantizer.set_rows(quantizer._timesteps, marked, quantizer.offset)
    restored(*batch(0)[:2])
    assert torch.equal(quantizer._scale, marked)
    restored.train()(*batch(0)[:2])
    restored.eval()(*batch(0)[:2])
    assert not torch.equal(quantizer._scale, marked)  # it has learned since


@pytest.mark.parametrize("cast", ["half", "rounded"])
def test_scales_stay_exact_in_half_precision(cast: str) -> None:
    """`.half()` leaves the source alone; a source that was loaded in half precision leaves the table alone."""
    model = qat(dropout=0.0)
    train(model, adam(model), range(3))
    expected = tdq.scale_table(copy.deepcopy(model).eval()).scale
    if cast == "half":
        model.half()  # before its table was ever made
    else:
        model.eval()(*batch(0)[:2])
        for parameter in learned_intervals(model).parameters():
            parameter.data = parameter.data.half()
    model.eval()(batch(0)[0].to(model.conv_in.weight.dtype), batch(0)[1])
    assert torch.equal(tdq.scale_table(model).scale, expected)
    if cast == "rounded":
        with pytest.raises(TdqError, match="learn in float32 only"):
            model.train()(*batch(0)[:2])
