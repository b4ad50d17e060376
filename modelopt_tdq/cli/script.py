"""The user's own functions, named as ``file.py:function``."""

from __future__ import annotations

from pathlib import Path

from modelopt_tdq.errors import TdqError

__all__ = ["script_file"]


def script_file(reference: str, option: str) -> tuple[Path, str]:
    """The file and the name of the function; nothing is executed.

    Raises:
        TdqError: The form is another, or the file does not exist.
    """
    path, separator, name = reference.rpartition(":")
    if not separator or not name.isidentifier():
        raise TdqError(option, reference, "not of the form file.py:function", "For example calibrate.py:forward_loop")
    if not Path(path).is_file():
        raise TdqError(option, path, "no such file", "Name a Python file")
    return Path(path), name
