"""What docs/ says is what there is: commands parse, public names and linked files exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

import modelopt_tdq as tdq
from modelopt_tdq.cli import app
from modelopt_tdq.export.conventions import PROGRAMS
from modelopt_tdq.runtime.build.programs import PLACES, SOURCES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "trt_examples" / "lora" / "README.md"]
COMMANDS = [
    (page.name, line)
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)
    for line in block.splitlines()
    if line.startswith("modelopt-tdq ")
]


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_parse(page: str, line: str) -> None:
    words = shlex.split(line.partition("#")[0])[1:]
    command = get_command(app).commands[words.pop(0)]  # type: ignore[attr-defined]
    assert not command.make_context(command.name, words, resilient_parsing=True).args


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names_and_links_exist(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"\btdq\.([A-Za-z_]+)", text):
        assert hasattr(tdq, name), name
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (page.parent / link).exists(), link


def test_the_programs_are_those_of_the_table() -> None:
    text = (ROOT / "docs" / "demo_diffusion.md").read_text()
    for program in PROGRAMS:
        assert f"| `{program}` |" in text
        version = SOURCES[program].split()[-1]
        assert version in text
    for place in PLACES["demo-diffusion"].values():
        script = place.command.split()[1]
        assert f"`{script}`" in text
        if place.onnx_option is None:
            assert f"`{place.onnx}`" in text
            assert place.engine is not None
            assert f"`{place.engine.format(version='VERSION')}`" in text
