"""Heat maps of temporal features: what they show, and labels that can be read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from modelopt_tdq.lab.report import feature_plots
from modelopt_tdq.lab.report.feature_plots import FeatureErrorPanels, draw_feature_errors, feature_labels

pytest.importorskip("matplotlib")

TIMES = [0.0, 10.0, 500.0]
FEATURES = ["down_blocks.0.resnets.0.time_emb_proj", "up_blocks.1.resnets.1.time_emb_proj"]


def _panels(**changes: Any) -> FeatureErrorPanels:
    errors = {
        "naive": torch.tensor([[-10.0, -20.0, -30.0], [-11.0, -21.0, -31.0]]),
        "TIB": torch.tensor([[-40.0, -40.0, -40.0], [-41.0, -41.0, -math.inf]]),
    }
    sqnr = {
        "none": ([500.0, 0.0], [30.0, 20.0]),
        "naive": ([500.0, 0.0], [28.0, 15.0]),
        "TIB": ([500.0, 0.0], [30, 20]),
    }
    return FeatureErrorPanels(
        **{"title": "W8A8", "times": TIMES, "features": FEATURES, "errors": errors, "sqnr": sqnr, **changes}
    )


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    kept: list[Figure] = []
    original = feature_plots.save_figure

    def save(figure: Figure, path: Path, dpi: int) -> Path:
        kept.append(figure)
        return original(figure, path, dpi)

    monkeypatch.setattr(feature_plots, "save_figure", save)

    def draw(*panels: FeatureErrorPanels) -> Figure:
        assert draw_feature_errors(panels, tmp_path / "p.png", "title").read_bytes()[:4] == b"\x89PNG"
        return kept[-1]

    return draw


def test_sampling_runs_to_the_right_on_one_colour_scale(drawn: Any) -> None:
    figure = drawn(_panels(), _panels(title="W4A4", errors={k: v + 5 for k, v in _panels().errors.items()}))
    maps = [axis for axis in figure.axes if axis.get_images()]
    assert len(maps) == 4
    (first,) = maps[0].get_images()
    assert first.get_array().tolist() == [[-30.0, -20.0, -10.0], [-31.0, -21.0, -11.0]]
    limits = {(axis.get_images()[0].norm.vmin, axis.get_images()[0].norm.vmax) for axis in maps}
    assert limits == {(-41.0, -5.0)}  # over all maps; an exact feature is not on the scale
    assert float(maps[1].get_images()[0].get_array().min()) == -41.0
    assert [label.get_text() for label in maps[2].get_xticklabels()] == ["500", "10", "0"]
    assert [label.get_text() for label in maps[0].get_yticklabels()] == ["down.0.res.0", "up.1.res.1"]


def test_curves_are_what_changes_against_full_precision(drawn: Any) -> None:
    curves = [axis for axis in drawn(_panels()).axes if axis.get_ylabel() == "change of the SQNR, dB"]
    lines = {line.get_label(): list(line.get_ydata()) for line in curves[0].get_lines()}
    assert lines["naive"] == [-2.0, -5.0]
    assert lines["TIB"] == [0.0, 0.0]
    alone = drawn(_panels(sqnr={"chosen": ([500.0, 0.0], [30.0, math.inf])}))
    (axis,) = [axis for axis in alone.axes if axis.get_ylabel() == "SQNR, dB"]
    assert axis.get_lines()[0].get_ydata()[0] == 30.0


def test_without_curves_and_with_nothing_but_exact_features(drawn: Any) -> None:
    exact = {"chosen": torch.full((2, 3), -math.inf)}
    figure = drawn(_panels(sqnr={}, errors=exact))
    assert len(figure.axes) == 2  # the map and its colour bar


def test_labels() -> None:
    assert feature_labels(FEATURES) == ["down.0.res.0", "up.1.res.1"]
    blocks = [f"transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_2" for i in (0, 5)]
    assert feature_labels(blocks) == ["transformer.0", "transformer.5"]
    assert feature_labels(["time_embedding"]) == ["time_embedding"]
    assert feature_labels(["mid_block.resnets.0.emb", "emb"]) == ["mid.res.0.emb", "emb"]
    assert len(set(feature_labels(["a.0.x", "a.1.x", "a.1.y"]))) == 3
