"""TensorRT-RTX compiles its kernels where it runs; this keeps them in a file for the next process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

__all__ = ["RunTimeCache"]


class RunTimeCache:
    """The kernels that an engine of TensorRT-RTX was compiled to.

    TensorRT-RTX itself refuses a file of another GPU, driver or release: then all is compiled again, and the file is
    replaced. Like the engine, a file of it is executable code.

    Args:
        config: IRuntimeConfig of the engine, which is to use the cache.
        file: Read now if it is there, written by :meth:`save`.
    """

    def __init__(self, config: Any, file: Path) -> None:
        self._cache = config.create_runtime_cache()
        self._file = file
        #: Whether the file was there and taken.
        self.loaded = bool(file.is_file() and self._cache.deserialize(file.read_bytes()))
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write the file, in one step."""
        content = self._cache.serialize()
        partial = self._file.with_name(f"{self._file.name}.{os.getpid()}.partial")
        partial.write_bytes(content)
        os.replace(partial, self._file)
