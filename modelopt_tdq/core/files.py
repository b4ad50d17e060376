"""How a table lies on disk: ``<stem>.safetensors`` with the arrays, ``<stem>.json`` with everything else."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from modelopt_tdq.errors import TdqError

__all__ = ["read_table", "table_paths", "write_table"]

_Table = TypeVar("_Table")


def table_paths(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The files of arrays and of the description; ``path`` is either of the two, or what they have in common.

    Raises:
        TdqError: ``path`` names no file.
    """
    stem = Path(path)
    if not stem.name:
        raise TdqError("path", str(path), "names no file", "Pass a path such as 'scales.safetensors'")
    if stem.suffix in (".safetensors", ".json"):
        stem = stem.with_suffix("")
    return stem.with_name(stem.name + ".safetensors"), stem.with_name(stem.name + ".json")


def write_table(
    path: str | os.PathLike[str],
    kind: str,
    version: int,
    arrays: Mapping[str, Tensor],
    fields: Mapping[str, Any],
    metadata: Mapping[str, Any],
) -> Path:
    """Write both files; those that are there already are replaced only when both new ones are complete.

    Args:
        path: See :func:`table_paths`.
        kind: Class of the table.
        version: Of its schema.
        arrays: By name.
        fields: Of the description, besides schema version, kind, checksum and metadata.
        metadata: The user's part of the description.

    Returns:
        The path of the safetensors file.

    Raises:
        TdqError: ``metadata`` cannot be written as JSON, or ``path`` names no file.
    """
    targets = table_paths(path)
    data = save_tensors(dict(arrays))
    description = {
        "schema_version": version,
        "kind": f"modelopt_tdq.{kind}",
        **fields,
        "sha256": hashlib.sha256(data).hexdigest(),
        "metadata": dict(metadata),
    }
    try:
        text = json.dumps(description, indent=1)
    except (TypeError, ValueError) as error:
        raise TdqError(
            "metadata", metadata, f"cannot be written as JSON ({error})", "Use plain numbers, strings and lists"
        ) from error
    targets[0].parent.mkdir(parents=True, exist_ok=True)
    partial = [target.with_name(target.name + ".partial") for target in targets]
    try:
        for file, content in zip(partial, (data, text.encode()), strict=True):
            file.write_bytes(content)
        for source, target in zip(partial, targets, strict=True):
            os.replace(source, target)
    finally:
        for source in partial:
            source.unlink(missing_ok=True)
    return targets[0]


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
        path: Either of the two files.
        kind: Class of the table.
        noun: What to call it in an error.
        newest: Schema version that is read.
        fields: Names of what the description must have, besides what every table has.
        make: The table of description, metadata and arrays. A KeyError, TypeError or ValueError of it says that
            something is missing or malformed.

    Raises:
        TdqError: A file is missing or no such table, the schema is newer, the checksum or the content is wrong.
    """
    arrays, sidecar = table_paths(path)
    for file in (arrays, sidecar):
        if not file.is_file():
            raise TdqError(
                "path", str(file), "no such file", "A saved table is a .safetensors and a .json file side by side"
            )
    try:
        description = dict(json.loads(sidecar.read_text()))
        version, digest = int(description["schema_version"]), str(description["sha256"])
        metadata = dict(description.get("metadata", {}))
        found = str(description.get("kind", kind)).rpartition(".")[2]
        if found != kind:
            raise ValueError(f"it describes a {found}")
        missing = [name for name in fields if name not in description]
        if missing:
            raise KeyError(missing[0])
    except (ValueError, KeyError, TypeError) as error:
        raise TdqError(
            "path", str(sidecar), f"no description of a {noun} ({error!r})", "Save the table again"
        ) from error
    if version > newest:
        raise TdqError("schema_version", version, f"newer than this version reads ({newest})", "Upgrade modelopt-tdq")
    data = arrays.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise TdqError(
            "sha256",
            digest,
            f"{arrays.name} does not match the checksum in {sidecar.name}",
            "Copy or save both files again",
        )
    try:
        return make(description, metadata, load_tensors(data))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise TdqError(
            "path", str(arrays), f"not the content of a {noun} ({error!r})", "Save the table again"
        ) from error
