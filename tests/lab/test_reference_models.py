"""Reference models by name, and what the commands say of one that is missing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from modelopt_tdq.cli import app
from modelopt_tdq.cli.calibration import prepare
from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab import terrain
from modelopt_tdq.lab.reference_models import REFERENCE_MODELS, bundled_model, model_of, reference_model
from modelopt_tdq.lab.trajectories import is_unconditional

diffusers = pytest.importorskip("diffusers")


def test_names() -> None:
    assert list(REFERENCE_MODELS) == ["unet", "dit", "terrain"]
    assert all(model.name == name and model.title for name, model in REFERENCE_MODELS.items())
    with pytest.raises(TdqError, match="Use unet, dit, terrain"):
        reference_model("vae")


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_bundled_models_are_loaded_with_their_schedulers(name: str) -> None:
    chosen = reference_model(name)
    assert (bundled_model(name) / "scheduler" / "scheduler_config.json").is_file()
    model: Any = chosen.load_model()
    assert type(model).__name__ == {"unet": "UNet2DModel", "dit": "DiTTransformer2DModel"}[name]
    assert is_unconditional(model)
    assert not model.training
    assert type(chosen.load_scheduler()).__name__ == "DDIMScheduler"


def test_a_folder_is_a_model_too(tmp_path: Path) -> None:
    shutil.copytree(bundled_model(), tmp_path / "mine")
    chosen = model_of(tmp_path / "mine")
    assert chosen.name == str(tmp_path / "mine")
    assert chosen.checksum() == reference_model("unet").checksum()
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "mine", other)
    scheduler = diffusers.DDIMScheduler.from_pretrained(other / "scheduler", beta_end=0.5)
    scheduler.save_pretrained(other / "scheduler")
    assert model_of(other).checksum() != chosen.checksum()
    assert type(chosen.load_model()).__name__ == "UNet2DModel"
    with pytest.raises(TdqError, match="neither a reference model nor a folder"):
        model_of(tmp_path / "none").checksum()


def test_calibration_suits_the_model_unless_it_is_given() -> None:
    prepared = prepare("unet", None, None, None, None, 0)
    assert (prepared.source, prepared.steps, prepared.expected_calls) == ("unet", 20, 20)
    assert (prepared.done["samples"], prepared.done["steps"]) == (16, 20)
    prepared = prepare(None, None, None, None, 5, 0, most_samples=8)
    assert (prepared.source, prepared.done["samples"], prepared.done["steps"]) == ("unet", 8, 5)


@pytest.mark.parametrize("command", [["demo"], ["analyze"], ["quantize"]])
def test_a_missing_package_is_one_clear_line(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terrain, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, [*command, "--model", "terrain", "--output", str(tmp_path / "out")])
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    assert "pip install --no-deps adaptive-terrain-diffusion==0.4.2" in lines[0]
