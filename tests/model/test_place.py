"""Weights that are elsewhere between calls: scales and outputs equal to the last bit, or a refusal with its cure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import pytest
import torch
from support.models import TIMES, TinyDenoiser, calls, fast_config, loop, noise
from support.once import Once
from support.places import GROUPED, OFFLOADED, back, cast, on_disk_by_groups
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq import TdqError
from modelopt_tdq.calibration.protect import install
from modelopt_tdq.errors import TdqWarning
from modelopt_tdq.model.place import drop_bound_forward, execution_device, release

_Place = Callable[[nn.Module], None]

PLACES = {**OFFLOADED, **GROUPED}
every_place = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
_SOME = ("cpu, buffers", "first on disk", "leaves")
some_places = pytest.mark.parametrize("place", [PLACES[name] for name in _SOME], ids=_SOME)
offloaded = pytest.mark.parametrize("place", OFFLOADED.values(), ids=OFFLOADED)

#: Everything that looks at weights or runs parts of the model.
THOROUGH: dict[str, Any] = {"statistic": "output", "weights": "mse", "protect_steps": True, "asymmetric": "auto"}


def _config(method: str = "tdq", **fields: Any) -> dict[str, Any]:
    return fast_config(method=method, **{**(THOROUGH if method == "tdq" else {}), **fields})


def _model(place: _Place | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = TinyDenoiser().eval()
    if place is not None:
        place(model)
    return model


once = Once()


def _quantized(place: _Place | None = None, config: dict[str, Any] | None = None) -> nn.Module:
    config = _config() if config is None else config
    if place is not None:
        return mtq.quantize(_model(place), config, loop(calls()))
    return once(config, lambda: mtq.quantize(_model(), config, loop(calls())))


@torch.no_grad()
def _outputs(model: nn.Module) -> list[Tensor]:
    return [model(noise(2, 3, 8, 8, seed=7), torch.tensor(time)) for time in TIMES]


def _same_table(model: nn.Module, other: nn.Module) -> None:
    one, two = tdq.scale_table(model), tdq.scale_table(other)
    assert one.names == two.names
    assert torch.equal(one.timesteps, two.timesteps)
    assert torch.equal(one.scale, two.scale)
    assert (one.offset is None) == (two.offset is None)
    assert one.offset is None or torch.equal(one.offset, two.offset)


def _same_outputs(model: nn.Module, other: nn.Module) -> None:
    assert all(torch.equal(a, b) for a, b in zip(_outputs(model), _outputs(other), strict=True))


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    return _quantized()


@pytest.fixture(scope="module")
def corrected() -> nn.Module:
    return _quantized(config=fast_config(weight_bits=4, correction="per_step"))


@every_place
def test_corrections_are_the_same_wherever_the_weights_are(corrected: nn.Module, place: _Place) -> None:
    model = _quantized(place, fast_config(weight_bits=4, correction="per_step"))
    _same_outputs(model, corrected)
    one, two = tdq.layer_correction(model), tdq.layer_correction(corrected)
    assert one is not None
    assert two is not None
    assert one.names == two.names
    assert all(torch.equal(one.gain[n], two.gain[n]) and torch.equal(one.bias[n], two.bias[n]) for n in one.names)


@every_place
def test_calibration_gives_the_same_wherever_the_weights_are(plain: nn.Module, place: _Place) -> None:
    model = _quantized(place)
    _same_table(model, plain)
    _same_outputs(model, plain)
    _same_table(model, plain)


@pytest.fixture(scope="module")
def by_recipe() -> nn.Module:
    model = _quantized(config=_recipe())
    assert any(q.channel_divisor is not None for q in tdq.temporal_quantizers(model).values())
    assert tdq.layer_correction(model) is not None
    return model


def _recipe() -> dict[str, Any]:
    """All that changes weights: smoothing over channels, rounding by the inputs; and what comes behind."""
    config = tdq.recipe("w4a4")
    config["algorithm"] |= {"progress": False, "replay_samples": 2, "channel_smoothing": 0.5}
    config["algorithm"] |= {"rounding": "compensated", "correction": "per_step"}
    return config


@every_place
@pytest.mark.filterwarnings("ignore:weights that accelerate keeps on disk change")
def test_a_recipe_gives_the_same_wherever_the_weights_are(by_recipe: nn.Module, place: _Place) -> None:
    model = _quantized(place, _recipe())
    _same_table(model, by_recipe)
    _same_outputs(model, by_recipe)
    back(model)  # with the weights that were changed
    _same_outputs(model, by_recipe)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), by_recipe.parameters(), strict=True))


@some_places
@pytest.mark.filterwarnings("ignore:weights that accelerate keeps on disk change")
def test_a_failure_gives_the_weights_back(place: _Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise ValueError("tired")

    model, expected = _model(place), _model()
    monkeypatch.setattr("modelopt_tdq.calibration.calibrate.correct_layers", fails)  # all weights are smoothed by then
    with pytest.raises(ValueError, match="tired"):
        mtq.quantize(model, _recipe(), loop(calls()))
    back(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_weights_that_leave_the_disk_are_told_of() -> None:
    with pytest.warns(TdqWarning, match="new ones stay in the CPU's memory"):
        _quantized(OFFLOADED["disk"], _recipe())


@every_place
def test_a_calibrated_model_may_go_anywhere(plain: nn.Module, place: _Place) -> None:
    model = _quantized()
    place(model)
    _same_outputs(model, plain)
    _same_table(model, plain)
    _same_outputs(model, plain)
    mtq.calibrate(model, _config()["algorithm"], loop(calls()))
    _same_table(model, plain)
    _same_outputs(model, plain)


@every_place
def test_a_table_that_is_set_later_stays(place: _Place) -> None:
    model, expected = _quantized(), _quantized()
    place(model)
    table = tdq.scale_table(expected)
    other = tdq.ScaleTable(
        table.timesteps, 3 * table.scale, table.names, None if table.offset is None else 3 * table.offset
    )
    for changed in (model, expected):
        tdq.set_scale_table(changed, other)
    for _ in range(2):
        _same_outputs(model, expected)
        assert torch.equal(tdq.scale_table(model).scale, 3 * table.scale)


@pytest.mark.parametrize("place", [OFFLOADED["cpu"], OFFLOADED["disk"]], ids=["cpu", "disk"])
def test_calibration_leaves_the_offloading_as_it_was(place: _Place) -> None:
    """ModelOpt writes back what it has read; weights on disk would fill the memory."""
    model = _model(place)
    hooks = {name: module._hf_hook for name, module in model.named_modules() if "_hf_hook" in vars(module)}
    maps = {name: hook.weights_map.dataset for name, hook in hooks.items() if hook.offload}
    assert "conv1" in maps
    held = {name: dict(getattr(kept, "state_dict", kept)) for name, kept in maps.items()}
    mtq.quantize(model, _config(), loop(calls()))
    for name, kept in maps.items():
        assert hooks[name].weights_map.dataset is kept
        now = dict(getattr(kept, "state_dict", kept))
        assert now.keys() == held[name].keys()
        assert all(value is held[name][key] for key, value in now.items())
    assert model.conv1.weight.is_meta
    assert all(not q._scale.is_meta for q in tdq.temporal_quantizers(model).values())


@some_places
@pytest.mark.parametrize("first", [True, False], ids=["placed first", "placed later"])
def test_learned_scales(place: _Place, first: bool) -> None:
    config = _config("tdq_qat", learn_weights=True)
    expected, model = _quantized(config=config), _quantized(place if first else None, config)
    if not first:
        place(model)
    _same_outputs(model, expected)
    _same_table(model, expected)


@some_places
def test_scales_learn_while_weights_are_elsewhere(place: _Place) -> None:
    """And a table made from scales that have learned is made anew, wherever those are by then."""
    config = _config("tdq_qat")
    models = [_quantized(config=config), _quantized(place, config), _quantized(config=config)]
    for model in models:
        learned = [p for name, p in model.named_parameters() if "tdq_intervals" in name or "_quantizer" in name]
        model.train()
        torch.manual_seed(1)  # of the dropout in what makes the intervals
        model(noise(2, 3, 8, 8), torch.tensor(300.0)).square().mean().backward()
        torch.optim.SGD(learned, 1.0).step()
        model.eval()
    place(models[2])
    before = tdq.scale_table(_quantized(config=config)).scale
    assert not torch.equal(tdq.scale_table(models[0]).scale, before)
    for model in models[1:]:
        _same_table(model, models[0])
        _same_outputs(model, models[0])


def test_parameters_that_cannot_be_trained_are_named() -> None:
    model = _quantized(OFFLOADED["cpu"], _config("tdq_qat"))
    with pytest.raises(TdqError, match=r"time_embedding.*nothing trains them.*requires_grad_\(False\)"):
        tdq.parameter_groups(model, lr=0.1)
    for layer in (model.time_embedding, model.conv_in, model.conv1, model.mix, model.conv2, model.conv_out):
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(False)
    assert {group["name"] for group in tdq.parameter_groups(model, lr=0.1)} <= {"interval_mlp", "scales"}


_INPUTS = {"sample": noise(2, 3, 8, 8), "timestep": torch.tensor(20.0)}


def _exported(model: nn.Module, folder: Path) -> Any:
    path = tdq.export_onnx(model, folder / "m.onnx", _INPUTS).path
    return tdq.OnnxRuntimeSession(path)({name: value.numpy() for name, value in _INPUTS.items()})["output"]


@pytest.fixture(scope="module")
def exported(plain: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return _exported(plain, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("place", [OFFLOADED["cpu, buffers"], GROUPED["leaves"]], ids=["cpu, buffers", "leaves"])
def test_an_export_asks_for_the_weights(exported: Any, place: _Place, tmp_path: Path) -> None:
    model = _quantized()
    place(model)
    with pytest.raises(TdqError, match=r"cannot be exported while .*remove_hook"):
        tdq.export_onnx(model, tmp_path / "m.onnx", _INPUTS)
    assert not list(tmp_path.iterdir())
    with pytest.raises(TdqError, match=r"cannot be analyzed while"):
        tdq.analyze(_model(place), loop(calls()), probes=0, progress=False)
    back(model)
    assert (_exported(model, tmp_path) == exported).all()


def test_hooks_that_keep_nothing_do_not_matter(exported: Any, tmp_path: Path) -> None:
    from accelerate import dispatch_model

    model = _quantized()
    dispatch_model(model, {name: "cpu" for name, _ in model.named_children()}, main_device="cpu", force_hooks=True)
    assert (_exported(model, tmp_path) == exported).all()


@some_places
@pytest.mark.parametrize("method", ["tdq_reconstruct", "tdq_temporal"])
def test_what_changes_weights_asks_for_them(place: _Place, method: str) -> None:
    further = {"iterations": 3, "samples": 16} if method == "tdq_reconstruct" else {"maintenance": "cache"}
    config = _config(method, **further)
    model = _model(place)
    with pytest.raises(TdqError, match=r"it cannot .* while .*remove_hook"):
        mtq.quantize(model, config, loop(calls()))
    back(model)
    expected = _quantized(config=config)
    mtq.calibrate(model, config["algorithm"], loop(calls()))
    _same_table(model, expected)
    _same_outputs(model, expected)
    place(model)
    _same_outputs(model, expected)
    if method == "tdq_temporal":
        assert torch.equal(tdq.feature_table(model).timesteps, tdq.feature_table(expected).timesteps)


@offloaded
def test_saving_asks_for_the_weights(plain: nn.Module, place: _Place, tmp_path: Path) -> None:
    """ModelOpt would write a file of `meta` tensors."""
    model = _quantized()
    place(model)
    with pytest.raises(TdqError, match="cannot be saved while accelerate keeps"):
        mto.save(model, tmp_path / "m.pt")
    with pytest.raises(TdqError, match="cannot be restored while accelerate keeps"):
        mto.restore_from_modelopt_state(_model(place), mto.modelopt_state(plain))
    back(model)
    mto.save(model, tmp_path / "m.pt")
    restored = mto.restore(_model(), tmp_path / "m.pt")
    _same_table(restored, plain)
    _same_outputs(restored, plain)


def test_a_model_in_groups_is_saved(plain: nn.Module, tmp_path: Path) -> None:
    model = _quantized(GROUPED["leaves"])
    mto.save(model, tmp_path / "m.pt")
    restored = mto.restore(_model(GROUPED["leaves"]), tmp_path / "m.pt")
    _same_table(restored, plain)
    _same_outputs(restored, plain)


@pytest.mark.parametrize("place", GROUPED.values(), ids=GROUPED)
def test_hooks_that_were_there_first_leave_a_quantized_model_behind(plain: nn.Module, place: _Place) -> None:
    """They would put the layers' own forward back, without its input quantizers."""
    model = _quantized(place)
    back(model)
    _same_outputs(model, plain)
    place(model)
    _same_outputs(model, plain)


def test_groups_on_disk(plain: nn.Module, tmp_path: Path) -> None:
    """What is in memory between calls is not filled: nothing of it is read, and calls are right."""
    with pytest.raises(TdqError, match=r"cannot be calibrated while diffusers has written its layers to disk"):
        _quantized(on_disk_by_groups)
    model = _quantized()
    table = tdq.scale_table(model)
    on_disk_by_groups(model)
    _same_outputs(model, plain)
    for fails in (
        lambda: tdq.scale_table(model),
        lambda: tdq.set_scale_table(model, table),
        lambda: mto.save(model, tmp_path / "m.pt"),
        lambda: tdq.export_onnx(model, tmp_path / "m.onnx", _INPUTS),
    ):
        with pytest.raises(TdqError, match=r"to disk.*Load the model again.*offload_to_disk_path"):
            fails()
    _same_outputs(model, plain)


def test_groups_that_a_stream_moves_know_no_new_tensors() -> None:
    model = _quantized(GROUPED["leaves"])
    table = tdq.scale_table(model)
    model.conv1._diffusers_hook.get_hook("group_offloading").group.stream = object()  # a stream needs a GPU
    for fails in (
        lambda: tdq.set_scale_table(model, table),
        lambda: mtq.calibrate(model, _config()["algorithm"], loop([])),
    ):
        with pytest.raises(TdqError, match=r"by a stream.*use_stream"):
            fails()


def test_layerwise_casting_is_refused_before_and_after() -> None:
    model = _model()
    cast(model)
    with pytest.raises(TdqError, match=r"stores its layers in fewer bits.*without layerwise casting"):
        mtq.quantize(model, _config(), loop(calls()))
    with pytest.raises(TdqError, match=r"float8_e4m3fn.*scales of the quantized weights would be rounded"):
        cast(_quantized())
    half = _quantized()
    half.to(torch.float16)
    _same_table(half, _quantized())


def test_blocks_that_are_offloaded_as_a_whole_are_refused(tmp_path: Path) -> None:
    from accelerate import dispatch_model

    def place(model: nn.Module) -> None:
        model.body = nn.Sequential(model.conv1)
        where = {"body": "disk"} | {name: "cpu" for name, _ in model.named_children() if name != "body"}
        dispatch_model(
            model,
            where,
            "cpu",
            offload_dir=tmp_path,
            preload_module_classes=["Sequential"],
            state_dict={f"body.0.{name}": value for name, value in model.conv1.state_dict().items()},
            force_hooks=True,
        )

    with pytest.raises(TdqError, match=r"whole blocks of it.*preload_module_classes"):
        _quantized(place)


def test_where_a_module_computes() -> None:
    hook = SimpleNamespace
    layer, empty = nn.Linear(2, 2), nn.Linear(2, 2, device="meta")
    assert execution_device(layer) == execution_device(empty) == execution_device(nn.SiLU()) == torch.device("cpu")
    assert execution_device(nn.Sequential(empty, nn.BatchNorm1d(2))) == torch.device("cpu")
    layer._hf_hook = hook(execution_device="cuda:1", offload=True)
    assert execution_device(nn.Sequential(nn.SiLU(), layer, empty)) == torch.device("cuda:1")
    layer._hf_hook = hook(hooks=(hook(execution_device=None), hook(execution_device=torch.device("cuda", 2))))
    assert execution_device(layer) == torch.device("cuda:2")
    group = hook(onload_device="cuda:3")
    layer._hf_hook, layer._diffusers_hook = hook(), hook(hooks={"group_offloading": hook(group=group)})
    assert execution_device(layer) == torch.device("cuda:3")


def test_scales_are_put_where_their_layer_computes() -> None:
    """Of a model that is spread over devices, each quantizer at its own."""
    model = _quantized()
    quantizers, table = tdq.temporal_quantizers(model), tdq.scale_table(model)
    columns = {name: tuple(table.column(i)[:2]) for i, name in enumerate(table.names)}
    model.mix._hf_hook = SimpleNamespace(execution_device="meta")  # the one other device that a CPU has
    for quantizer in quantizers.values():
        quantizer.reset_amax()
    install(model, quantizers, table.timesteps, columns)
    assert {name: q._scale_bits.device.type for name, q in quantizers.items()} == {
        name: "meta" if name.startswith("mix") else "cpu" for name in quantizers
    }


def test_tensors_come_back_with_their_values() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    OFFLOADED["cpu, buffers"](module)
    assert module[0].weight.is_meta
    release(module)
    assert module.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())
    assert not any({"forward", "_hf_hook"} & vars(part).keys() for part in module)
    release(module)


def test_a_bound_forward_is_dropped_unless_it_is_another_one() -> None:
    layer = nn.Linear(2, 2)
    layer.forward = layer.forward
    drop_bound_forward(layer)
    assert "forward" not in vars(layer)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    drop_bound_forward(layer)
    assert "forward" in vars(layer)


@offloaded
def test_an_engine_in_its_place_is_where_the_model_computed(place: _Place) -> None:
    engine = tdq.EngineDenoiser(SimpleNamespace(inputs={}, outputs=()), _model(place))
    assert engine.device == torch.device("cpu")
