from pathlib import Path

import pytest
import torch
from support.processes import run_fresh

from modelopt_tdq.lab.report.plots import image_grid, scale_heat_map, scales_over_time, sqnr_per_step, time_axis

pytest.importorskip("matplotlib")
PNG = b"\x89PNG"


def test_every_plot_writes_a_png_in_a_new_folder(tmp_path: Path) -> None:
    times, names = torch.tensor([0.0, 500.0, 950.0]), [f"layer.{i}.input_quantizer" for i in range(3)]
    scale = torch.rand(3, 3) + 0.1
    drawn = [
        image_grid({"a": torch.rand(2, 3, 8, 8) * 2 - 1, "b": torch.zeros(2, 3, 8, 8)}, tmp_path / "new" / "grid.png"),
        sqnr_per_step({"W8A8": {"tdq": ("TDQ", [1.0, 2.0, 3.0])}}, times.tolist(), tmp_path / "new" / "sqnr.png"),
        scales_over_time(
            names, times, {"max": ("m", scale[0]), "tdq": ("t", scale)}, tmp_path / "new" / "s.png", columns=2
        ),
        scale_heat_map(names, times, scale, tmp_path / "new" / "heat.png"),
    ]
    assert [path.read_bytes()[:4] for path in drawn] == [PNG] * 4


def test_height_maps_are_coloured_over_the_range_of_the_first_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by the formats' range, in which maps near -1 would be all one colour, and not each by its own."""
    from matplotlib.axes import Axes

    looks = []
    imshow = Axes.imshow
    monkeypatch.setattr(
        Axes, "imshow", lambda self, picture, **look: looks.append(look) or imshow(self, picture, **look)
    )
    first = torch.linspace(-1.0, -0.8, 128).reshape(2, 1, 8, 8)
    image_grid({"FP32": first, "W8A8": first + 0.05}, tmp_path / "grid.png")
    assert len(looks) == 4
    assert {(look["vmin"], look["vmax"]) for look in looks} == {(float(first.min()), float(first.max()))}


def test_sigmas_are_drawn_by_their_logarithms() -> None:
    assert time_axis([80.0, 8.0, 0.8, 0.08]) == "log"
    for times in ([999.0, 500.0, 1.0], [950.0, 500.0, 0.0], [3.0], [1.0, 0.0005, 0.0]):
        assert time_axis(times) == "linear"


def test_infinite_decibels_and_constant_scales_can_be_drawn(tmp_path: Path) -> None:
    path = sqnr_per_step({"W8A8": {"tdq": ("TDQ", [float("inf"), 2.0])}}, [900.0, 0.0], tmp_path / "sqnr.png")
    assert path.read_bytes()[:4] == PNG
    assert scale_heat_map(["a"], torch.tensor([0.0, 1.0]), torch.ones(2, 1), tmp_path / "h.png").is_file()


def test_an_svg_follows_light_and_dark_and_is_the_same_every_time(tmp_path: Path) -> None:
    panels = {"W8A8": {"tdq": ("TDQ", [1.0, 2.0])}, "W4A4": {"tdq": ("TDQ", [10.0, 20.0])}}
    drawn = [sqnr_per_step(panels, [900.0, 0.0], tmp_path / str(i) / "sqnr.svg").read_text() for i in range(2)]
    assert drawn[0] == drawn[1]
    assert "prefers-color-scheme: dark" in drawn[0]
    assert "#000000" not in drawn[0]
    assert "SQNR, dB</text>" in drawn[0]
    assert "<script" not in drawn[0]


def test_panels_that_are_compared_have_the_same_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k))
    panels = {"W8A8": {"tdq": ("TDQ", [1.0, 2.0])}, "W4A4": {"tdq": ("TDQ", [10.0, 20.0])}}
    sqnr_per_step(panels, [900.0, 0.0], tmp_path / "sqnr.svg")
    scale = torch.tensor([[1.0, 100.0], [4.0, 150.0]])
    scales = {"static": ("s", torch.tensor([2.0, 100.0])), "tdq": ("t", scale)}
    scales_over_time(["a", "b"], torch.tensor([0.0, 900.0]), scales, tmp_path / "scales.svg")
    for figure in figures:
        assert len({axis.get_ylim() for axis in figure.axes}) == 1
    a, b = (axis.lines[-1].get_ydata().tolist() for axis in figures[1].axes)
    assert a == [-1.0, 1.0]  # half of and twice the static scale
    assert b == pytest.approx([0.0, 0.585], abs=1e-3)


def test_no_window_system_and_no_pyplot(tmp_path: Path) -> None:
    script = (
        "import sys, torch; from pathlib import Path; from modelopt_tdq.lab.report.plots import scale_heat_map;"
        f"scale_heat_map(['a'], torch.tensor([0.0, 1.0]), torch.ones(2, 1), Path({str(tmp_path)!r}) / 'h.png');"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    code, printed = run_fresh(script, tmp_path)
    assert code == 0, printed
