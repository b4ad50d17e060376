"""The demo, end to end, as small as it gets: a small model, few steps, one recipe, two samples, no engines."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from rich.console import Console
from support.processes import ForkedModule
from support.slow import slow_but

from modelopt_tdq.core.table import ScaleTable
from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.demo import DemoSettings, run_demo
from modelopt_tdq.lab.demo.cache import StageCache, StageResult
from modelopt_tdq.lab.demo.gather import gather
from modelopt_tdq.lab.demo.pool import run_stages
from modelopt_tdq.lab.demo.run import available_backends, unfinished
from modelopt_tdq.lab.demo.stages import run, stages
from modelopt_tdq.lab.demo.variants import variant_config
from modelopt_tdq.lab.model_folder import load_quantized
from modelopt_tdq.lab.reference_models import REFERENCE_MODELS, ReferenceModel, bundled_model
from modelopt_tdq.lab.report.figures import draw_figures
from modelopt_tdq.lab.report.html import write_html
from modelopt_tdq.lab.report.results import load_results
from modelopt_tdq.lab.terrain import TerrainScheduler, TerrainUNet

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")


#: Of activations in the model.
QUANTIZERS = 16


def _run(settings: DemoSettings) -> tuple[dict[str, Any], str]:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    results = run_demo(settings, console, "modelopt-tdq demo")
    return results, console.export_text()


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> DemoSettings:
    """Of a model that is calibrated in a few seconds."""
    import diffusers
    from support.models import SMALL_UNET

    folder = tmp_path_factory.mktemp("demo")
    torch.manual_seed(0)
    model: Any = SMALL_UNET.make()
    model.save_pretrained(folder / "model")
    diffusers.DDIMScheduler().save_pretrained(folder / "model" / "scheduler")
    return DemoSettings(
        model=str(folder / "model"),
        output=folder / "out",
        recipes=("int8",),
        steps=3,
        samples=2,
        calibration_samples=2,
        calibration_steps=3,
        engines=False,
        workers=1,
    )


_FORKED = SimpleNamespace(Popen=ForkedModule, PIPE=None)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers import nothing anew, which takes longer than what they do here; those of ``first`` are the real ones."""
    monkeypatch.setattr("modelopt_tdq.lab.demo.pool.subprocess", _FORKED)


@pytest.fixture(scope="module")
def first(settings: DemoSettings) -> tuple[dict[str, Any], str]:
    return _run(settings)


def test_results(settings: DemoSettings, first: tuple[dict[str, Any], str]) -> None:
    results, text = first
    assert load_results(settings.output / "results.json") == json.loads(json.dumps(results))
    variants = {row["variant"]: row for row in results["rows"]}
    assert list(variants) == ["fp32", "max", "static", "tdq"]
    assert all(
        len(variants[v]["sqnr_db"]) == 3 and float(variants[v]["psnr_db"]) > 20 for v in ("max", "static", "tdq")
    )
    assert min(float(v) for v in variants["tdq"]["sqnr_db"]) == float(variants["tdq"]["sqnr_worst_db"])
    assert variants["max"]["sqnr_db"] != variants["static"]["sqnr_db"] != variants["tdq"]["sqnr_db"]
    assert variants["tdq"]["table"]["bytes"] > variants["static"]["table"]["bytes"] == 4 * QUANTIZERS
    assert (variants["max"]["table"]["bytes"], variants["static"]["table"]["temporal"]) == (4 * QUANTIZERS, 0)
    assert {"torch", "nvidia-modelopt"} <= set(results["versions"])
    assert results["machine"]["cores"] >= 1
    assert "TDQ mse" in text


def test_files(settings: DemoSettings, first: tuple[dict[str, Any], str]) -> None:
    results, _ = first
    assert {figure["section"] for figure in results["figures"]} == {"sqnr", "images", "scales", "details"}
    for figure in results["figures"]:
        file = settings.output / figure["file"]
        assert file.read_bytes().startswith({".svg": b"<?xml", ".png": b"\x89PNG"}[file.suffix])
    page = (settings.output / "report.html").read_text()
    assert "http:" not in page
    assert "https:" not in page
    assert all(s.startswith("data:") for s in re.findall(r'(?:src|href)="([^"]{0,20})', page))


def test_quantized_model_is_left_for_the_other_commands(
    settings: DemoSettings, first: tuple[dict[str, Any], str]
) -> None:
    folder = settings.output / "models" / "int8-tdq"
    table = ScaleTable.load(folder / "scale_table")
    assert table.scale.shape == (3, QUANTIZERS)
    found = load_quantized(folder)
    with torch.no_grad():
        prediction = found.model(torch.zeros(1, 3, 8, 8), torch.tensor(300)).sample
    assert prediction.isfinite().all()
    assert found.inputs["sample"]["shape"] == [2, 3, 8, 8]


def test_second_run_computes_nothing(settings: DemoSettings, first: tuple[dict[str, Any], str]) -> None:
    before = {f: f.stat().st_mtime_ns for f in (settings.output / "cache").iterdir()}
    assert unfinished(settings, available_backends()) == []
    again, text = _run(settings)
    assert "2 of 2 stages are done already" in text
    assert again["rows"] == first[0]["rows"]
    assert {f: f.stat().st_mtime_ns for f in (settings.output / "cache").iterdir()} == before


def test_only_what_depends_on_a_setting_is_done_again(
    settings: DemoSettings, first: tuple[dict[str, Any], str]
) -> None:
    def left(**changes: Any) -> list[str]:
        changed = dataclasses.replace(settings, **changes)
        return [stage.name for stage in unfinished(changed, available_backends())]

    assert left(steps=4) == ["reference", "recipe-int8"]
    assert left(calibration_samples=3) == ["recipe-int8"]
    assert left(recipes=("int8", "w4a4")) == ["recipe-w4a4"]


def test_interrupted_stage_is_done_again(settings: DemoSettings, first: tuple[dict[str, Any], str]) -> None:
    cache = settings.output / "cache"
    stage = stages(settings, available_backends())[1]
    arrays = (cache / f"{stage.name}.safetensors").read_bytes()
    try:
        (cache / f"{stage.name}.safetensors").write_bytes(arrays[:1000])
        assert unfinished(settings, available_backends()) == [stage]
    finally:
        (cache / f"{stage.name}.safetensors").write_bytes(arrays)
    assert unfinished(settings, available_backends()) == []


@pytest.mark.usefixtures("forked")
def test_error_in_a_worker_reaches_the_user(settings: DemoSettings, tmp_path: Path) -> None:
    empty = dataclasses.replace(settings, output=tmp_path)
    preset = stages(empty, frozenset())[1]
    with pytest.raises(TdqError, match="result of stage 'reference' is gone"):
        run_stages([preset], {"reference"}, empty, frozenset(), lambda stage, fraction: None)


def test_cache_keeps_and_forgets(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)
    for name in ("made", "also"):
        (tmp_path / name).write_text("x")
    result = StageResult({"a": 1}, {"t": torch.arange(3.0)}, ["made", "also"])
    cache.store("stage", {"steps": 1}, result)
    found = cache.load("stage", {"steps": 1})
    assert found is not None
    assert found.values == {"a": 1}
    assert torch.equal(found.tensors["t"], torch.arange(3.0))
    assert cache.load("stage", {"steps": 2}) is None
    (tmp_path / "made").unlink()
    assert cache.load("stage", {"steps": 1}) is None
    cache.clear()
    assert not cache.folder.exists()


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("maintenance", slow_but(("naive", "cache"), "cache"))
def test_temporal_features(settings: DemoSettings, first: tuple[dict[str, Any], str], maintenance: str) -> None:
    output, without = settings.output.parent / maintenance, first[0]
    changed = dataclasses.replace(settings, output=output, maintenance=maintenance)
    results, text = _run(changed)
    assert f"TDQ mse + {maintenance}" in text
    rows = {row["variant"]: row for row in results["rows"]}
    plain = {row["variant"]: row for row in without["rows"]}
    for variant in ("max", "static"):
        assert rows[variant]["sqnr_db"] == plain[variant]["sqnr_db"]
    facts = results["features"]["int8"]
    assert len(facts["names"]) == 5
    page = (output / "report.html").read_text()
    assert "Temporal features" in page
    assert (output / "plots" / "features.svg").stat().st_size > 10_000
    assert load_results(output / "results.json")["features"] == results["features"]
    if maintenance == "cache":
        assert [cells[2] for cells in facts["rows"]] == ["cache"] * 5
        assert facts["sqnr_exact_db"] == plain["tdq"]["sqnr_db"]  # nothing else differs
        assert rows["tdq"]["sqnr_db"] != plain["tdq"]["sqnr_db"]
        assert "down_blocks.0.resnets.0.time_emb_proj" in page


def test_without_maintenance_nothing_changes(settings: DemoSettings) -> None:
    assert "maintenance" not in settings.calibrated("int8")  # so that older results still count
    assert variant_config("int8", "tdq") == variant_config("int8", "tdq", "none", [1.0])
    left = [s.name for s in unfinished(dataclasses.replace(settings, maintenance="auto"), available_backends())]
    assert left == ["recipe-int8"]


@pytest.fixture
def height_maps(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a model of another kind: one channel, classes, sigmas, a scheduler that is not of diffusers."""

    def load() -> TerrainUNet:
        torch.manual_seed(0)
        return TerrainUNet(sample_size=16, channels=(32,), attention=(False,), blocks=1, embedding=32).eval()

    weights = bundled_model() / "config.json"
    numbers = {"steps": 3, "samples": 3, "calibration_steps": 3, "calibration_samples": 2, "batch": 2}
    small = ReferenceModel("maps", "Maps", load, TerrainScheduler, lambda: weights, "clean maps", **numbers)
    monkeypatch.setitem(REFERENCE_MODELS, "maps", small)
    return "maps"


@pytest.mark.slow
def test_a_model_of_another_kind(height_maps: str, tmp_path: Path) -> None:
    """In this process, so that the stages find it: sampled, quantized, exported and run in OpenVINO, drawn."""
    pytest.importorskip("openvino")
    settings = DemoSettings.for_model(height_maps, output=tmp_path, recipes=("int8",), samples=None)
    assert (settings.steps, settings.samples, settings.batch) == (3, 3, 2)
    backends = frozenset({"onnx", "openvino"})
    for stage in stages(settings, backends):
        run(stage, settings, backends, lambda fraction: None)
    results, arrays = gather(settings, backends, "modelopt-tdq demo --model maps")
    rows = {row["variant"]: row for row in results["rows"]}
    assert arrays["reference"]["images"].shape == (3, 1, 16, 16)
    assert results["timesteps"] == pytest.approx([80.0, 2.53, 0.08], abs=0.01)
    # the deployed graph got each sample its class, and the noise that full precision had, in batches of 2 and 1
    deployed = [float(v) for v in results["openvino"]["sqnr_db"]]
    assert deployed == pytest.approx([float(v) for v in rows["tdq"]["sqnr_db"]], abs=1.0)
    assert min(deployed) > 25
    assert float(rows["tdq"]["psnr_db"]) > 35
    figures = draw_figures(results, arrays, tmp_path)
    assert any("Prediction of the clean maps" in figure["caption"] for figure in figures)
    results["figures"] = figures
    page = write_html(results, tmp_path, tmp_path / "report.html").read_text()
    assert "Maps" in page
    assert "CIFAR" not in page


def test_a_model_in_another_type_and_offloaded(settings: DemoSettings, tmp_path: Path) -> None:
    changed = dataclasses.replace(settings, output=tmp_path, dtype="bf16", offload="group")
    for stage in stages(changed, frozenset()):
        run(stage, changed, frozenset(), lambda fraction: None)
    results, arrays = gather(changed, frozenset(), "modelopt-tdq demo --dtype bf16 --offload group")
    assert arrays["reference"]["images"].dtype == torch.float32
    # against the model in the same type
    judged = [row["sqnr_db"] for row in results["rows"] if row["sqnr_db"] is not None]
    assert judged
    assert all(min(map(float, decibels)) > 20 for decibels in judged)
    folder = tmp_path / "models" / "int8-tdq"
    saved = safetensors.torch.load_file(next(folder.rglob("*.safetensors")))
    assert saved["conv_in.weight"].dtype == torch.bfloat16
    assert load_quantized(folder).inputs["sample"]["dtype"] == "bfloat16"


def test_results_belong_to_a_model(height_maps: str, settings: DemoSettings, first: tuple[dict[str, Any], str]) -> None:
    left = [s.name for s in unfinished(dataclasses.replace(settings, model=height_maps), available_backends())]
    assert left == ["reference", "recipe-int8"]


def test_a_model_with_text_is_refused(tmp_path: Path) -> None:
    from support.models import FAMILIES

    model: Any = FAMILIES["unet_condition"].make()
    model.save_pretrained(tmp_path)
    with pytest.raises(TdqError, match="takes more than a sample and a time"):
        DemoSettings(model=str(tmp_path)).load()


def test_settings_are_checked() -> None:
    for wrong in (
        {"maintenance": "some"},
        {"recipes": ("int9",)},
        {"recipes": ()},
        {"steps": 1},
        {"samples": 0},
        {"workers": 0},
        {"device": "tpu"},
        {"dtype": "int8"},
        {"offload": "some"},
        {"dtype": "bf16"},  # with engines
    ):
        with pytest.raises(TdqError):
            DemoSettings(**wrong)  # type: ignore[arg-type]
    settings = DemoSettings(recipes=("w4a4",), workers=3)
    assert DemoSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
