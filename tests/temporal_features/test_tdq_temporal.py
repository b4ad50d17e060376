"""The algorithm: what it leaves in the model, what it refuses, what is saved, and other algorithms around it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from support.models import FAMILIES, TinyDenoiser, calls, fast_config, loop, noise
from support.once import Once
from support.processes import run_fresh
from support.slow import slow_but
from support.unchanged import picture, same
from temporal_models import CASES
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq import FeatureTable, TdqError
from modelopt_tdq.model.call import first_output
from modelopt_tdq.temporal_features.runtime import FEATURES, has_features

UNET = FAMILIES["unet"]
TWENTY = torch.linspace(0.0, 950.0, 20).tolist()
MLP = ("time_embedding.linear_1", "time_embedding.linear_2")


def unet() -> nn.Module:
    """With five heads."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    return UNet2DModel(sample_size=8, layers_per_block=1, norm_num_groups=4, add_attention=False, **blocks).eval()  # type: ignore[no-any-return]


def fields(**algorithm: Any) -> dict[str, Any]:
    """Of the algorithm: fast, without progress bars."""
    return {
        "method": "tdq_temporal",
        "iterations": 4,
        "progress": False,
        "weights": "max",
        "correction": "none",
        **algorithm,
    }


def again(model: nn.Module, **algorithm: Any) -> nn.Module:
    """Calibrated once more, in the same way."""
    made: nn.Module = mtq.calibrate(model, config(**algorithm)["algorithm"], UNET.forward_loop())
    return made


def config(**algorithm: Any) -> dict[str, Any]:
    return fast_config(**fields(**algorithm))


once = Once()


def quantized(batch: int = 2, **algorithm: Any) -> nn.Module:
    return once((batch, algorithm), lambda: mtq.quantize(unet(), config(**algorithm), UNET.forward_loop(batch)))


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    """Quantized, with temporal layers in full precision."""
    return mtq.quantize(unet(), fast_config(), UNET.forward_loop())


@pytest.fixture(scope="module")
def auto() -> nn.Module:
    return quantized(weight_bits=4, activation_bits=4)


@torch.no_grad()
def outputs(model: nn.Module, times: list[float] | None = None) -> list[Tensor]:
    """At a calibrated time, between two, and outside of them."""
    times = [900.0, 777.0, 0.0] if times is None else times
    return [first_output(model(noise(2, 3, 8, 8, seed=5), torch.tensor(time))) for time in times]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@torch.no_grad()
def seen(model: nn.Module, name: str, time: float) -> Tensor:
    """What a layer gives in a call of the model."""
    found: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(lambda module, args, output: found.append(output[0]))
    model(noise(2, 3, 8, 8), torch.tensor(time))
    hook.remove()
    return found[0]


def test_every_feature_has_a_row_per_calibrated_time_and_nothing_else_is_left_to_run(auto: nn.Module) -> None:
    table = tdq.feature_table(auto)
    heads = [name for name, _ in auto.named_modules() if name.endswith("time_emb_proj")]
    assert set(table.features) == set(heads)
    assert torch.equal(table.timesteps, tdq.scale_table(auto).timesteps)
    metadata = table.metadata
    assert metadata["superseded"].keys() == set(MLP)
    assert (metadata["parameters"], metadata["multiply_adds"]) == (2664, 2560)
    assert (metadata["weight_bits"], metadata["activation_bits"], metadata["cache_bits"]) == (4, 4, 4)
    for measure in ("relative_squared_error", "cosine_similarity"):
        assert metadata[measure].keys() == {"naive", "tib", "cache", "chosen"}
        assert all(len(row) == 4 for rows in metadata[measure].values() for row in rows.values())
    for name in (*heads, *MLP):
        layer = auto.get_submodule(name)
        assert not layer.weight_quantizer.is_enabled
        assert not layer.input_quantizer.is_enabled


def test_the_errors_that_it_tells_are_those_of_the_layers(auto: nn.Module) -> None:
    table, model = tdq.feature_table(auto), unet()
    for name, told in table.metadata["relative_squared_error"]["chosen"].items():
        for row, time in enumerate(table.timesteps.tolist()):
            exact, made = seen(model, name, time).double(), seen(auto, name, time).double()
            assert float((made - exact).square().sum() / exact.square().sum()) == pytest.approx(told[row], rel=1e-3)


def test_cached_features_are_quantized_as_wide_as_activations_or_as_asked(plain: nn.Module) -> None:
    for bits, stored, dtype in ((None, 6, torch.int8), (4, 4, torch.int8), (16, None, torch.float16)):
        model = quantized(activation_bits=6, maintenance="cache", cache_bits=bits)
        for name, feature in tdq.feature_table(model).features.items():
            assert feature.num_bits == stored
            assert (feature.values if feature.codes is None else feature.codes).dtype == dtype  # type: ignore[union-attr]
            exact = seen(plain, name, 600.0)
            made = seen(model, name, 600.0)
            assert float((made - exact).norm() / exact.norm()) < {6: 0.03, 4: 0.15, None: 1e-3}[stored]


def test_strategies_by_hand_and_by_name() -> None:
    model = quantized(maintenance="tib", choose={"mid_block.*": "cache", "*resnets.1*": "tib"})
    chosen = {name: set(rows) for name, rows in tdq.feature_table(model).metadata["strategy"].items()}
    assert chosen.pop("mid_block.resnets.0.time_emb_proj") == {"cache"}
    assert all(rows == {"tib"} for rows in chosen.values())
    forced = quantized(maintenance="cache", choose={"mid_block*": "tib"})
    assert set(tdq.feature_table(forced).metadata["strategy"]["mid_block.resnets.0.time_emb_proj"]) == {"tib"}


def test_a_step_is_never_worse_than_its_block() -> None:
    errors = [
        tdq.feature_table(quantized(weight_bits=4, activation_bits=4, granularity=g)).metadata["relative_squared_error"]
        for g in ("block", "step")
    ]
    for name in errors[0]["chosen"]:
        rows = [torch.tensor(e["chosen"][name]) for e in errors]
        assert bool((rows[1] <= rows[0]).all())
        assert bool((rows[1] <= torch.tensor(errors[1]["cache"][name])).all())


def test_naive_quantizes_them_like_any_other_layer() -> None:
    model = quantized(maintenance="naive", temporal_weight_bits=4, temporal_activation_bits=5)
    assert not has_features(model)
    table = tdq.scale_table(model)
    heads = [name for name, _ in model.named_modules() if name.endswith("time_emb_proj")]
    for name in (*heads, *MLP):
        assert table.metadata["num_bits"][f"{name}.input_quantizer"] == 5
        layer = model.get_submodule(name)
        assert layer.weight_quantizer.num_bits == 4
        column = table.scale[:, table.names.index(f"{name}.input_quantizer")]
        assert bool((column == column[0]).all())
    assert not equal(outputs(model), outputs(mtq.quantize(unet(), fast_config(), UNET.forward_loop())))


@pytest.mark.parametrize("maintenance", ["naive", "tib", "cache"])
def test_layers_whose_channels_were_smoothed_are_as_good(maintenance: str) -> None:
    """Their weights are multiplied, and the scales that they get now are those of their plain inputs."""
    exact = outputs(unet())
    errors = []
    for smoothing in ("none", 0.5):
        model = mtq.quantize(unet(), fast_config(high_precision=(), channel_smoothing=smoothing), UNET.forward_loop())
        smoothed = [model.get_submodule(name).input_quantizer.channel_divisor for name in MLP]
        assert all((divisor is None) == (smoothing == "none") for divisor in smoothed)
        model = again(model, maintenance=maintenance, recalibrate=False)
        found = outputs(model)
        errors.append(sum(float((one - other).square().sum()) for one, other in zip(found, exact, strict=True)))
    assert errors[1] < 2 * errors[0]


@pytest.mark.parametrize("outside", ["nearest", "linear", "exact"])
def test_times_between_rows(plain: nn.Module, outside: str) -> None:
    model = quantized(maintenance="cache", cache_bits=32, outside=outside)
    rows = tdq.feature_table(model).features["mid_block.resnets.0.time_emb_proj"].dense()
    assert tdq.feature_table(model).timesteps.tolist() == [20.0, 300.0, 600.0, 900.0]
    expected = {
        375.0: {"nearest": rows[1], "linear": 0.75 * rows[1] + 0.25 * rows[2]},
        450.0: {"nearest": rows[1], "linear": 0.5 * rows[1] + 0.5 * rows[2]},
        451.0: {"nearest": rows[2], "linear": (149 * rows[1] + 151 * rows[2]) / 300},
        999.0: {"nearest": rows[3], "linear": rows[3]},
        0.0: {"nearest": rows[0], "linear": rows[0]},
    }
    for time, row in expected.items():
        own = seen(plain, "mid_block.resnets.0.time_emb_proj", time)
        found = seen(model, "mid_block.resnets.0.time_emb_proj", time)
        torch.testing.assert_close(found, own if outside == "exact" else row[outside])
    if outside == "exact":
        assert equal(outputs(model), outputs(plain))


def test_fifty_steps_on_twenty_rows_and_the_union_of_two_schedules() -> None:
    def forward_loop(model: nn.Module) -> None:
        for time in TWENTY:
            model(noise(1, 3, 8, 8), torch.tensor(time))

    fifty = torch.linspace(0.0, 980.0, 50).tolist()
    twenty = mtq.quantize(unet(), config(maintenance="cache", cache_bits=32), forward_loop)
    union = mtq.quantize(unet(), config(maintenance="cache", cache_bits=32, times=fifty), forward_loop)
    exact, rows = unet(), tdq.feature_table(twenty).features["mid_block.resnets.0.time_emb_proj"].dense()
    assert tdq.feature_table(union).timesteps.tolist() == sorted({*TWENTY, *fifty})
    assert torch.equal(tdq.scale_table(union).timesteps, tdq.feature_table(union).timesteps)
    for time in fifty[::7]:
        own = seen(exact, "mid_block.resnets.0.time_emb_proj", time)
        between = seen(twenty, "mid_block.resnets.0.time_emb_proj", time)
        below = min(int(time // 50), 18)
        share = min((time - 50 * below) / 50, 1.0)
        torch.testing.assert_close(between, (1 - share) * rows[below] + share * rows[below + 1])
        torch.testing.assert_close(seen(union, "mid_block.resnets.0.time_emb_proj", time), own)
    # further rows leave the scales what they are
    for name, quantizer in tdq.temporal_quantizers(union).items():
        rows = torch.isin(quantizer._timesteps, torch.tensor(TWENTY))
        assert torch.equal(quantizer._scale[rows], tdq.temporal_quantizers(twenty)[name]._scale)


BATCHES = ("unet", "dit", "flux", "pixart", "cogvideox")


@pytest.mark.parametrize("name", slow_but(BATCHES, "dit", "cogvideox"))
def test_full_precision_rows_are_what_the_layers_give_in_the_batch_of_the_calibration(name: str) -> None:
    case = CASES[name]

    def forward_loop(model: nn.Module) -> None:
        for time in (20.0, 600.0, 901.0):
            model(**case.at(time))

    one = mtq.quantize(case.model(), fast_config(), forward_loop)
    other = mtq.quantize(case.model(), config(maintenance="cache", cache_bits=32), forward_loop)
    with torch.no_grad():
        for time in (20.0, 600.0, 901.0):
            call = case.at(time)
            assert torch.equal(first_output(one(**call)), first_output(other(**call)))


def test_in_a_batch_of_one_too() -> None:
    one = mtq.quantize(unet(), fast_config(), UNET.forward_loop(1))
    other = quantized(batch=1, maintenance="cache", cache_bits=32)
    for call in UNET.data(1):
        assert torch.equal(one(**call).sample, other(**call).sample)


def test_a_part_of_the_features() -> None:
    part = quantized(maintenance="cache", cache_bits=32, features=["mid_block*", "up_blocks.0.resnets.1*"])
    whole = quantized(maintenance="cache", cache_bits=32)
    assert len(tdq.feature_table(part).features) == 3
    assert tdq.feature_table(part).metadata["superseded"] == {}
    times = [20.0, 300.0, 600.0, 900.0]
    assert equal(outputs(part, times), outputs(whole, times))
    tdq.free_modules(part)
    assert equal(outputs(part, times), outputs(whole, times))


def test_only_the_quantizers_of_replaced_layers_are_switched_off() -> None:
    """The MLP goes on to run for the other features, quantized as the rules say."""
    model = quantized(maintenance="cache", high_precision=(), features=["mid_block*"])
    for name in (*MLP, "up_blocks.0.resnets.1.time_emb_proj"):
        assert model.get_submodule(name).input_quantizer.is_enabled
    assert not model.mid_block.resnets[0].time_emb_proj.input_quantizer.is_enabled
    whole = quantized(maintenance="cache", high_precision=())
    name = "mid_block.resnets.0.time_emb_proj"
    assert torch.equal(seen(model, name, 600.0), seen(whole, name, 600.0))


def test_in_inference_mode(auto: nn.Module) -> None:
    with torch.inference_mode():
        other = mtq.quantize(unet(), config(weight_bits=4, activation_bits=4), UNET.forward_loop())
        assert equal(outputs(other), outputs(auto))


def test_a_second_call_gives_the_same(auto: nn.Module) -> None:
    model = again(copy.deepcopy(auto))
    assert equal(outputs(model), outputs(auto))
    assert tdq.feature_table(model).metadata == tdq.feature_table(auto).metadata


def test_features_go_with_a_second_call_that_makes_none(auto: nn.Module) -> None:
    model = again(copy.deepcopy(auto), maintenance="naive")
    assert not has_features(model)
    expected = outputs(quantized(maintenance="naive", weight_bits=4, activation_bits=4))
    assert equal(outputs(model), expected)
    state, weights = mto.modelopt_state(model), model.state_dict()
    restored = mto.restore_from_modelopt_state(unet(), state)
    restored.load_state_dict(weights)
    assert equal(outputs(restored), expected)


# refusals


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bits of a cache": ("cache_bits", {"cache_bits": 9}),
    "one bit": ("cache_bits", {"cache_bits": 1}),
    "exact without layers": ("outside", {"outside": "exact", "keep_layers": False}),
    "bits of weights": ("temporal_weight_bits", {"temporal_weight_bits": 9}),
    "bits of activations": ("temporal_activation_bits", {"temporal_activation_bits": [5, 2]}),
    "a strategy": ("maintenance", {"maintenance": "best"}),
    "a strategy by hand": ("choose", {"choose": {"*": "naive"}}),
    "by hand without strategies": ("choose", {"maintenance": "naive", "choose": {"*": "tib"}}),
    "a granularity": ("granularity", {"granularity": "layer"}),
    "a policy": ("outside", {"outside": "cubic"}),
    "iterations": ("iterations", {"iterations": -1}),
    "a field of no algorithm": ("cach_bits", {"cach_bits": 8}),
}


@pytest.mark.parametrize(("field", "wrong"), CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_cannot_be_is_refused_at_once(field: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(TdqError) as error:
        tdq.make_config(method="tdq_temporal", **wrong)
    assert error.value.field == field
    assert error.value.cure


def _fails(*args: Any) -> None:
    raise KeyboardInterrupt


HEAD = "down_blocks.0.resnets.0.time_emb_proj"
REFUSED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "a glob of features": ("features", "it matches no temporal feature", {"features": ["*time_emb_proj", "nothing*"]}),
    "a layer that is no feature": ("features", "it matches no temporal feature", {"features": [MLP[0]]}),
    "a layer of the sample": ("features", r"depends on `sample` as well as on the time", {"features": ["conv_out"]}),
    "a glob by hand": ("choose", "it matches no temporal feature", {"choose": {"up*": "tib", "nothing*": "cache"}}),
    "times that are none": ("timesteps", "not finite", {"times": [float("nan")]}),
    "another argument": ("timestep_argument", "no such argument", {"timestep_argument": "sigma"}),
}


def refuses(model: nn.Module, call: Callable[[], Any], expected: type[BaseException] = TdqError) -> Any:
    """``call`` raises and nothing about the model is changed."""
    outputs(model)
    before, modes = picture(model), repr(mto.modelopt_state(model)["modelopt_state_dict"])
    given = outputs(model)
    with pytest.raises(expected) as error:
        call()
    assert repr(mto.modelopt_state(model)["modelopt_state_dict"]) == modes
    after = picture(model)
    assert after.keys() == before.keys()
    for name in before:
        assert same(before[name], after[name]), name
    assert equal(outputs(model), given)
    return error.value


@pytest.mark.parametrize(("field", "problem", "wrong"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_the_model_changes_nothing(
    plain: nn.Module, auto: nn.Module, field: str, problem: str, wrong: dict[str, Any]
) -> None:
    import re

    for model in (plain, auto):
        model = copy.deepcopy(model)  # noqa: PLW2901
        error = refuses(model, lambda m=model: mtq.calibrate(m, fields(**wrong), UNET.forward_loop()))
        assert re.search(problem, str(error)), error
        assert error.field == field


def test_what_depends_on_the_class_too_is_named() -> None:
    case = CASES["unet with classes"]

    def forward_loop(model: nn.Module) -> None:
        for time in (20.0, 600.0):
            model(**case.at(time))

    model = case.model()
    with pytest.raises(TdqError, match=rf"features = '{HEAD}'.*depends on `class_labels` as well as on the time"):
        mtq.quantize(model, config(features=[HEAD]), forward_loop)
    made = mtq.quantize(case.model(), config(maintenance="cache"), forward_loop)
    assert list(tdq.feature_table(made).features) == ["time_embedding.linear_2"]


def test_failures_on_the_way_change_nothing(plain: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    import modelopt_tdq.temporal_features.maintain as module

    model, data = copy.deepcopy(plain), UNET.forward_loop()
    for name in ("tib_features", "relative_squared_error", "install_features"):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, _fails)
            refuses(model, lambda: mtq.calibrate(model, fields(times=[5.0]), data), KeyboardInterrupt)
    assert refuses(model, lambda: mtq.calibrate(model, fields(recalibrate=False))).field == "forward_loop"
    idle = refuses(model, lambda: mtq.calibrate(model, fields(recalibrate=False), lambda m: None))
    assert (idle.field, idle.problem) == ("forward_loop", "it never called the model")
    with torch.no_grad():
        model.time_embedding.linear_2.weight[0, 0] = torch.nan
    assert "NaN" in str(refuses_silently(lambda: mtq.calibrate(model, fields(), data)))


def refuses_silently(call: Callable[[], Any]) -> TdqError:
    """Raises; the model computes NaN anyway, so that it cannot be compared."""
    with pytest.raises(TdqError) as error:
        call()
    return error.value


def test_a_model_without_a_temporal_block() -> None:
    class Blind(TinyDenoiser):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
            return self.conv_out(self.conv1(self.conv_in(sample * timestep.reshape(-1, 1, 1, 1) / 1000)))  # type: ignore[no-any-return]

    with pytest.raises(TdqError, match=r"it has no temporal block.*`conv_in`, for one, also depends on sample"):
        mtq.quantize(Blind().eval(), config(), loop(calls()))


def test_further_times_of_a_model_that_learns() -> None:
    algorithms = [
        {"method": "tdq_qat", "intervals": "static", "progress": False, "weights": "max", "statistic": "max"},
        fields(recalibrate=False, times=[5.0]),
    ]
    with pytest.raises(TdqError, match=r'still learned.*"rows"'):
        mtq.quantize(unet(), {**fast_config(), "algorithm": algorithms}, UNET.forward_loop())


# tables


def test_a_table_goes_into_a_model_of_the_same_weights(auto: nn.Module, plain: nn.Module, tmp_path: Path) -> None:
    tdq.feature_table(auto).save(tmp_path / "features")
    table = FeatureTable.load(tmp_path / "features.safetensors")
    model = copy.deepcopy(auto)
    tdq.remove_features(model)
    assert not equal(outputs(model), outputs(auto))
    tdq.set_feature_table(model, table)
    assert equal(outputs(model), outputs(auto))
    tdq.free_modules(model)
    tdq.set_feature_table(model, table)
    assert equal(outputs(model), outputs(auto))


def test_a_table_of_something_else_is_refused(auto: nn.Module, plain: nn.Module) -> None:
    table = tdq.feature_table(auto)

    def changed(**metadata: Any) -> FeatureTable:
        return FeatureTable(table.timesteps, table.features, table.outside, {**table.metadata, **metadata})

    wrong = {
        "checksum": changed(checksum="0" * 16),
        "features": changed(layers=["nothing", *table.metadata["layers"]]),
        "metadata": FeatureTable(table.timesteps, table.features),
    }
    for field, other in wrong.items():
        for model in (copy.deepcopy(plain), copy.deepcopy(auto)):
            error = refuses(model, lambda m=model, t=other: tdq.set_feature_table(m, t))
            assert (error.field, bool(error.cure)) == (field, True)
    trained = copy.deepcopy(plain)
    with torch.no_grad():
        trained.time_embedding.linear_1.bias[0] += 1e-3
    assert refuses(trained, lambda: tdq.set_feature_table(trained, table)).field == "checksum"
    values = {name: feature.dense() for name, feature in table.features.items()}
    next(iter(values.values()))[1, 2] = torch.nan
    with pytest.raises(TdqError, match="NaN or infinity at time 300"):
        FeatureTable(table.timesteps, {name: tdq.Feature(value) for name, value in values.items()})


def test_the_checksum_covers_parameters_without_a_layer() -> None:
    class Table(TinyDenoiser):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.randn(2))

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
            time = timestep.reshape(-1, 1) / 1000
            return self.conv2(self.conv_in(sample) + self.time_embedding(time + self.shift)[:, :, None, None])  # type: ignore[no-any-return]

    model = mtq.quantize(Table().eval(), config(), loop(calls()))
    table = tdq.feature_table(model)
    assert table.metadata["tensors"] == ["shift"]
    tdq.set_feature_table(model, table)
    with torch.no_grad():
        model.shift[0] += 1
    with pytest.raises(TdqError, match="other weights"):
        tdq.set_feature_table(model, table)


# saving


SAVED: dict[str, dict[str, Any]] = {
    "auto": {"weight_bits": 4, "activation_bits": 4},
    "step": {"weight_bits": 4, "activation_bits": 4, "granularity": "step", "outside": "nearest"},
    "cache4": {"maintenance": "cache", "cache_bits": 4},
    "cache8": {"maintenance": "cache", "cache_bits": 8, "outside": "exact"},
    "cache16": {"maintenance": "cache", "cache_bits": 16, "features": ["mid_block*"]},
    "cache32": {"maintenance": "cache", "cache_bits": 32},
    "freed": {"keep_layers": False},
    "naive": {"maintenance": "naive"},
}

#: Restored in each of four ways; the others by a state of ModelOpt's and by diffusers.
EVERY_WAY = ("auto", "freed")

_SCRIPT = """
import sys; sys.path[:0] = [{tests!r}, {tests!r} + "/temporal_features", {tests!r} + "/.."]
import warnings; warnings.simplefilter("ignore")
import torch; torch.set_grad_enabled(False)
import modelopt.torch.opt as mto
assert "modelopt_tdq" not in sys.modules
import modelopt_tdq
from diffusers import UNet2DModel
from test_tdq_temporal import EVERY_WAY, SAVED, equal, outputs, unet

mto.enable_huggingface_checkpointing()
for name in SAVED:
    folder = {folder!r} + "/" + name
    expected = torch.load(folder + "/outputs.pt")
    if name in EVERY_WAY:
        model = mto.restore(unet(), folder + "/model.pt")
        assert equal(outputs(model), expected), name
    model = mto.restore_from_modelopt_state(unet(), torch.load(folder + "/state.pt"))
    model.load_state_dict(torch.load(folder + "/weights.pt"))
    assert equal(outputs(model), expected), name
    for kwargs in ({{}}, {{"low_cpu_mem_usage": False}})[: 1 + (name in EVERY_WAY)]:
        model = UNet2DModel.from_pretrained(folder, **kwargs).eval()
        assert equal(outputs(model), expected), (name, kwargs)
print("equal")
"""


def test_saved_and_restored_bit_for_bit_in_a_fresh_process(tmp_path: Path) -> None:
    from diffusers import ModelMixin
    from modelopt.torch.opt.plugins import huggingface

    saving = ModelMixin.__dict__["save_pretrained"], ModelMixin.__dict__["from_pretrained"]
    mto.enable_huggingface_checkpointing()
    try:
        for name, algorithm in SAVED.items():
            folder = tmp_path / name
            model = quantized(**algorithm)
            model.save_pretrained(folder)
            if name in EVERY_WAY:
                mto.save(model, folder / "model.pt")
            torch.save(mto.modelopt_state(model), folder / "state.pt")
            torch.save(model.state_dict(), folder / "weights.pt")
            torch.save(outputs(model), folder / "outputs.pt")
    finally:
        ModelMixin.save_pretrained, ModelMixin.from_pretrained = saving
        del ModelMixin._modelopt_cache
        huggingface._PATCHED_CLASSES.discard(ModelMixin)
    script = _SCRIPT.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path))
    _, printed = run_fresh(script, tmp_path)
    assert printed.strip().endswith("equal"), printed


def test_without_layers_their_weights_are_gone() -> None:
    whole, freed = quantized(), quantized(keep_layers=False)
    assert equal(outputs(whole), outputs(freed))
    sizes = [sum(p.numel() for p in model.parameters()) for model in (whole, freed)]
    assert sizes[0] - sizes[1] == 2664
    with pytest.raises(TdqError, match="were dropped"):
        mtq.calibrate(freed, fields(), UNET.forward_loop())


# other algorithms

LEARNING: dict[str, dict[str, Any]] = {
    "reconstruct": {"method": "tdq_reconstruct", "iterations": 3, "samples": 8, "batch_size": 4},
    "qat": {"method": "tdq_qat", "intervals": "thin"},
}
FAST = {"statistic": "max", "weights": "max", "protect_steps": False, "progress": False}


def listed(*algorithms: dict[str, Any]) -> nn.Module:
    rules = fast_config(weight_bits=4, activation_bits=6)
    made = {**rules, "algorithm": list(algorithms)}
    return once(algorithms, lambda: mtq.quantize(unet(), made, UNET.forward_loop()))


def restored(model: nn.Module) -> nn.Module:
    made = mto.restore_from_modelopt_state(unet(), mto.modelopt_state(model))
    made.load_state_dict(model.state_dict())
    return made.eval()


@pytest.mark.parametrize("name", LEARNING)
def test_learning_afterwards_leaves_the_temporal_layers_alone(name: str) -> None:
    temporal = {**FAST, **fields()}
    alone, both = listed(temporal), listed(temporal, {**FAST, **LEARNING[name]})
    one, other = tdq.feature_table(alone), tdq.feature_table(both)
    assert one.metadata == other.metadata
    assert all(torch.equal(one.features[n].dense(), f.dense()) for n, f in other.features.items())
    block = one.metadata["layers"]
    for layer in block:
        assert torch.equal(both.get_submodule(layer).weight, unet().get_submodule(layer).weight)
        assert not any(m.is_enabled for m in both.get_submodule(layer).modules() if isinstance(m, TensorQuantizer))
    names = tdq.scale_table(both).names
    assert names == tdq.scale_table(alone).names
    assert not any(n.startswith(tuple(block)) for n in names)
    assert not equal(outputs(both), outputs(alone))
    assert equal(outputs(restored(both)), outputs(both))
    tdq.free_modules(both)
    assert equal(outputs(restored(both)), outputs(both))


@pytest.mark.parametrize("name", slow_but(LEARNING, "qat"))
def test_after_learning_without_calibrating_again_the_scales_stay(name: str) -> None:
    learning = {**FAST, **LEARNING[name]}
    alone = listed(learning)
    both = listed(learning, {**FAST, **fields(recalibrate=False, maintenance="cache", cache_bits=32)})
    assert torch.equal(tdq.scale_table(both).scale, tdq.scale_table(alone).scale)
    for name_, parameter in alone.named_parameters():
        assert torch.equal(both.get_parameter(name_), parameter)
    times = [20.0, 300.0, 600.0, 900.0]
    assert equal(outputs(both, times), outputs(alone, times))
    assert equal(outputs(restored(both)), outputs(both))
    kept = listed(learning, {**FAST, **fields(recalibrate=False, weights="keep")})
    assert has_features(kept)


def test_smoothquant_before() -> None:
    model = mtq.quantize(
        unet(), {**fast_config(), "algorithm": ["smoothquant", {**FAST, **fields()}]}, UNET.forward_loop()
    )
    assert has_features(model)
    assert equal(outputs(restored(model)), outputs(model))


def test_a_copy_and_the_name_of_its_module(auto: nn.Module) -> None:
    twin = copy.deepcopy(auto)
    assert FEATURES in dict(twin.named_children())
    assert equal(outputs(twin), outputs(auto))
