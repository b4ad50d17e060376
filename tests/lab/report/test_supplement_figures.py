"""Figures 1 to 9 of the supplementary: what is in them, from which results, and what is said where some are missing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

from modelopt_tdq.calibration.statistics import StepStatistics
from modelopt_tdq.cli import app
from modelopt_tdq.config import recipe
from modelopt_tdq.core.table import ScaleTable
from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.bench.activations import LayerActivation, distinct_inputs, measure_activations, most_and_least
from modelopt_tdq.lab.bench.budget import BUDGETS, Budget
from modelopt_tdq.lab.bench.kept_tables import kept_tables
from modelopt_tdq.lab.bench.qat_run import QatRun, checksum
from modelopt_tdq.lab.bench.tables import qat_table
from modelopt_tdq.lab.demo import variants
from modelopt_tdq.lab.model_folder import load_model
from modelopt_tdq.lab.report import interval_plots, supplement
from modelopt_tdq.lab.report.interval_plots import Curve, IntervalAndSpread, Panel, correlation
from modelopt_tdq.lab.trajectories import load_scheduler
from modelopt_tdq.model.timestep import CurrentTimestep

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

PNG = b"\x89PNG"
TIMES = torch.tensor([0.0, 300.0, 900.0])
SMOKE, FULL = BUDGETS["smoke"], BUDGETS["full"]
SMALL = {
    "sample_size": 8,
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "num_class_embeds": 3,
}


def trained(label: str) -> QatRun:
    """The run of a row of the table with three seeds."""
    (run,) = [row.run for row in qat_table(6).rows if row.label == label]
    assert run is not None
    return run


def keep(
    folder: Path, model: Path, names: list[str], runs: dict[tuple[str, int], float | None], budget: Budget
) -> None:
    """Results as the benchmark leaves them: by row and seed, how its interval grows over time; None: no table."""
    stored: dict[str, Any] = {}
    for (label, seed), growth in runs.items():
        key = replace(trained(label), seed=seed).key(checksum(model), budget)
        stored[key] = {"loss": 0.1}
        if growth is not None:
            scale = (0.1 * growth ** (TIMES / 900)).unsqueeze(1).expand(-1, len(names))
            ScaleTable(TIMES, scale, names).save(folder / "tables" / f"{key}.safetensors")
    folder.mkdir(exist_ok=True)
    (folder / f"model_{budget.name}.json").write_text(json.dumps({"schema_version": 1, "runs": stored}))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small class-conditional model, its scheduler beside it."""
    folder = tmp_path_factory.mktemp("models") / "small"
    torch.manual_seed(0)
    diffusers.UNet2DModel(**SMALL).save_pretrained(folder)
    diffusers.DDPMScheduler().save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module")
def layers(model: Path) -> list[LayerActivation]:
    return measure_activations(load_model(model), load_scheduler(model), 2, 3, 0, progress=False)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are written, for a look at what is in them."""
    figures: list[Any] = []
    for module in (interval_plots, supplement):
        write = module.save_figure

        def spy(figure: Any, path: Path, dpi: int, write: Any = write) -> Path:
            figures.append(figure)
            return write(figure, path, dpi)

        monkeypatch.setattr(module, "save_figure", spy)
    return figures


def quick_recipe(name: str) -> dict[str, Any]:
    config = recipe(name)
    config["algorithm"] |= {"statistic": "max", "weights": "max", "protect_steps": False, "correction": "none"}
    config["algorithm"] |= {"channel_smoothing": "none", "rounding": "nearest"}
    return config


def curves(*seeds: int) -> dict[int, Curve]:
    return {seed: Curve(TIMES, torch.tensor([0.1, 0.2, 0.3]) + 0.01 * seed) for seed in seeds}


def shown(figure: Any) -> list[Any]:
    return [axis for axis in figure.axes if axis.get_visible() and axis.get_title()]


def test_a_line_per_seed_and_one_per_static_interval(drawn: list[Any], tmp_path: Path) -> None:
    static = {0: Curve(TIMES, torch.full((3,), 0.15))}
    panels = [Panel(f"layer.{i}.input_quantizer", curves(0, 1, 2), static) for i in range(4)]
    path = interval_plots.intervals_over_time(panels, tmp_path / "new" / "1.png", columns=3)
    assert path.read_bytes()[:4] == PNG
    axes = shown(drawn[0])
    assert [axis.get_title() for axis in axes] == [f"layer.{i}" for i in range(4)]
    assert [len(axis.lines) for axis in axes] == [4] * 4
    (legend,) = drawn[0].legends
    assert [t.get_text() for t in legend.texts] == [*(f"TDQ, seed {s}" for s in (0, 1, 2)), "static LSQ"]
    assert axes[0].lines[1].get_ydata().tolist() == pytest.approx([0.11, 0.21, 0.31])
    assert axes[0].get_xlim()[0] > axes[0].get_xlim()[1]  # sampling runs to the right


def test_all_panels_of_figure_1_show_the_same_factor(drawn: list[Any], tmp_path: Path) -> None:
    moves = Panel("moves", {0: Curve(TIMES, torch.tensor([0.1, 0.2, 0.4]))}, {})
    stays = Panel("stays", {0: Curve(TIMES, torch.tensor([7.0, 7.0, 7.0]))}, {})
    interval_plots.intervals_over_time([moves, stays], tmp_path / "1.png")
    low, high = zip(*(axis.get_ylim() for axis in shown(drawn[0])), strict=True)
    assert high[0] / low[0] == pytest.approx(high[1] / low[1])
    assert 0.0 < low[0] < 0.1
    assert high[0] > 0.4


def test_interval_beside_spread_each_against_its_mean(drawn: list[Any], tmp_path: Path) -> None:
    deviation = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    followed = IntervalAndSpread("a", curves(0, 1), TIMES, deviation, 3 * deviation, (3.0, 4.0, 4.0), 0.97)
    apart = replace(followed, name="b", correlation=None)
    interval_plots.interval_and_spread([followed, apart], tmp_path / "2.png")
    axes = shown(drawn[0])
    assert [len(axis.lines) for axis in axes] == [4, 4]
    for line in axes[0].lines:
        assert torch.tensor(line.get_ydata()).log().mean() == pytest.approx(0.0, abs=1e-6)
    assert axes[0].lines[1].get_ydata().tolist() == pytest.approx([0.5, 1.0, 2.0])
    assert axes[0].texts[0].get_text() == "interval 3.00x, std 4.00x, 99.9 % 4.00x\nr = +0.97"
    assert "r =" not in axes[1].texts[0].get_text()


def test_a_density_has_a_cell_per_time_and_bin(drawn: list[Any], tmp_path: Path) -> None:
    edges, density = torch.linspace(-1, 1, 6), torch.rand(3, 5)
    path = supplement.density_over_time(
        {"a": (TIMES, edges, density), "b": (TIMES, edges, density)}, tmp_path / "4.png"
    )
    assert path.read_bytes()[:4] == PNG
    meshes = [axis.collections[0].get_array() for axis in shown(drawn[0])]
    assert [mesh.shape for mesh in meshes] == [(5, 3)] * 2
    assert float(meshes[0].max()) == 1.0


def test_gray_images_can_be_shown(tmp_path: Path) -> None:
    assert supplement.rows_of_samples({"a": torch.rand(2, 1, 8, 8)}, "title", tmp_path / "6.png").is_file()


@given(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=20), st.floats(0.1, 10.0), st.floats(-5.0, 5.0))
def test_correlation_of_a_line_is_one(values: list[float], factor: float, offset: float) -> None:
    series = torch.tensor(values, dtype=torch.float64)
    if float(series.max() - series.min()) < 1e-3:
        return
    assert correlation(series, factor * series + offset) == pytest.approx(1.0)
    assert correlation(series, -factor * series + offset) == pytest.approx(-1.0)


def test_what_is_constant_correlates_with_nothing() -> None:
    assert correlation(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 3.0])) is None


def collected(values: dict[float, Tensor]) -> LayerActivation:
    """A layer that saw those values at those times."""
    timestep = CurrentTimestep("timestep", 1)
    statistics = StepStatistics("layer", timestep, 10)
    for time, x in values.items():
        timestep.begin(torch.tensor([time]))
        statistics.collect(x)
    found = statistics.statistics(sorted(values))
    deviation = torch.tensor([float(values[t].std()) for t in sorted(values)])
    return LayerActivation("layer", torch.tensor(sorted(values)), found, deviation.double())


def test_magnitude_and_density_are_those_of_the_values() -> None:
    values = {0.0: torch.randn(40_000), 500.0: torch.randn(40_000) * 3 + 1}
    layer = collected(values)
    _, width = layer.statistics.on_common_bins()
    for found, x in zip(layer.magnitude.tolist(), values.values(), strict=True):
        exact = float(x.abs().quantile(0.999, interpolation="higher"))
        assert exact - 1e-6 <= found <= exact + width
    density = layer.distribution()
    assert 60 <= density.density.shape[1] <= 100
    covered = (density.density * density.edges.diff()).sum(1)
    assert bool((covered >= 0.999).all())
    assert bool((covered <= 1.0 + 1e-9).all())
    middle = (density.edges[1:] + density.edges[:-1]) / 2
    mean = (density.density * density.edges.diff() * middle).sum(1)
    assert mean.tolist() == pytest.approx([0.0, 1.0], abs=0.1)


def test_movement_sees_tails_that_the_deviation_does_not() -> None:
    calm, tails = torch.ones(10_000), torch.ones(10_000)
    tails[:20] = 8.0
    layer = replace(collected({0.0: calm, 1.0: tails}), deviation=torch.ones(2, dtype=torch.float64))
    assert layer.movement == pytest.approx(8.0, rel=0.02)


def test_an_input_is_measured_for_every_layer_and_shown_once(layers: list[LayerActivation]) -> None:
    names = [layer.name for layer in layers]
    projections = [name for name in names if ".to_q." in name or ".to_k." in name]
    kept = [layer.name for layer in distinct_inputs(layers) if layer.name in projections]
    assert kept == [name for name in projections if ".to_q." in name]
    assert [layer.movement for layer in layers] == sorted((layer.movement for layer in layers), reverse=True)
    assert layers[0].times.tolist() == [0.0, 333.0, 666.0]
    most, least = most_and_least(layers, 1000)
    assert not {layer.name for layer in most} & {layer.name for layer in least}
    assert most[0] is layers[0]
    assert least[-1] is layers[-1]


def test_the_largest_budget_and_w4a4_come_first(model: Path, tmp_path: Path) -> None:
    keep(tmp_path, model, ["a"], {("W3A3 TDQ", 0): 2.0}, FULL)
    assert kept_tables(tmp_path, model).label == "W3A3"
    keep(tmp_path, model, ["a"], {("W4A4 TDQ", 0): 2.0}, SMOKE)
    assert kept_tables(tmp_path, model).label == "W4A4"
    keep(tmp_path, model, ["a"], {("W4A4 TDQ", 0): 3.0, ("W4A4 LSQ", 1): 1.0, ("W4A4 TDQ", 2): None}, FULL)
    found = kept_tables(tmp_path, model)
    assert found.budget == FULL
    assert float(found.temporal[0].scale.max()) == pytest.approx(0.3)
    assert (list(found.temporal), list(found.static)) == ([0], [1])
    assert found.missing == (
        "W4A4 TDQ, seed 1, of table 6: was not run with the budget full.",
        "W4A4 TDQ, seed 2, of table 6: was run, but its scale table is not in tables/.",
        "W4A4 LSQ, seed 0, of table 6: was not run with the budget full.",
        "W4A4 LSQ, seed 2, of table 6: was not run with the budget full.",
    )


def test_a_folder_without_results_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(TdqError, match="no such folder"):
        kept_tables(tmp_path / "none", model)
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(TdqError, match=r"no results of the benchmark.*bench supplement --table 6"):
        kept_tables(tmp_path, model)


def test_results_of_another_model_are_refused(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "diffusion_pytorch_model.safetensors").write_bytes(b"other weights")
    keep(tmp_path / "results", other, ["a"], {("W4A4 TDQ", 0): 2.0}, SMOKE)
    with pytest.raises(TdqError, match=f"none of its QAT runs is of the model.*{checksum(model)}"):
        kept_tables(tmp_path / "results", model)


@pytest.fixture(scope="module")
def page(model: Path, layers: list[LayerActivation], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index of all figures, written by the program; recipes of scales that are quickly found."""
    results = tmp_path_factory.mktemp("results")
    runs: dict[tuple[str, int], float | None] = {("W4A4 TDQ", 0): 2.0, ("W4A4 TDQ", 1): 1.5, ("W4A4 LSQ", 0): 1.0}
    keep(results, model, [layer.name for layer in layers], runs, SMOKE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "recipe", quick_recipe)
        result = run(
            "report", "--figures", "--model", model, "--results", results, "--samples", 2, "--steps", 2, "--seed", 5
        )
    assert result.exit_code == 0, result.output
    return results / "UNet2DModel_figures" / "figures.md"


def test_all_figures_of_a_class_conditional_model(page: Path, model: Path) -> None:
    text = page.read_text()
    for number in range(1, 10):
        assert (page.parent / f"figure-{number}.png").read_bytes()[:4] == PNG
        assert f"(figure-{number}.png)" in text
    assert f"checksum {checksum(model)}" in text
    assert "seeds: training 0, 1; activations and calibration 5; images 6" in text
    assert "- W4A4 TDQ, seed 2, of table 6: was not run with the budget smoke." in text
    assert "seeds 0 and 1" in text
    assert [f"samples, {bits}" in text for bits in ("W8A8", "W8A4", "W4A8", "W4A4")] == [True] * 4


def test_without_learned_tables_the_other_figures_are_drawn(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelopt_tdq.lab.bench import figures

    monkeypatch.setattr(figures, "SHOWN_RECIPES", ("int8",))
    keep(tmp_path, model, [], {("W4A4 TDQ", 0): None}, SMOKE)
    result = run(
        "report", "--figures", "--model", model, "--results", tmp_path, "--output", tmp_path / "out", "--samples", 1,
        "--steps", 2,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "figure-4.png", "figure-5.png", "figure-6.png", "figures.md",
    ]  # fmt: skip
    text = (tmp_path / "out" / "figures.md").read_text()
    assert "Figures 1, 2 and 3 are missing" in text
    assert "Table 6 was not run on this model" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "somewhere"], "of use with --figures only"),
        (["--results", "somewhere"], "of use with --figures only"),
        (["results.json", "--figures"], "a demo's results, given with --figures"),
        (["--figures", "--model", "nowhere"], "no such folder"),
    ],
)
def test_wrong_use_is_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run("report", *arguments, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()
