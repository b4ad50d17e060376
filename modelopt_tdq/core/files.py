"""The one writer of files: nothing that is there is lost before the new is complete, and damage is noticed.

Arrays lie in one safetensors file, whose metadata holds their description as JSON, and a checksum over both.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from modelopt_tdq.errors import TdqError

if TYPE_CHECKING:  # importing torch takes longer than to see that nothing can be written
    from torch import Tensor

__all__ = [
    "arrays_path",
    "read_arrays",
    "read_table",
    "replacing",
    "require_writable",
    "write_arrays",
    "write_table",
    "write_text",
]

_Table = TypeVar("_Table")

#: Keys in the metadata of a safetensors file.
_DESCRIPTION, _CHECKSUM = "modelopt_tdq", "sha256"


def require_writable(
    path: str | os.PathLike[str], field: str = "output", *, folder: bool = False, replaces: str | None = None
) -> None:
    """Whether results may be written there, before the work that they take; the folders around it need not exist.

    Args:
        path: Of a file.
        field: What the user names it by.
        folder: It is a folder, into which files are written.
        replaces: It is a folder that is replaced as a whole: a new or empty one, or one that holds a file of this name.

    Raises:
        TdqError: It cannot be written; nothing was.
    """
    target = Path(path)
    noun = "folder" if folder or replaces is not None else "file"
    if noun == "file" and target.is_dir():
        raise TdqError(field, str(target), "it is a folder", "Name a file")
    places = target.absolute() if noun == "folder" else target.absolute().parent
    existing = next(place for place in (places, *places.parents) if place.exists())
    if not existing.is_dir():
        raise TdqError(field, str(target), f"{existing} is a file", f"Name a {noun} elsewhere")
    if (target.is_file() and not os.access(target, os.W_OK)) or not os.access(existing, os.W_OK):
        raise TdqError(field, str(target), f"{existing} may not be written to", f"Name another {noun}")
    if replaces is not None and target.is_dir() and not (target / replaces).is_file() and any(target.iterdir()):
        raise TdqError(field, str(target), f"it holds other files, and no {replaces}", "Name a new folder")


@contextmanager
def replacing(*targets: Path) -> Iterator[tuple[Path, ...]]:
    """Paths to write to, which take the places of ``targets`` when the body ends; if it raises, nothing has changed.

    Args:
        targets: Files or folders, all in one folder, which is made if need be. They are replaced in this order: name
            last what tells that the others are complete. Where one of several is replaced, the last is away meanwhile:
            whoever finds it finds the others that belong to it, also when the process ends in between. What the body
            does not write is not replaced.
    """
    parent = targets[0].parent
    parent.mkdir(parents=True, exist_ok=True)
    # a folder beside them is on the same disk, so that a rename is one step
    with tempfile.TemporaryDirectory(dir=parent, prefix=".tdq-", ignore_cleanup_errors=True) as beside:
        partial = tuple(Path(beside) / target.name for target in targets)
        yield partial
        _move_all([pair for pair in zip(partial, targets, strict=True) if pair[0].exists()], Path(beside) / "replaced")


def _move_all(pairs: list[tuple[Path, Path]], aside: Path) -> None:
    """Move every first path to the second, in this order; if one cannot be moved, all is as before."""
    aside.mkdir()
    replaced, arrived = [], []
    try:
        if any(target.exists() for _, target in pairs[:-1]):
            for _, target in reversed(pairs):
                if target.exists():
                    os.replace(target, aside / target.name)
                    replaced.append(target)
        for source, target in pairs:
            _move(source, target, aside / target.name)
            arrived.append((source, target))
    except BaseException:
        for source, target in reversed(arrived):
            os.replace(target, source)
        for target in reversed(replaced):
            os.replace(aside / target.name, target)
        raise


def _move(source: Path, target: Path, aside: Path) -> None:
    if not target.is_dir():
        os.replace(source, target)
        return
    # a folder cannot be replaced in one step: the old one comes back if the new one does not arrive
    os.replace(target, aside)
    try:
        os.replace(source, target)
    except OSError:
        os.replace(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file, UTF-8, in one step; its folder is made if need be."""
    with replacing(Path(path)) as (partial,):
        partial.write_text(text, encoding="utf-8")
    return Path(path)


def arrays_path(path: str | os.PathLike[str]) -> Path:
    """The safetensors file that ``path`` names, with or without its suffix.

    Raises:
        TdqError: ``path`` names no file.
    """
    stem = Path(path)
    if not stem.name:
        raise TdqError("path", str(path), "names no file", "Pass a path such as 'scales.safetensors'")
    if stem.suffix in (".safetensors", ".json"):
        stem = stem.with_suffix("")
    return stem.with_name(stem.name + ".safetensors")


def _digest(text: str, arrays: Mapping[str, Tensor]) -> str:
    """Of the description, and of name, type, shape and bytes of every array."""
    import torch

    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"\n{name} {array.dtype} {tuple(array.shape)}\n".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_arrays(
    path: str | os.PathLike[str], kind: str, version: int, arrays: Mapping[str, Tensor], fields: Mapping[str, Any]
) -> Path:
    """Write arrays and their description into one file, in one step.

    Args:
        path: See :func:`arrays_path`.
        kind: What it is, one word.
        version: Of its schema.
        arrays: By name, on any device.
        fields: Of the description, besides kind and schema version: plain data for JSON.

    Returns:
        The path of the file.

    Raises:
        TdqError: ``fields`` cannot be written as JSON, or ``path`` names no file.
    """
    from safetensors.torch import save_file

    target = arrays_path(path)
    try:
        text = json.dumps({"kind": f"modelopt_tdq.{kind}", "schema_version": version, **fields}, allow_nan=False)
    except (TypeError, ValueError) as error:
        field = "metadata" if "metadata" in fields else kind
        raise TdqError(
            field, fields.get(field), f"cannot be written as JSON ({error})", "Use plain numbers, strings and lists"
        ) from error
    own = {name: value.detach().to("cpu").contiguous() for name, value in arrays.items()}
    with replacing(target) as (partial,):
        save_file(own, partial, {_DESCRIPTION: text, _CHECKSUM: _digest(text, own)})
    return target


def read_arrays(
    path: str | os.PathLike[str], kind: str, noun: str, newest: int, *, field: str = "path", cure: str = ""
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_arrays` wrote; also the two files of earlier versions, arrays and a JSON beside them.

    Args:
        path: See :func:`arrays_path`.
        kind: As it was written.
        noun: What to call it in an error.
        newest: Schema version that is read.
        field: What the user named it by, for errors.
        cure: What to do with a damaged one; by default, to save it again.

    Returns:
        The arrays, on the CPU, and the description.

    Raises:
        TdqError: The file is missing or something else, the schema is newer, the checksum or the content is wrong.
    """
    from safetensors import SafetensorError, safe_open

    target = arrays_path(path)
    cure = cure or f"Copy or save the {noun} again"
    if not target.is_file():
        raise TdqError(field, str(target), "no such file", f"Name a {noun} that was saved")
    try:
        with safe_open(os.fspath(target), framework="pt") as file:  # one open file: checked is what is used
            metadata = dict(file.metadata() or {})
            arrays: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text, digest = metadata.get(_DESCRIPTION), metadata.get(_CHECKSUM)
        if text is None and (sidecar := target.with_suffix(".json")).is_file():
            text = sidecar.read_text(encoding="utf-8")
            digest, expected = str(json.loads(text)["sha256"]), hashlib.sha256(target.read_bytes()).hexdigest()
        else:
            expected = _digest(text or "", arrays)
        description = dict(json.loads(text or ""))
        version = int(description["schema_version"])
        found = str(description.get("kind", kind)).rpartition(".")[2]
        if found != kind:
            raise ValueError(f"it describes a {found}")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise TdqError(field, str(target), f"not readable as a {noun} ({error!r})", cure) from error
    if digest != expected:
        raise TdqError(field, str(target), "damaged: it does not match its checksum", cure)
    if version > newest:
        raise TdqError("schema_version", version, f"newer than this version reads ({newest})", "Upgrade modelopt-tdq")
    return arrays, description


def write_table(
    path: str | os.PathLike[str],
    kind: str,
    version: int,
    arrays: Mapping[str, Tensor],
    fields: Mapping[str, Any],
    metadata: Mapping[str, Any],
) -> Path:
    """:func:`write_arrays` of a table; ``metadata`` is the user's part of the description."""
    return write_arrays(path, kind, version, arrays, {**fields, "metadata": dict(metadata)})


def read_table(
    path: str | os.PathLike[str],
    kind: str,
    noun: str,
    newest: int,
    fields: Sequence[str],
    make: Callable[[dict[str, Any], dict[str, Any], dict[str, Tensor]], _Table],
) -> _Table:
    """Read what :func:`write_table` wrote.

    Args:
        path: See :func:`arrays_path`.
        kind: Class of the table.
        noun: What to call it in an error.
        newest: Schema version that is read.
        fields: Names of what the description must have, besides what every table has.
        make: The table of description, metadata and arrays. A KeyError, TypeError or ValueError of it says that
            something is missing or malformed.

    Raises:
        TdqError: As :func:`read_arrays`, or the content is no such table.
    """
    arrays, description = read_arrays(path, kind, noun, newest)
    try:
        missing = [name for name in fields if name not in description]
        if missing:
            raise KeyError(missing[0])
        return make(description, dict(description.get("metadata") or {}), arrays)
    except (KeyError, TypeError, ValueError) as error:
        raise TdqError(
            "path", str(arrays_path(path)), f"not the content of a {noun} ({error!r})", "Save the table again"
        ) from error
