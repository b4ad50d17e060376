"""Is what pip installs what users need? Builds sdist and wheel, and uses the wheel alone in an empty environment.

The wheel is built from the sdist, as an index would have it. In the environment: the core dependencies and nothing
else: import, doctor, a model quantized, saved, restored without any extra. With ``--lowest`` the same with the lowest
versions that pyproject.toml allows, torch excepted, and some tests. Exits with 1 at the first thing that fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

import tomllib
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]

#: Tests that the lowest versions pass in CI; all of them were tried when a bound was set.
LOWEST = ("tests/core", "tests/test_save_restore.py", "tests/export/test_export_onnx.py")

#: What they need beside the package.
TOOLS = ("pytest==", "hypothesis==", "hatchling==")

#: What a user of the wheel does first, without extras.
FIRST = """
import sys
import torch
import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import modelopt_tdq as tdq


class Denoiser(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

    def forward(self, sample, timestep):
        return self.second(torch.relu(self.first(sample * (1 + timestep / 500))))


def loop(model):
    for time in (900.0, 500.0, 100.0):
        model(torch.randn(16, 8), torch.tensor(time))


model = mtq.quantize(Denoiser(), tdq.TDQ_CONFIG, loop)
table = tdq.scale_table(model)
assert table.scale.shape == (3, 2), table
mto.save(model, "model.pt")
restored = mto.restore(Denoiser(), "model.pt")
assert torch.equal(tdq.scale_table(restored).scale, table.scale)
try:
    tdq.export_onnx(model, "model.onnx", {"sample": torch.randn(1, 8), "timestep": torch.tensor(500.0)})
except tdq.MissingExtraError as error:
    assert "[onnx]" in str(error), error
else:
    assert "onnx" in ALLOWED
print("quantized, saved and restored:", table)
"""


def run(*command: str | Path, cwd: Path | None = None) -> None:
    """A command; its words are shown if it fails."""
    shown = " ".join(str(word) for word in command[:4]).split("\n")[0]
    found = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False)
    if found.returncode:
        sys.exit(f"{shown}: exit status {found.returncode}\n{found.stdout[-4000:]}\n{found.stderr[-4000:]}")
    print(f"{shown}: {found.stdout.strip().splitlines()[-1] if found.stdout.strip() else 'done'}", flush=True)


def run_tests(python: str | Path, tests: Iterable[str], cwd: Path) -> None:
    """In one process, and leaving nothing behind."""
    plain = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=-q")
    run(python, "-m", "pytest", *plain, *tests, cwd=cwd)


def build(folder: Path) -> Path:
    """The wheel, built from the sdist, which is looked at and tried first."""
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    source = folder / sdist.name.removesuffix(".tar.gz")
    # what the README's commands need, and what they run
    for path in ("README.md", "constraints.txt", "docs/conf.py", "tests/conftest.py", "trt_examples/sdxl/sdxl.py"):
        if not (source / path).is_file():
            sys.exit(f"the sdist lacks {path}")
    tests = ("tests/core", "tests/test_package.py", "tests/test_readme.py")
    run_tests(sys.executable, tests, source)
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=source)
    (wheel,) = folder.glob("*.whl")
    return wheel


def first_hour(python: Path, folder: Path, allowed: set[str]) -> None:
    """Import, doctor, quantize; away from the checkout, with what is installed."""
    run(python, "-c", "import modelopt_tdq; print(modelopt_tdq.__file__)", cwd=folder)
    run(python, "-m", "modelopt_tdq", "doctor", "--json", cwd=folder)
    run(python, "-m", "modelopt_tdq", "--help", cwd=folder)
    run(python, "-c", f"ALLOWED = {allowed!r}\n{FIRST}", cwd=folder)


def lowest(*extras: str) -> list[str]:
    """The lower bounds of pyproject.toml as pins; torch stays, its older builds for CPUs are in no index."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(text for extra in extras for text in project["optional-dependencies"][extra])]
    pins = {}
    for requirement in map(Requirement, texts):
        bounds = [part.version for part in requirement.specifier if part.operator == ">="]
        if bounds and requirement.name not in ("torch", "modelopt-tdq"):
            pins[requirement.name] = f"{requirement.name}=={bounds[0]}"
    return list(pins.values())


def main() -> None:
    """Build, install, try."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lowest", action="store_true", help="also with the lowest versions that are allowed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build(folder)
        away = folder / "away"
        away.mkdir()
        python = folder / "alone" / "bin" / "python"
        run(sys.executable, "-m", "venv", folder / "alone")
        run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
        first_hour(python, away, set())
        if arguments.lowest:
            extras = ("diffusers", "onnx", "openvino", "compare", "report")
            tools = [line for line in (ROOT / "constraints.txt").read_text().split() if line.startswith(TOOLS)]
            run(python, "-m", "pip", "install", "--quiet", *lowest(*extras), *tools)
            first_hour(python, away, {"onnx"})
            run_tests(python, LOWEST, ROOT)


if __name__ == "__main__":
    main()
