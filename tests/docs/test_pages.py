"""What README and pages say is what there is: figures, commands, names, files."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import errors
import figures
import pytest
import render
import torch
from support.models import SMALL_UNET
from typer.main import get_command
from typer.testing import CliRunner

import modelopt_tdq as tdq
from modelopt_tdq.cli import app

diffusers = pytest.importorskip("diffusers")
ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
TEXTS = {"README": README, **{p.stem: render.page(p.stem) for p in sorted((ROOT / "docs").glob("*.md"))}}


def commands(text: str) -> list[str]:
    """Lines of its shell blocks, continued ones as one."""
    blocks = "".join(re.findall(r"^ *```bash\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL))
    return [line.strip() for line in blocks.replace("\\\n", " ").splitlines() if line.strip()]


LINES = [line for text in TEXTS.values() for line in commands(text)]


def test_figures_of_the_readme_are_those_of_the_results() -> None:
    assert render.readme() == README, "run python docs/_ext/render.py"


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 140


def test_a_figure_follows_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = figures._results("rivals")["runs"].values()
    row = next(run for run in runs if (run["model"], run["format"], run["row"]) == ("unet", "W8A8", "corrections"))
    monkeypatch.setitem(row, "psnr_db", 77.7)
    assert "77.7" in render.readme()


def test_what_results_do_not_have_is_an_error() -> None:
    with pytest.raises(KeyError):
        render.fill('{{ demo_gain("int2", "max") }}')


def test_the_converged_model() -> None:
    """One figure by hand: from the numbers of the file to the text."""
    (row,) = [
        r for r in figures._results("converged_model")["rows"] if (r["scales"], r["quantized"]) == ("time-margin", 247)
    ]
    mean = sum(row["sqnr_db"]) / len(row["sqnr_db"])
    assert f"{mean:.1f} / {min(row['sqnr_db']):.1f} dB, PSNR {row['psnr_db']:.1f} dB" in TEXTS["why"]


@pytest.mark.parametrize("line", sorted({line for line in LINES if re.search(r"(^|&& )modelopt-tdq ", line)}))
def test_commands_parse(line: str) -> None:
    words = shlex.split(line.partition("#")[0].rpartition("modelopt-tdq ")[2])
    command = get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    context = command.make_context(command.name, words, resilient_parsing=True)
    assert not context.args


def test_the_commands_of_the_quick_start_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, in one folder, on a tiny model."""
    pytest.importorskip("tensorrt_rtx")
    SMALL_UNET.make().save_pretrained(tmp_path / "tiny")
    diffusers.DDIMScheduler().save_pretrained(tmp_path / "tiny" / "scheduler")
    monkeypatch.chdir(tmp_path)
    quick = tdq.make_config(8, 8, weights="max", protect_steps=False, progress=False, correction="none")
    monkeypatch.setattr(tdq, "recipe", lambda name: quick)
    lines = [line.partition("#")[0] for line in commands(TEXTS["quick_start"]) if line.startswith("modelopt-tdq ")]
    lines = [line for line in lines if "doctor" not in line]
    assert [shlex.split(line)[1] for line in lines] == ["analyze", "quantize", "export", "build", "compare"]
    smaller = {
        "analyze": ["--model", "tiny", "--samples", "1", "--steps", "2"],
        "quantize": ["--model", "tiny", "--samples", "1", "--steps", "2"],
        "build": ["--compute-capability", "8.9"],
    }
    for line in lines:
        _, name, *words = shlex.split(line)
        found = CliRunner().invoke(app, [name, *words, *smaller.get(name, [])])
        assert found.exit_code == 0, f"{line}: {found.output} {found.exception!r}"
    assert {"int8", "ratio.onnx", "model.engine", "compare.html"} <= {path.name for path in tmp_path.iterdir()}


def test_public_names_exist() -> None:
    text = "\n".join(TEXTS.values())
    names = set(re.findall(r"\btdq\.([A-Za-z_][A-Za-z_0-9]*)", text)) | set(re.findall(r"`(TDQ_[A-Z0-9_]+)`", text))
    assert {"export_onnx", "build_engine", "TDQ_W3A3_CFG", "scale_table", "analyze"} <= names
    assert not [name for name in names if not hasattr(tdq, name)]


def test_fields_of_the_algorithm_exist() -> None:
    table = TEXTS["your_model"].split("The algorithm's fields:")[1].split("## With")[0]
    fields = re.findall(r"`([a-z_]+)`", "".join(line.split("|")[1] for line in table.splitlines() if "|" in line))
    assert set(fields) <= set(tdq.TdqCalibConfig.model_fields)
    assert len(fields) >= 10


def test_choices_of_the_learning_algorithm_exist() -> None:
    section = TEXTS["low_bits"].split("## Train the scales")[1].split("\n## ")[0]
    table = "".join(line.split("|")[1] for line in section.splitlines() if line.startswith("| `"))
    for intervals in re.findall(r"`([a-z_]+)`", table)[1:]:  # the heading first
        tdq.make_config(4, 4, method="tdq_qat", intervals=intervals)
    for scheme in re.findall(r"`([a-z]+)`", section.split("`scheme` is ")[1].split(";")[0]):
        tdq.make_config(4, 4, method="tdq_qat", scheme=scheme)


def test_files_of_the_architecture_are_there() -> None:
    folder = ""
    for name in re.findall(r"`([\w/]+(?:\.py|/))`", TEXTS["architecture"]):
        path = Path(name)
        if (ROOT / "modelopt_tdq" / path).exists() or (ROOT / path).exists():
            folder = path.parent.as_posix() if path.suffix else path.as_posix()
        else:  # named by itself behind one of its folder
            assert (ROOT / "modelopt_tdq" / folder / path).exists(), name


def test_every_error_is_in_the_registry() -> None:
    entries = errors.registry()
    assert len(entries) > 400
    named = [entry for entry in entries if (entry.field, entry.problem) == ("bins", "not a positive number")]
    assert [entry.cure for entry in named] == ["Use 'per_step', 'optimal', or a number of bins"]
    text = TEXTS["troubleshooting"]
    assert text.count("\n| ") > len(entries)
    assert sum(entry.cure == "…" for entry in entries) < 30  # made elsewhere, by a function


def test_every_class_of_the_zoo_is_in_the_matrix() -> None:
    rows = figures._results("zoo")["runs"]
    assert len(rows) == 100
    matrix = TEXTS["support_matrix"].split("## What is not right")[0]
    assert all(f"| {name} |" in matrix for name in rows)
    assert matrix.count("**refused**") == sum(
        run["stages"].get(stage, {}).get("verdict") == "refused"
        for run in rows.values()
        for stage in ("quantize", "restore", "temporal", "export", "onnxruntime", "openvino", "tensorrt_rtx")
    )


def test_training_changes_what_the_page_says(tmp_path: Path) -> None:
    """The loop under "Train the scales" on a tiny model: scales follow time, weights move."""
    import modelopt.torch.quantization as mtq
    from support.models import FAMILIES

    block = TEXTS["low_bits"].split("## Train the scales")[1].split("```python")[1].split("```")[0]
    family = FAMILIES["unet"]
    unet = family.make()
    x = family.inputs(2, torch.tensor(0.0), 0)["sample"]
    names = {
        "unet": unet,
        "forward_loop": family.forward_loop(),
        "batches": [(x, torch.tensor([10.0, 900.0]), torch.zeros_like(x))] * 3,
        "tdq": tdq,
        "mtq": mtq,
        "torch": torch,
        "F": torch.nn.functional,
    }
    before = {name: value.detach().clone() for name, value in unet.named_parameters()}
    exec(block, names)
    assert not bool(names["table"].is_static.all())  # type: ignore[attr-defined]
    assert not torch.equal(unet.conv_in.weight, before["conv_in.weight"])
