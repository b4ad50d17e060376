"""What a command cannot read or write is told at once: before torch is imported, which takes longer than a second."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from modelopt_tdq import TdqError
from modelopt_tdq.core.files import require_writable
from modelopt_tdq.lab.reference_models import REFERENCE_MODELS
from modelopt_tdq.lab.sources import REFERENCE_NAMES

_RUN = """
import json, os, sys
from typer.testing import CliRunner
from modelopt_tdq.cli.app import app

os.chdir(sys.argv[2])
found = []
for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, arguments)
    heavy = sorted({"torch", "modelopt", "numpy", "onnx", "diffusers", "matplotlib"} & set(sys.modules))
    found.append([result.exit_code, result.output, heavy])
print(json.dumps(found))
"""

#: Arguments, and what the one line says.
REFUSED = [
    (["quantize", "--output", "file"], "output = 'file': "),
    (["quantize", "--output", "file/q"], "is a file. Name a folder"),
    (["quantize", "--output", "full"], "it holds other files, and no quantization.json. Name a new folder"),
    (["quantize", "--output", "q", "--model", "./gone"], "model = './gone': no such folder"),
    (["quantize", "--output", "q", "--model", "full"], "it holds no config.json"),
    (["quantize", "--output", "q", "--recipe", "gone"], "recipe = 'gone': neither a bundled recipe nor a file"),
    (["quantize", "--output", "q", "--recipe", "broken.yaml"], "recipe = 'broken.yaml': not readable as YAML"),
    (["quantize", "--output", "q", "--recipe", "file"], "recipe = 'file': not a mapping"),
    (["quantize", "--output", "q", "--recipe", "other.yaml"], "recipe = ['bits']: unknown keys"),
    (["quantize", "--output", "q", "--calibration-script", "gone.py:loop"], "no such file"),
    (["analyze", "--output", "file"], "is a file. Name a folder"),
    (["analyze", "--recipe", "gone"], "neither a bundled recipe nor a file"),
    (["analyze", "--model", "./gone"], "no such folder"),
    (["export", "full", "--output", "full"], "it is a folder. Name a file"),
    (["export", "gone"], "folder = 'gone': it holds no quantization.json"),
    (["export", "gone", "--dynamic-axis", "height"], "INPUT:AXIS=NAME"),
    (["compare", "gone"], "folder = 'gone': it holds no quantization.json"),
    (["compare", "gone", "--report", "full"], "report = 'full': it is a folder"),
    (["build", "m.onnx", "--output", "full"], "engine_path = 'full': it is a folder"),
    (["build", "m.onnx", "--timing-cache", "file/cache"], "timing_cache = 'file/cache': "),
    (["twin", "m.onnx", "--output", "file/m.onnx"], "is a file. Name a file elsewhere"),
    (["report", "results.json", "--output", "full"], "output = 'full': it is a folder"),
    (["demo", "--output", "file"], "is a file. Name a folder"),
    (["demo", "--model", "./gone"], "no such folder"),
    (["bench", "gpu", "--output", "file"], "is a file. Name a folder"),
    (["bench", "supplement", "--table", "1", "--output", "file"], "is a file. Name a folder"),
    (["bench", "temporal-features", "--output", "file"], "is a file. Name a folder"),
    (["bench", "rivals", "--output", "file"], "is a file. Name a folder"),
    (["bench", "zoo", "--output", "file"], "is a file. Name a folder"),
]


def test_every_command_looks_before_it_imports_anything_heavy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").write_text("")
    (tmp_path / "broken.yaml").write_text("a: [1")
    (tmp_path / "other.yaml").write_text("bits: 8")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    commands = json.dumps([arguments for arguments, _ in REFUSED])
    command = [sys.executable, "-c", _RUN, commands, str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for (arguments, message), (code, output, heavy) in zip(REFUSED, json.loads(done.stdout), strict=True):
        assert code == 2, (arguments, output)
        assert message in " ".join(output.split()), (arguments, output)
        assert not heavy, (arguments, heavy)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_reference_models_are_known_by_name_before_they_are_imported() -> None:
    assert tuple(REFERENCE_MODELS) == REFERENCE_NAMES


def test_what_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "mark").write_text("")
    (tmp_path / "empty").mkdir()
    require_writable(tmp_path / "new" / "deeper" / "file")
    require_writable(tmp_path / "q" / "mark")
    require_writable(tmp_path / "q", folder=True)
    for name in ("new", "empty", "q"):
        require_writable(tmp_path / name, replaces="mark")
    assert not (tmp_path / "new").exists()
    with pytest.raises(TdqError, match="it holds other files, and no sign"):
        require_writable(tmp_path / "q", replaces="sign")
    for path, options in ((tmp_path / "q", {}), (tmp_path / "q" / "mark" / "file", {})):
        with pytest.raises(TdqError, match=r"field = .*Name a file"):
            require_writable(path, "field", **options)


def test_what_the_system_does_not_let_us_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # these tests may run as root, who may write everywhere
    with pytest.raises(TdqError, match="may not be written to"):
        require_writable(tmp_path / "file")
