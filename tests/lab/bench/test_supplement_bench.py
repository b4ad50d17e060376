"""The benchmark of the supplementary's tables on a tiny model: runs, resumes, writes, and does not flatter."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from modelopt_tdq.cli import app
from modelopt_tdq.core.table import ScaleTable
from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.bench.budget import BUDGETS, Budget, budget
from modelopt_tdq.lab.bench.cifar10 import load_cifar10
from modelopt_tdq.lab.bench.present import markdown, plot
from modelopt_tdq.lab.bench.ptq_run import PtqRun
from modelopt_tdq.lab.bench.qat_run import QatRun, full_precision
from modelopt_tdq.lab.bench.summary import RowSummary, rank_correlation, summarize
from modelopt_tdq.lab.bench.supplement import Bench, Store, _prepare, full_precision_key, runs_of, table_path
from modelopt_tdq.lab.bench.tables import PTQ_TABLE, QAT_TABLES, Row, Table, qat_table

diffusers = pytest.importorskip("diffusers")

_SMOKE = budget("smoke")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny class-conditional denoiser with its scheduler, and 40 random images."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bench")
    diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=10,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
    ).save_pretrained(folder / "model")
    diffusers.DDPMScheduler().save_pretrained(folder / "model" / "scheduler")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "cifar10.npz", X=pixels, y=np.arange(40) % 10, T=pixels[::-1], yt=np.arange(40) % 10)
    return folder


def bench(folder: Path, spent: Budget = _SMOKE) -> Bench:
    return Bench(folder / "model", folder / "cifar10.npz", spent, folder / "results")


def measured(folder: Path, run: Any) -> tuple[dict[str, Any], Path]:
    shared = bench(folder)
    model, sampler, data = _prepare(shared)
    path = table_path(shared, run.key(shared.checksum, shared.budget))
    return run.measure(model, sampler, data, shared.budget, full_precision(model, sampler, shared.budget), path), path


def test_a_training_run_leaves_its_result_and_its_table(folder: Path) -> None:
    result, path = measured(folder, QatRun(options={"intervals": "mlp"}))
    assert {"loss", "sqnr_db", "worst_sqnr_db", "psnr_db", "train_seconds", "run"} <= set(result)
    assert math.isfinite(result["loss"])
    assert result["worst_sqnr_db"] <= result["sqnr_db"]
    assert len(ScaleTable.load(path)) == _SMOKE.calibration_steps
    again, _ = measured(folder, QatRun(options={"intervals": "mlp"}))
    assert again["loss"] == result["loss"]  # the same seed, the same result
    # a static interval has no dropout: another seed is other batches
    static = [measured(folder, QatRun(options={"intervals": "static"}, seed=seed))[0]["loss"] for seed in (0, 1)]
    assert static[0] != static[1]


@pytest.mark.parametrize("scheme", ["pact", "nipq"])
def test_schemes_with_a_penalty_or_an_end_of_noise_run(folder: Path, scheme: str) -> None:
    result, _ = measured(folder, QatRun(options={"intervals": "static", "scheme": scheme}))
    assert math.isfinite(result["loss"])


def test_a_reconstruction_runs_and_too_few_samples_are_a_result(folder: Path) -> None:
    result, path = measured(folder, PtqRun(4, 8, 8, options={"intervals": "thin"}))
    assert math.isfinite(result["loss"])
    assert path.is_file()
    failed, _ = measured(folder, PtqRun(4, 8, 2, options={"intervals": "table", "bins": "per_step"}))
    assert "failed" in failed or math.isfinite(failed["loss"])


def test_the_command_writes_runs_tables_and_plots_and_resumes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (Row("full precision", 3.56, None), Row("one", 7.3, QatRun(options={"intervals": "static"}), (0,)))
    monkeypatch.setattr("modelopt_tdq.lab.bench.command.qat_table", lambda n: Table(n, "small", "a test", rows))
    arguments = ["bench", "supplement", "--table", "1", "--budget", "smoke", "--workers", "1"]
    arguments += ["--model", str(folder / "model"), "--data", str(folder / "cifar10.npz"), "--output"]
    output = folder / "out"
    assert CliRunner().invoke(app, [*arguments, str(output), "--no-run"]).exit_code == 0
    assert "| one | 7.3 | - |" in (output / "UNet2DModel_smoke_table1.md").read_text()
    result = CliRunner().invoke(app, [*arguments, str(output)])
    assert result.exit_code == 0, result.output
    content = json.loads((output / "UNet2DModel_smoke.json").read_text())
    assert len(content["runs"]) == 2
    assert "| one | 7.3 |" in (output / "UNet2DModel_smoke_table1.md").read_text()
    assert (output / "UNet2DModel_smoke_table1.png").stat().st_size > 5_000

    def untouched(*_: Any) -> None:
        raise AssertionError("a finished run was done again")

    monkeypatch.setattr("modelopt_tdq.lab.bench.supplement._work", untouched)
    assert CliRunner().invoke(app, [*arguments, str(output)]).exit_code == 0


def test_every_table_of_the_paper_is_there_and_no_run_twice() -> None:
    assert [t.number for t in QAT_TABLES] == [1, 2, 5, 6, 7]
    for table in (*QAT_TABLES, PTQ_TABLE):
        keys = [run.key("model", _SMOKE) for run in runs_of(table)]
        assert len(keys) == len(set(keys)), table.number
        assert all(len(row.seeds) >= 2 for row in table.rows) or table is PTQ_TABLE
    with pytest.raises(TdqError, match="no such table"):
        qat_table(3)
    with pytest.raises(TdqError, match="no such budget"):
        budget("free")


def test_a_key_changes_with_everything_that_changes_the_result() -> None:
    run = QatRun(options={"intervals": "mlp"})
    keys = {run.key(model, b) for model in ("a", "b") for b in BUDGETS.values()}
    keys |= {replace(run, **change).key("a", _SMOKE) for change in ({"seed": 1}, {"scale_lr": 1.0}, {"options": {}})}
    assert len(keys) == 2 * len(BUDGETS) + 3


def _rows(*losses: tuple[float | None, tuple[float, ...]]) -> list[RowSummary]:
    return [RowSummary(f"r{i}", p, loss, (), (), (), 1.0, (0,), 1) for i, (p, loss) in enumerate(losses)]


def test_rank_correlation() -> None:
    assert rank_correlation(_rows((1.0, (0.1,)), (2.0, (0.2,)), (3.0, (0.3,)))) == pytest.approx(1.0)
    assert rank_correlation(_rows((1.0, (0.3,)), (2.0, (0.2,)), (3.0, (0.1,)))) == pytest.approx(-1.0)
    # where the paper's training diverged, ours failing too is agreement
    assert rank_correlation(_rows((1.0, (0.1,)), (2.0, (0.2,)), (math.inf, (math.inf,)))) == pytest.approx(1.0)
    assert rank_correlation(_rows((1.0, (0.1,)), (None, (0.0,)), (2.0, (0.2,)))) is None


def test_failed_and_missing_runs_are_shown(tmp_path: Path) -> None:
    rows = (
        Row("full precision", 3.56, None),
        Row("good", 4.0, QatRun()),
        Row("bad", math.inf, QatRun(options={"encoding": "raw"})),
        Row("missing", None, QatRun(3, 3)),
    )
    table, shared = Table(2, "t", "s", rows), ("checksum", _SMOKE)
    good, bad = rows[1].run, rows[2].run
    assert good is not None
    assert bad is not None
    runs = {
        QatRun(0, 0).key(*shared): {"loss": 0.03, "wall_seconds": 1.0},
        replace(good, seed=0).key(*shared): {"loss": 0.033, "sqnr_db": 20.0, "wall_seconds": 2.0},
        replace(good, seed=1).key(*shared): {"loss": 0.036, "sqnr_db": 21.0, "wall_seconds": 2.0},
        replace(bad, seed=0).key(*shared): {"failed": "loss = nan", "wall_seconds": 2.0},
    }
    summary = summarize(table, runs, *shared)
    text = markdown(table, summary, [])
    assert "| good | 4 | 0.03450 ± 0.00150 | 15.0 ± 5.0 | 20.50 ± 0.50 |" in text
    assert "| bad | no result | failed |" in text
    assert "| missing | - | - |" in text
    assert "0 of 2" in text
    assert plot(table, summary, "tiny", tmp_path / "p.png").stat().st_size > 5_000


def test_results_of_another_version_are_refused(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"schema_version": 99, "runs": {}}')
    with pytest.raises(TdqError, match="another version"):
        Store(tmp_path / "r.json")


def test_a_table_takes_no_more_runs_of_other_data_settings_or_versions(folder: Path, tmp_path: Path) -> None:
    shared = replace(bench(folder), output=tmp_path)
    known = shared.facts()
    store = Store(tmp_path / "r.json")
    store.begin("model", known)
    store.add("a", {"loss": 1.0})
    again = Store(tmp_path / "r.json")
    again.begin("model", known)
    assert again.runs == {"a": {"loss": 1.0}}
    again.begin("another model", {**known, "data": "other"})
    for name, value in {"data": "other", "settings": "other", "device": "cuda", "versions": {}}.items():
        with pytest.raises(TdqError, match=f"of other {name}"):
            Store(tmp_path / "r.json").begin("model", {**known, name: value})
    (tmp_path / "old.json").write_text('{"schema_version": 1, "runs": {"a": {}}}')
    with pytest.raises(TdqError, match="not written down"):
        Store(tmp_path / "old.json").begin("model", known)


def test_facts_change_with_the_images_and_the_settings_of_model_and_scheduler(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    known = bench(folder).facts()
    copied = replace(bench(folder), model=tmp_path / "model")
    assert copied.facts() == known
    scheduler = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("0.02", "0.03"))
    assert copied.facts()["settings"] != known["settings"]
    np.savez(tmp_path / "cifar10.npz", X=np.zeros((1, 32, 32, 3), np.uint8))
    assert replace(copied, data=tmp_path / "cifar10.npz").facts()["data"] != known["data"]
    assert replace(copied, data=folder).facts()["data"] == known["data"]
    assert replace(copied, device="cuda").facts()["device"] == "cuda"


def test_data_that_is_no_cifar10_is_refused(tmp_path: Path, folder: Path) -> None:
    images, labels = load_cifar10(folder, "test")
    assert images.shape == (40, 3, 32, 32)
    assert labels.dtype == torch.int64
    np.savez(tmp_path / "cifar10.npz", X=np.zeros((2, 3)), y=np.zeros(2))
    for path, split, match in ((tmp_path, "train", "not uint8"), (tmp_path / "no.npz", "train", "no CIFAR-10 file")):
        with pytest.raises(TdqError, match=match):
            load_cifar10(path, split)
    with pytest.raises(TdqError, match="no such part"):
        load_cifar10(folder, "validation")


def test_the_key_of_full_precision_is_shared_by_all_tables(folder: Path) -> None:
    assert full_precision_key(bench(folder)) == full_precision_key(bench(folder))
