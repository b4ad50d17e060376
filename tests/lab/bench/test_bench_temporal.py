"""The comparison of temporal feature maintenance, on a tiny model: runs, resumes, writes, and does not flatter."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import FAMILIES
from typer.testing import CliRunner

from modelopt_tdq.cli import app
from modelopt_tdq.config import make_config
from modelopt_tdq.errors import MissingExtraError, TdqError
from modelopt_tdq.lab.bench.temporal.command import run_temporal
from modelopt_tdq.lab.bench.temporal.deploy import deploy
from modelopt_tdq.lab.bench.temporal.measure import measure
from modelopt_tdq.lab.bench.temporal.present import markdown, panels
from modelopt_tdq.lab.bench.temporal.rows import ROWS, TemporalRun, runs, temporal_budget
from modelopt_tdq.lab.bench.temporal.run import TemporalBench, _calibrated, maintained, yardstick
from modelopt_tdq.lab.example_call import example_call
from modelopt_tdq.lab.features import compute_features
from modelopt_tdq.lab.image_metrics.images import to_uint8
from modelopt_tdq.lab.image_metrics.statistics import feature_statistics
from modelopt_tdq.lab.maintenance import schedule_times
from modelopt_tdq.lab.model_folder import load_model
from modelopt_tdq.lab.trajectories import load_scheduler
from modelopt_tdq.temporal_features.runtime import feature_table, has_features

#: A bench of training runs in small: its rows are made by what other tests take apart.
pytestmark = pytest.mark.slow

diffusers = pytest.importorskip("diffusers")

_SMOKE = temporal_budget("smoke")


class Colours:
    """A network for a Fréchet distance: the mean of each colour."""

    name = "colours"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.double().mean((2, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny denoiser with its scheduler."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("temporal")
    diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
    ).save_pretrained(folder)
    diffusers.DDPMScheduler().save_pretrained(folder / "scheduler")
    return folder


def quick_config(*bits: int, **fields: Any) -> dict[str, Any]:
    return make_config(*bits, statistic="max", weights="max", protect_steps=False, **fields)


@pytest.fixture(scope="module", autouse=True)
def two_bit_widths() -> Iterator[None]:
    """No Fréchet distance, whose network takes longer than all the rest here; and scales that are quickly found."""

    def missing() -> None:
        raise MissingExtraError("module", "efficientnet", "not installed", "install it")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modelopt_tdq.lab.bench.temporal.run.make_config", quick_config)
        patch.setattr("modelopt_tdq.lab.bench.temporal.rows.BITS", ((8, 8), (4, 4)))
        patch.setattr("modelopt_tdq.lab.bench.temporal.run.EfficientNetLite0", missing)
        yield


@pytest.fixture(scope="module")
def w8a8(folder: Path) -> torch.nn.Module:
    return _calibrated(load_model(folder), load_scheduler(folder), runs()[0], _SMOKE)


@pytest.fixture
def calibrated(w8a8: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(w8a8)


@pytest.fixture(scope="module")
def results(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command wrote."""
    output = tmp_path_factory.mktemp("results") / "out"
    arguments = ["bench", "temporal-features", "--budget", "smoke", "--model", str(folder), "--output", str(output)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "| W8A8 | none | exact | exact |" in result.output
    return output


def _found(results: Path) -> dict[str, dict[str, Any]]:
    store = json.loads((results / "UNet2DModel_smoke.json").read_text())["runs"]
    return {f"W{r['run']['weight_bits']}A{r['run']['activation_bits']} {r['run']['label']}": r for r in store.values()}


def test_every_row_is_measured_with_its_source(results: Path) -> None:
    found = _found(results)
    assert len(found) == 12
    for row in found.values():
        assert len(row["judged"]["3"]["sqnr_db"]) == 3
        assert len(row["judged"]["4"]["sqnr_db"]) == 4
        assert {len(errors) for errors in row["feature_error_db"].values()} == {len(row["times"])}
        assert row["times"] == sorted(row["times"])
        assert {"command", "date", "machine", "versions"} <= row["source"].keys()
        assert float(row["judged"]["3"]["worst_sqnr_db"]) <= float(row["judged"]["3"]["mean_sqnr_db"])
    assert (results / "UNet2DModel_smoke.png").stat().st_size > 10_000
    text = (results / "UNet2DModel_smoke.md").read_text()
    assert text.count("\n|") == 14
    assert "Fréchet distance: left out" in text


def test_errors_are_ordered_as_they_must_be(results: Path) -> None:
    found = _found(results)

    def error(row: str) -> float:
        return float(found[row]["mean_feature_error_db"])

    for bits in ("W8A8", "W4A4"):
        assert error(f"{bits} none") == -math.inf
        assert error(f"{bits} cache, 16 bits") < error(f"{bits} cache") < error(f"{bits} naive")
        assert error(f"{bits} auto") <= max(error(f"{bits} TIB"), error(f"{bits} cache"))
    assert error("W8A8 cache") < error("W4A4 cache")
    assert error("W8A8 naive") < error("W4A4 naive")


def test_finished_rows_are_not_run_again(results: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def untouched(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished row was run again")

    monkeypatch.setattr("modelopt_tdq.lab.bench.temporal.run.measure", untouched)
    bench = TemporalBench(folder, _SMOKE, results)
    complete = run_temporal(bench, "again")
    assert "| W4A4 | none | exact |" in complete
    assert "Incomplete" not in complete
    path = bench.path.with_suffix(".json")
    before = path.read_text()
    content = json.loads(before)
    del content["runs"][bench.key(runs()[-1])]
    path.write_text(json.dumps(content))
    try:
        text = run_temporal(bench, "again", run=False)
        assert "|  | auto | - | - |" in text
        assert "Incomplete: 11 of 12 rows" in text
        with pytest.raises(AssertionError, match="was run again"):
            run_temporal(bench, "again")
    finally:
        path.write_text(before)


def test_a_key_changes_with_everything_that_changes_the_result() -> None:
    rows = runs()
    assert len({row.key(model, _SMOKE) for row in rows for model in "ab"}) == 2 * len(rows)
    one = rows[1]
    changed = [replace(_SMOKE, iterations=5), replace(_SMOKE, judged={3: 2}), replace(_SMOKE, name="other")]
    assert len({one.key("a", budget) for budget in (_SMOKE, *changed)}) == 4
    assert one.key("a", replace(_SMOKE, deployed=((8, 8),))) == one.key("a", _SMOKE)
    assert one.key("a", _SMOKE) != replace(one, options={"maintenance": "tib"}).key("a", _SMOKE)
    with pytest.raises(TdqError, match="no such budget"):
        temporal_budget("free")


def test_the_features_measured_are_those_that_the_model_uses(folder: Path, calibrated: torch.nn.Module) -> None:
    model, scheduler = load_model(folder), load_scheduler(folder)
    times = torch.tensor(schedule_times(scheduler, [3, 4]))
    full = compute_features(model, times)
    for label in ("none", "naive", "cache"):
        row = TemporalRun(8, 8, label, ROWS[label])
        student, seconds = maintained(calibrated, row, times, 4)
        assert (seconds > 0) == (label != "none")
        assert has_features(student) == (label == "cache")
        seen: dict[str, list[torch.Tensor]] = {name: [] for name in full}
        for name in full:
            student.get_submodule(name).register_forward_hook(lambda _, __, y, own=seen[name]: own.append(y[:1]))
        with torch.no_grad():
            for time in times:
                student(**example_call(student, 2, time.expand(2)))
        made = compute_features(student, times)
        for name, features in made.items():
            used = torch.cat(seen[name][-len(times) :] if label == "cache" else seen[name][: len(times)])
            assert torch.allclose(features, used, atol=1e-6), (label, name)
            assert torch.equal(features, full[name]) == (label == "none")
        assert has_features(calibrated) is False


def test_rows_of_the_feature_table_are_the_judged_times(folder: Path, calibrated: torch.nn.Module) -> None:
    scheduler = load_scheduler(folder)
    times = torch.tensor(schedule_times(scheduler, [3, 4]))
    assert times.tolist() == sorted({0.0, 333.0, 666.0, 250.0, 500.0, 750.0} | set(times.tolist()))
    student, _ = maintained(calibrated, TemporalRun(8, 8, "cache", ROWS["cache"]), times, 4)
    assert feature_table(student).contains(times).all()


def test_nothing_but_the_temporal_features_differs_between_rows(folder: Path, calibrated: torch.nn.Module) -> None:
    model, scheduler = load_model(folder), load_scheduler(folder)
    against = yardstick(model, scheduler, _SMOKE, lambda: None)
    rows = [TemporalRun(8, 8, "none", None), TemporalRun(8, 8, "", {"maintenance": "cache", "cache_bits": 32})]
    students = [maintained(calibrated, row, against.times, 4)[0] for row in rows]
    first, second = (measure(student, against, lambda: None) for student in students)
    assert float(second["mean_feature_error_db"]) < -120.0  # rounding in float32: batches of another size
    for steps in first["judged"]:
        assert second["judged"][steps]["sqnr_db"] == pytest.approx(first["judged"][steps]["sqnr_db"], abs=0.05)


def test_images_are_compared_with_those_of_full_precision(folder: Path, calibrated: torch.nn.Module) -> None:
    model, scheduler = load_model(folder), load_scheduler(folder)
    against = yardstick(model, scheduler, _SMOKE, lambda: None)
    images = feature_statistics(to_uint8(against.references[3].images), Colours())
    judged = replace(against, extractor=Colours(), images=images)
    ticks: list[None] = []
    assert measure(calibrated, judged, lambda: ticks.append(None))["frechet"] > 0.0
    assert len(ticks) == judged.ticks == 14


def test_what_was_not_run_is_a_dash_and_not_drawn() -> None:
    found = dict.fromkeys(runs(), (None, None))
    text = markdown(found, ["note"])
    assert text.count("| - | - |") >= 18
    assert panels(found) == []


def test_models_that_need_text_are_refused(tmp_path: Path) -> None:
    FAMILIES["unet_condition"].make().save_pretrained(tmp_path)
    diffusers.DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    arguments = ["bench", "temporal-features", "--budget", "smoke", "--model", str(tmp_path)]
    result = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "more than noise, a time and classes" in result.stderr
    assert not (tmp_path / "out").exists()


def test_deployment_is_measured(calibrated: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tensorrt_rtx" else name)
    found = deploy(calibrated)
    assert 10_000 < found["onnx_bytes"] < 1_000_000
    assert found["kernels"] is None
