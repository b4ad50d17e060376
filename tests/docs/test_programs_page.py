"""What docs/demo_diffusion.md says of NVIDIA's programs is what the tables of facts have."""

from __future__ import annotations

from pathlib import Path

from modelopt_tdq.export.conventions import PROGRAMS
from modelopt_tdq.runtime.build.programs import PLACES, SOURCES

ROOT = Path(__file__).resolve().parents[2]


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
