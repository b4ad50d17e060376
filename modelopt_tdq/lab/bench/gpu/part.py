"""One part of the benchmark, in a process of its own: a crash of a driver or library ends that part alone."""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelopt_tdq.core.files import write_text

__all__ = ["PARTS", "Asked", "Row", "main"]

#: A line of the table that a part gives: names to numbers or words.
Row = dict[str, Any]

#: Parts in the order in which they run: (name, what it shows, seconds it may take).
PARTS = (
    ("machine", "what the GPU and the libraries are", 60),
    ("lookup", "the lookup kernel on the GPU against NumPy, and what one launch costs", 90),
    ("products", "quantize, product and correction of one layer: scales by time against static and dynamic ones", 150),
    ("model", "calibration on the GPU against the CPU; fake-quantized forward against ModelOpt's", 150),
    ("real_size", "a UNet of SD 1.5's size, random weights: calibration, memory and forward against ModelOpt's", 150),
    (
        "engines",
        "engines of TensorRT-RTX and TensorRT: build, load, run, compare, time, and what they are used for",
        240,
    ),
)


@dataclass(frozen=True)
class Asked:
    """What a part is asked for.

    Attributes:
        rehearse: On the CPU, with stand-ins for what needs a GPU, small sizes, and times that mean nothing.
        folder: For files of its own.
        keep: Called with rows when some are there, so that they outlive a crash of what follows.
        engines: Folder with engines that were built elsewhere, each beside its ONNX file.
    """

    rehearse: bool
    folder: Path
    keep: Callable[[list[Row]], None]
    engines: Path | None = None

    @property
    def device(self) -> str:
        """Of torch."""
        return "cpu" if self.rehearse else "cuda"


def _writer(path: Path) -> Callable[[list[Row]], None]:
    def keep(rows: list[Row]) -> None:
        write_text(path, json.dumps({"rows": rows}, indent=1))

    return keep


def main(name: str, folder: str, rehearse: str, engines: str = "") -> int:
    """Run one part; what it found is in ``<folder>/<name>.json``.

    Args:
        name: Of :data:`PARTS`.
        folder: Where its answer goes.
        rehearse: ``"1"`` to rehearse.
        engines: Folder of :attr:`Asked.engines`; empty for none.

    Returns:
        0, also when the part failed: its answer then holds the error beside the rows that were there.
    """
    answer = Path(folder) / f"{name}.json"
    asked = Asked(rehearse == "1", Path(folder), _writer(answer), Path(engines) if engines else None)
    found: dict[str, Any] = {"rows": []}
    try:
        module = importlib.import_module(f".{name}", __package__)
        found["rows"] = module.run(asked)
    except BaseException as error:  # whatever it is, it is a result of this part, and no other part shall miss it
        traceback.print_exc()
        if answer.is_file():
            found = json.loads(answer.read_text())
        found["error"] = f"{type(error).__name__}: {error}"
    write_text(answer, json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
