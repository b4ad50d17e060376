"""``modelopt-tdq bench rivals`` on a tiny model: what each row does, by hand; what is kept, written, and told."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from support import oracle
from support.models import TinyDenoiser
from torch import Tensor, nn
from typer.testing import CliRunner

import modelopt_tdq as tdq
from modelopt_tdq.cli.app import app
from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.bench.qat_run import Data
from modelopt_tdq.lab.bench.rivals import others, run
from modelopt_tdq.lab.bench.rivals.command import run_rivals
from modelopt_tdq.lab.bench.rivals.present import markdown
from modelopt_tdq.lab.bench.rivals.rows import ROWS, Row, chosen_rows, made, row_layers
from modelopt_tdq.lab.bench.rivals.run import Bench, Subject
from modelopt_tdq.lab.bench.rivals.setting import FORMATS, Setting, is_linear, quantized_layers
from modelopt_tdq.lab.image_metrics import feature_statistics, frechet_distance, to_uint8
from modelopt_tdq.lab.reference_models import REFERENCE_MODELS, ReferenceModel
from modelopt_tdq.lab.trajectories import noise, sample, sample_shape

diffusers = pytest.importorskip("diffusers")

STEPS, SAMPLES = 3, 2

ORDER = [
    "nvidia",
    "nvidia-64",
    "nvidia-layers",
    "nvidia-smoothquant",
    "max",
    "mse",
    "dynamic-tensor",
    "dynamic-tensor-all",
    "dynamic-token",
    "dynamic-token-all",
    "pruna",
    "static",
    "static-all",
    "time-linear",
    "time",
    "offsets",
    "smoothing",
    "shifts",
    "margin",
    "rounding",
    "corrections",
    "reconstruction",
    "qat",
]

#: A format in which each row applies.
FORMAT_OF = {"pruna": "FP8", "reconstruction": "W4A8", "qat": "W4A4"}

#: Rows whose weights have scales of their own.
OWN_WEIGHTS = (
    "max",
    "mse",
    "nvidia-smoothquant",
    "smoothing",
    "shifts",
    "margin",
    "rounding",
    "corrections",
    "static-all",
    "reconstruction",
    "qat",
)


class Tiny(TinyDenoiser):
    """With a shortcut, which NVIDIA's example leaves alone, and a config."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_shortcut = nn.Conv2d(3, 3, 1)
        self.config = {"in_channels": 3, "sample_size": 8}

    def forward(self, sample: Tensor, timestep: Tensor, context: None = None) -> Tensor:  # type: ignore[override]
        return super().forward(sample, timestep, context) + self.conv_shortcut(sample)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Three convolutions and a linear layer to quantize; images of 8 pixels."""
    torch.manual_seed(0)
    model, file = Tiny().eval(), tmp_path_factory.mktemp("tiny") / "weights"
    file.write_text("tiny")
    about = ReferenceModel(
        "tiny",
        "A tiny denoiser",
        lambda: model,
        diffusers.DDIMScheduler,
        lambda: file,
        samples=1,
        calibration_steps=STEPS,
        calibration_samples=SAMPLES,
    )
    return Subject(about, model, about.load_scheduler())


def _images() -> Data:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return Data((images, torch.zeros(8, dtype=torch.int64)), (images, torch.zeros(8)), diffusers.DDPMScheduler())


@pytest.fixture(scope="module")
def settings(tiny: Subject) -> dict[str, Setting]:
    """One per number format."""
    start = noise(SAMPLES, sample_shape(tiny.model), 0)
    return {
        name: Setting(tiny.model, tiny.scheduler, bits, start, STEPS, 2, 2, _images(), progress=False)
        for name, bits in FORMATS.items()
    }


@pytest.fixture(scope="module")
def models(settings: dict[str, Setting]) -> dict[str, nn.Module]:
    """Of every row, in a format in which it applies; those for all formats at W8A8."""
    return {name: made(row, settings[FORMAT_OF.get(name, "W8A8")]) for name, row in ROWS.items()}


def test_the_registry_is_complete_and_in_order(settings: dict[str, Setting]) -> None:
    assert list(ROWS) == ORDER
    assert len({row.title for row in ROWS.values()}) == len({row.what for row in ROWS.values()}) == len(ORDER)
    for row in ROWS.values():
        assert row.costs
    applies = {name: [r.name for r in ROWS.values() if r.applies(setting)] for name, setting in settings.items()}
    everywhere = [name for name in ORDER if name not in ("pruna", "reconstruction", "qat")]
    assert applies["W8A8"] == everywhere
    assert applies["FP8"] == [n for n in ORDER if not n.startswith("nvidia") and n not in ("reconstruction", "qat")]
    assert applies["W4A8"] == [n for n in (*everywhere, "reconstruction") if n != "nvidia-smoothquant"]
    assert applies["W4A4"] == [n for n in (*everywhere, "reconstruction", "qat") if n != "nvidia-smoothquant"]
    assert not ROWS["qat"].applies(replace(settings["W4A4"], images=None))


def test_rows_are_chosen_by_name_or_without_the_long_ones() -> None:
    assert [row.name for row in chosen_rows(["time", "max"], long=False)] == ["max", "time"]
    assert [row.name for row in chosen_rows([], long=False)] == ORDER[:-2]
    assert [row.name for row in chosen_rows([], long=True)] == ORDER
    with pytest.raises(TdqError, match="no such row"):
        chosen_rows(["minimum"], long=False)


def test_the_setting_names_the_layers_of_the_recipe(settings: dict[str, Setting], models: dict[str, nn.Module]) -> None:
    layers = settings["W8A8"].layers
    assert set(layers) == set(quantized_layers(models["time"]))
    assert any(is_linear(layer) for layer in layers.values())
    assert any(isinstance(layer, nn.Conv2d) for layer in layers.values())
    assert not any("conv_in" in name or "time_emb" in name for name in layers)


@pytest.mark.parametrize("name", ORDER)
def test_a_row_quantizes_what_it_claims(name: str, settings: dict[str, Setting], models: dict[str, nn.Module]) -> None:
    row, setting = ROWS[name], settings[FORMAT_OF.get(name, "W8A8")]
    found = quantized_layers(models[name])
    assert set(found) == row_layers(row, setting)
    assert (len(found) < len(setting.layers)) == (
        name in ("nvidia-layers", "dynamic-tensor", "dynamic-token", "pruna", "time-linear")
    )
    for layer in found.values():
        assert layer.weight_quantizer.num_bits == setting.bits.weights
        assert layer.input_quantizer.num_bits == setting.bits.activations
        assert layer.weight_quantizer.amax.shape[0] == layer.weight.shape[0]  # per output channel
        assert layer.weight_quantizer.amax.numel() == layer.weight.shape[0]
    enabled = [m for m in models[name].modules() if isinstance(m, TensorQuantizer) and m.is_enabled]
    assert len([q for q in enabled if not getattr(q, "_is_output_correction", False)]) == 2 * len(found)


def test_nothing_but_the_activations_differs(settings: dict[str, Setting]) -> None:
    """At 4 bits, where the calibration of the weights matters."""
    setting = settings["W4A4"]
    recipe = quantized_layers(made(ROWS["time"], setting))
    seen = set()
    for row in ROWS.values():
        if row.applies(setting) and row.name not in OWN_WEIGHTS:
            for name, layer in quantized_layers(made(row, setting)).items():
                assert torch.equal(layer.weight_quantizer.amax, recipe[name].weight_quantizer.amax), (row.name, name)
            seen.add(row.name)
    assert {"nvidia", "dynamic-token-all", "static", "time-linear"} <= seen
    weights = quantized_layers(made(ROWS["max"], setting))
    assert all(
        torch.equal(w.weight_quantizer.amax.flatten(), w.weight.abs().flatten(1).amax(1)) for w in weights.values()
    )


def _layer(model: nn.Module, linear: bool = True) -> nn.Module:
    return next(layer for layer in quantized_layers(model).values() if is_linear(layer) == linear)


@pytest.mark.parametrize("bits", list(FORMATS))
@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_dynamic_scales_are_those_of_the_call(granularity: str, bits: str, settings: dict[str, Setting]) -> None:
    setting = settings[bits]
    quantizer = _layer(made(ROWS[f"dynamic-{granularity}"], setting)).input_quantizer
    # each image and each token has a size of its own
    x = noise(3, (2, 5, 8), 4) * torch.tensor([1.0, 10.0, 0.01]).reshape(3, 1, 1, 1) * torch.linspace(1, 3, 5)[:, None]
    for data in (x, x.flip(0) * 7.0):  # nothing is kept from one call to the next
        amax = data.abs().amax(-1, keepdim=True) if granularity == "token" else data.abs().amax((1, 2, 3), keepdim=True)
        format_ = setting.bits.activations
        scale = (amax / oracle.code_limits(format_)[1]).numpy()
        expected = oracle.codes(data.numpy(), scale, 0.0, format_) * scale
        np.testing.assert_allclose(quantizer(data).numpy(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_convolutions_beside_dynamic_layers_are_static(
    granularity: str, settings: dict[str, Setting], models: dict[str, nn.Module]
) -> None:
    seen = _seen(settings["W8A8"])
    for name, layer in quantized_layers(models[f"dynamic-{granularity}-all"]).items():
        assert layer.input_quantizer._dynamic == is_linear(layer)
        if not is_linear(layer):
            assert float(layer.input_quantizer.amax) == pytest.approx(float(seen[name].max()))


def _seen(setting: Setting) -> dict[str, Tensor]:
    """Layer to [steps, trajectories] largest magnitudes of its input in full precision."""
    found: dict[str, list[Tensor]] = {name: [] for name in setting.layers}

    def watch(name: str) -> Callable[..., None]:
        return lambda _, args: found[name].append(args[0].abs().flatten(1).amax(1))

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in setting.layers.items()]
    setting.forward_loop(setting.model)
    for hook in hooks:
        hook.remove()
    return {name: torch.stack(values) for name, values in found.items()}


def test_nvidias_convolutions_have_the_range_of_their_smallest_step(
    settings: dict[str, Setting], models: dict[str, nn.Module]
) -> None:
    for name, amax in _seen(settings["W8A8"]).items():
        linear = is_linear(settings["W8A8"].layers[name])
        for row, factor in (("nvidia", 0.8), ("nvidia-64", 1.6)):
            expected = amax.max() if linear else factor * amax.mean(1).min()
            found = quantized_layers(models[row])[name].input_quantizer.amax
            assert float(found) == pytest.approx(float(expected), rel=1e-5), (row, name)
        if not linear:
            smooth = quantized_layers(models["nvidia-smoothquant"])[name].input_quantizer.amax
            assert float(smooth) == float(found)


def test_min_over_steps_by_hand() -> None:
    calibrator = others.MinOverSteps(steps=2, factor=0.8)
    assert calibrator.compute_amax() is None
    calibrator.collect(torch.tensor([[[1.0, -4.0]], [[2.0, 0.0]]]))  # step 0: 4 and 2
    calibrator.collect(torch.tensor([[[1.0, -1.0]], [[-2.0, 0.0]]]))  # step 1: 1 and 2
    assert float(calibrator.compute_amax()) == pytest.approx(0.8 * 1.5)
    for _ in range(2):
        calibrator.collect(torch.tensor([[0.3, 0.0]]))  # step 0: 0.3, then step 1
    assert float(calibrator.compute_amax()) == pytest.approx(0.8 * (1 + 2 + 0.3) / 3)
    calibrator.reset()
    assert calibrator.compute_amax() is None


def test_min_over_steps_is_the_example_at_its_sizes() -> None:
    """16 batches, 20 steps: sums over batches by the number of steps; the smallest."""
    amax = noise(16, (20,), 3).abs() + 0.1
    calibrator = others.MinOverSteps(steps=20, factor=0.8)
    for step in range(20):
        calibrator.collect(amax[:, step, None])
    assert float(calibrator.compute_amax()) == pytest.approx(float((amax.sum(0) / 20).min()), rel=1e-5)


def test_smoothquant_is_for_linear_layers(settings: dict[str, Setting], models: dict[str, nn.Module]) -> None:
    amax: dict[str, Tensor] = {}
    layers = {name: layer for name, layer in settings["W8A8"].layers.items() if is_linear(layer)}

    def keep(name: str, x: Tensor) -> None:
        largest = x.abs().flatten(0, -2).amax(0)
        amax[name] = torch.maximum(amax.get(name, largest), largest)

    hooks = [layer.register_forward_pre_hook(lambda _, a, n=name: keep(n, a[0])) for name, layer in layers.items()]
    settings["W8A8"].forward_loop(settings["W8A8"].model)
    for hook in hooks:
        hook.remove()
    for name, layer in quantized_layers(models["nvidia-smoothquant"]).items():
        factor = layer.input_quantizer.pre_quant_scale
        if name not in layers:
            assert factor is None
            continue
        expected = layers[name].weight.abs().amax(0) ** 0.2 / amax[name] ** 0.8
        torch.testing.assert_close(factor.flatten(), expected.clamp(1e-4, 1e4), rtol=1e-4, atol=0.0)
        assert float(layer.input_quantizer.amax) == pytest.approx(float((amax[name] * expected).max()), rel=1e-3)


def test_prunas_scales_are_the_largest_magnitudes_of_each_time(
    settings: dict[str, Setting], models: dict[str, nn.Module]
) -> None:
    table = tdq.scale_table(models["pruna"])
    seen = _seen(settings["FP8"])
    for column, name in enumerate(table.names):
        expected = seen[name.removesuffix(".input_quantizer")].amax(1).flip(0) / 448.0  # sampling goes down in time
        torch.testing.assert_close(table.scale[:, column], expected, rtol=1e-5, atol=0.0)


def test_our_stages_add_one_thing_each(models: dict[str, nn.Module]) -> None:
    def facts(name: str) -> tuple[bool, bool, bool, bool]:
        table = tdq.scale_table(models[name])
        smoothed = any(q.channel_divisor is not None for q in tdq.temporal_quantizers(models[name]).values())
        correction = tdq.layer_correction(models[name])
        over_time = correction is not None and any(len(gain) > 1 for gain in correction.gain.values())
        return len(table) == 1 or bool(table.is_static.all()), table.offset is not None, smoothed, over_time

    assert facts("static") == (True, False, False, False)
    assert facts("time") == (False, False, False, False)
    assert facts("offsets")[0] is False
    assert tdq.layer_correction(models["smoothing"]) is None


def test_our_stages_are_asked_for_one_thing_more_each(settings: dict[str, Setting]) -> None:
    asked = ("bins", "asymmetric", "channel_smoothing", "channel_shift", "margin", "rounding", "correction")

    class Told(Setting):
        def quantize(self, rules: list[dict[str, Any]], algorithm: Any) -> Any:
            return {name: algorithm.get(name) for name in asked}

    setting = Told(**{field.name: getattr(settings["W8A8"], field.name) for field in fields(Setting)})
    assert tuple(made(ROWS["static"], setting).values()) == (1, False, "none", "none", None, "nearest", "none")
    added = dict(zip(asked, (None, False, "none", "none", None, "nearest", "none"), strict=True))
    assert made(ROWS["time"], setting) == added
    stages = {
        "offsets": "asymmetric",
        "smoothing": "channel_smoothing",
        "shifts": "channel_shift",
        "margin": "margin",
        "rounding": "rounding",
        "corrections": "correction",
    }
    for name, field in stages.items():
        added[field] = "auto"
        assert made(ROWS[name], setting) == added
    assert made(ROWS["static-all"], setting) == {**added, "bins": 1}


@pytest.fixture
def tiny_too(tiny: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is among the reference models."""
    monkeypatch.setitem(REFERENCE_MODELS, "tiny", tiny.about)


def _bench(output: Path, *only: str, **fields: Any) -> Bench:
    return Bench(["tiny"], ["W8A8"], output, only, progress=False, **fields)


@pytest.mark.usefixtures("tiny_too")
def test_the_command_writes_tables_plot_and_results(tmp_path: Path, tiny: Subject) -> None:
    arguments = ["--models", "tiny", "--formats", "W4A8,W8A8", "--only", "time,max,dynamic-token"]
    sizes = ["--samples", "2", "--held-out", "1", "--steps", "4", "--output", str(tmp_path)]
    said = CliRunner().invoke(app, ["bench", "rivals", *arguments, *sizes])
    assert said.exit_code == 0, said.output
    text = (tmp_path / "rivals.md").read_text()
    assert text.index("## tiny, W8A8") < text.index("## tiny, W4A8")
    assert text.count("calibrated on 2 trajectories of 4 steps, judged on 1 others") == 2
    assert (tmp_path / "rivals.png").stat().st_size > 10_000
    found = list(json.loads((tmp_path / "rivals.json").read_text())["runs"].values())
    assert [(f["format"], f["row"]) for f in found] == [
        (bits, row) for bits in ("W8A8", "W4A8") for row in ("max", "dynamic-token", "time")
    ]
    for one in found:
        assert len(one["sqnr_db"]) == 4
        assert min(one["sqnr_db"]) == one["worst_sqnr_db"] <= one["mean_sqnr_db"]
        assert one["sizes"] == {"samples": 2, "held_out": 1, "steps": 4, "frechet": 0}
        assert one["source"]["command"].startswith("modelopt-tdq")
    by_row = {(f["format"], f["row"]): f for f in found}
    assert by_row["W8A8", "max"]["mean_sqnr_db"] > by_row["W4A8", "max"]["mean_sqnr_db"] + 6
    assert (
        by_row["W8A8", "dynamic-token"]["layers"]
        < by_row["W8A8", "max"]["layers"]
        == len(quantized_layers(made(ROWS["max"], _setting(tiny))))
    )


def _setting(tiny: Subject) -> Setting:
    start = noise(2, sample_shape(tiny.model), 0)
    return Setting(tiny.model, tiny.scheduler, FORMATS["W8A8"], start, 4, 1, 1, progress=False)


@pytest.mark.usefixtures("tiny_too")
def test_the_numbers_are_those_of_the_row(tmp_path: Path, tiny: Subject) -> None:
    """SQNR and PSNR once more, without the lab's own judge."""
    run_rivals(_bench(tmp_path, "mse", samples=2, held_out=2, steps=4), "command")
    (found,) = json.loads((tmp_path / "rivals.json").read_text())["runs"].values()
    model, start = made(ROWS["mse"], _setting(tiny)), noise(2, sample_shape(tiny.model), 1)
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    exact = sample(tiny.model, tiny.scheduler, start, 4, lambda *call: calls.append(call)).clamp(-1, 1)
    with torch.no_grad():
        for (time, x, full), expected in zip(calls, found["sqnr_db"], strict=True):
            error = (model(x, time) - full).double()
            ratio = full.double().square().sum() / error.square().sum()
            assert float(10 * ratio.log10()) == pytest.approx(expected, abs=0.02)
    error = sample(model, tiny.scheduler, start, 4).clamp(-1, 1) - exact
    assert float(10 * (4.0 / error.square().mean()).log10()) == pytest.approx(found["psnr_db"], abs=0.02)


class Colours:
    """A network for a Fréchet distance: the mean of each colour."""

    name = "colours"

    def __call__(self, images: Tensor) -> Tensor:
        return images.double().mean((2, 3))


@pytest.mark.usefixtures("tiny_too")
def test_frechet_distance_of_other_images(tmp_path: Path, tiny: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "EfficientNetLite0", Colours)
    monkeypatch.setattr(run, "_BATCH", 4)
    text = run_rivals(_bench(tmp_path, "max", "smoothing", "corrections", samples=2, frechet=6), "command")
    assert "Fréchet distance of 6 images" in text
    found = {f["row"]: f for f in json.loads((tmp_path / "rivals.json").read_text())["runs"].values()}
    assert not [f["failed"] for f in found.values() if "failed" in f]  # judging folded no weights that corrections need
    start = noise(6, sample_shape(tiny.model), 2)
    models = tiny.model, made(ROWS["max"], replace(_setting(tiny), steps=STEPS))
    full, quantized = (
        feature_statistics(to_uint8(sample(model, tiny.scheduler, start, STEPS).clamp(-1, 1)), Colours())
        for model in models
    )
    assert found["max"]["frechet"] == pytest.approx(frechet_distance(full, quantized), rel=1e-3)


@pytest.mark.usefixtures("tiny_too")
def test_finished_rows_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    interrupted = ["time"]

    def quick(row: Row, setting: Setting) -> nn.Module:
        if row.name in interrupted:
            raise KeyboardInterrupt
        ran.append(row.name)
        return made(ROWS["max"], setting)

    monkeypatch.setattr(run, "made", quick)
    bench = _bench(tmp_path, "max", "time", "smoothing", "corrections")
    with pytest.raises(KeyboardInterrupt):
        run_rivals(bench, "first")
    assert ran == ["max"]
    interrupted.clear()
    run_rivals(bench, "second")
    assert ran[1:] == ["time", "smoothing", "corrections"]
    stored = json.loads((tmp_path / "rivals.json").read_text())["runs"]
    assert [found["source"]["command"] for found in stored.values()] == ["first", *["second"] * 3]
    run_rivals(_bench(tmp_path, "max", "time", "smoothing", "corrections", "static"), "third")
    assert ran[4:] == ["static"]
    run_rivals(replace(bench, only=["time"], steps=4), "other sizes")
    assert ran[5:] == ["time"]
    assert "not run" in run_rivals(_bench(tmp_path, "mse"), "none", run=False)


@pytest.mark.usefixtures("tiny_too")
def test_a_row_that_fails_is_told_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> nn.Module:
        raise TdqError("bins", 7, "out of\nluck", "None")

    with monkeypatch.context() as patch:
        patch.setattr(run, "made", fails)
        assert "| ModelOpt max | - | - |" in run_rivals(_bench(tmp_path, "max"), "first")
        text = run_rivals(_bench(tmp_path, "max"), "first", run=False)
    assert "failed:" in text
    assert "out of luck" in text
    assert "failed:" not in run_rivals(_bench(tmp_path, "max"), "second")


def test_what_is_asked_for_is_checked(tmp_path: Path) -> None:
    with pytest.raises(TdqError, match="no such number format"):
        Bench(["unet"], ["W2A2"], tmp_path)
    with pytest.raises(TdqError, match="no such row"):
        Bench(["unet"], ["W8A8"], tmp_path, only=["best"])
    with pytest.raises(TdqError, match="no such reference model"):
        run_rivals(Bench(["transformer"], ["W8A8"], tmp_path), "command")
    with pytest.raises(TdqError, match="images to train on"):
        Bench(["unet"], ["W4A4"], tmp_path, only=["qat"])


def _found(layers: int, mean: float, worst: float, psnr: float | str) -> dict[str, Any]:
    sizes = {"samples": 1, "held_out": 1, "steps": 2, "frechet": 0}
    source = {"command": "c", "date": "d", "machine": "m", "versions": {}}
    numbers = {"mean_sqnr_db": mean, "worst_sqnr_db": worst, "psnr_db": psnr, "frechet": None}
    return {"layers": layers, "of_layers": 5, "calibration_seconds": 1.2, "sizes": sizes, "source": source, **numbers}


def test_the_best_of_all_rows_is_bold_and_of_those_with_all_layers_told() -> None:
    found = {"max": _found(5, 30.0, 10.0, 20.0), "dynamic-token": _found(2, 50.0, 9.0, "inf"), "time": None}
    text = markdown({("unet", "W8A8"): [(ROWS[name], one) for name, one in found.items()]})
    assert "| ModelOpt max | 5 of 5 | 30.00 | **10.00** | 20.00 | 1 | a constant |" in text
    assert "| dynamic per token, linear layers | 2 of 5 | **50.00** | 9.00 | **inf** | 1 |" in text
    assert "| scales over time | - | - | - | - | - | not run |" in text
    assert "all layers: SQNR mean, dB 30.00, SQNR worst step, dB 10.00, images, PSNR dB 20.00." in text
    assert "Fréchet" not in text
