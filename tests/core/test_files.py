"""Files that belong together are replaced together."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from modelopt_tdq.core.files import replacing


def _pair(folder: Path) -> tuple[Path, Path]:
    return folder / "model.onnx.data", folder / "model.onnx"


def _write(paths: tuple[Path, ...], text: str) -> None:
    for path in paths:
        path.write_text(text)


def _found(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_both_are_replaced(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with replacing(*_pair(tmp_path)) as partial:
            _write(partial, text)
        assert _found(tmp_path) == {"model.onnx.data": text, "model.onnx": text}
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_not_written_stays(tmp_path: Path) -> None:
    _write(_pair(tmp_path), "old")
    with replacing(*_pair(tmp_path)) as (_, file):
        file.write_text("new")
    assert _found(tmp_path) == {"model.onnx.data": "old", "model.onnx": "new"}


@pytest.mark.parametrize("calls", range(5))
def test_the_last_is_never_there_with_others_of_another_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """After every step of the replacement, as if the process had ended there."""
    _write(_pair(tmp_path), "old")
    move, steps = os.replace, []

    def stopping(source: Any, target: Any) -> None:
        if len(steps) == calls:
            raise KeyboardInterrupt  # nothing is tidied up for it
        move(source, target)
        steps.append(target)
        found = _found(tmp_path)
        assert "model.onnx" not in found or (len(set(found.values())) == 1 and len(found) == 2)

    monkeypatch.setattr(os, "replace", stopping)
    if calls < 4:
        with pytest.raises(KeyboardInterrupt), replacing(*_pair(tmp_path)) as partial:
            _write(partial, "new")
    else:
        with replacing(*_pair(tmp_path)) as partial:
            _write(partial, "new")
    found = _found(tmp_path)
    assert found.get("model.onnx") in {0: ["old"], 4: ["new"]}.get(calls, [None])


@pytest.mark.parametrize("failing", range(4))
def test_a_move_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    _write(_pair(tmp_path), "old")
    move, steps = os.replace, []

    def refusing(source: Any, target: Any) -> None:
        steps.append(target)
        if len(steps) == failing + 1:
            raise PermissionError("on purpose")
        move(source, target)

    monkeypatch.setattr(os, "replace", refusing)
    with pytest.raises(PermissionError), replacing(*_pair(tmp_path)) as partial:
        _write(partial, "new")
    assert _found(tmp_path) == {"model.onnx.data": "old", "model.onnx": "old"}
    assert len(list(tmp_path.iterdir())) == 2


def test_a_move_that_fails_leaves_nothing_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, file = _pair(tmp_path)
    file.write_text("old")
    move = os.replace

    def refusing(source: Any, target: Any) -> None:
        if target == file:
            raise PermissionError("on purpose")
        move(source, target)

    monkeypatch.setattr(os, "replace", refusing)
    with pytest.raises(PermissionError), replacing(data, file) as partial:
        _write(partial, "new")
    assert _found(tmp_path) == {"model.onnx": "old"}
