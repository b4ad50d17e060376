"""A small results file, with its one figure."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c489"
    "0000000d49444154789c626001000000ffff03000006000557bfabd40000000049454e44ae426082"
)

_ROW: dict[str, Any] = {
    "recipe": "int8",
    "label": "W8A8",
    "variant": "max",
    "name": "ModelOpt max",
    "sqnr_db": [36.0, 35.0],
    "sqnr_mean_db": 35.5,
    "sqnr_worst_db": 35.0,
    "psnr_db": 30.0,
    "table": {"rows": 1, "quantizers": 50, "temporal": 0, "bytes": 200},
    "engine": None,
    "openvino": None,
}
_NOTHING = dict.fromkeys(("sqnr_db", "sqnr_mean_db", "sqnr_worst_db", "psnr_db", "table"))


def row(**changes: Any) -> dict[str, Any]:
    """A row of the results."""
    return copy.deepcopy(_ROW) | changes


def results(folder: Path) -> dict[str, Any]:
    """Results with four rows; writes the figure into ``folder``."""
    (folder / "plot.png").write_bytes(PNG)
    return {
        "schema_version": 1,
        "kind": "modelopt_tdq.demo",
        "created": "2026-01-01T00:00:00+00:00",
        "command": "modelopt-tdq demo",
        "machine": {"cpu": "A & B <cpu>", "cores": 2, "system": "Linux x86_64", "python": "3.11"},
        "versions": {"torch": "2.13", "openvino": None},
        "settings": {"steps": 2},
        "timesteps": [500.0, 0.0],
        "rows": [
            row(recipe="fp32", label="FP32", variant="fp32", name="reference", **_NOTHING),
            row(),
            row(variant="static", name="static mse", sqnr_mean_db=38.0),
            row(
                variant="tdq", name="TDQ mse", sqnr_mean_db="inf", psnr_db="inf", table=_ROW["table"] | {"bytes": 4080}
            ),
        ],
        "openvino": None,
        "notes": ["A note with <tags>."],
        "figures": [{"section": "sqnr", "file": "plot.png", "title": "SQNR per step", "caption": "Higher is better."}],
    }
