"""What is installed, what each backend can do on this machine, and what to install for the rest."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from modelopt_tdq.runtime.doctor_backends import DISTRIBUTION, Backend, examine_backends, installed_version

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Backend", "Diagnosis", "Extra", "Package", "doctor", "render"]

# Instruction sets with INT8 dot products, by their names in /proc/cpuinfo; without one INT8 gains little.
_INT8_INSTRUCTIONS = {
    "amx_int8": "AMX",
    "avx512_vnni": "AVX512-VNNI",
    "avx_vnni": "AVX-VNNI",
    "i8mm": "I8MM",
    "asimddp": "DotProd",
}


@dataclass(frozen=True)
class Package:
    """A dependency: its name, the range we ask for (``">=1.2"``), and the installed version, or None."""

    name: str
    required: str
    installed: str | None

    @property
    def ok(self) -> bool:
        """Installed, in the range."""
        return self.installed is not None and Requirement(f"{self.name}{self.required}").specifier.contains(
            self.installed, prereleases=True
        )


@dataclass(frozen=True)
class Extra:
    """An extra of this package, and what it installs."""

    name: str
    packages: tuple[Package, ...]

    @property
    def ready(self) -> bool:
        """Whether everything it brings is installed in the range asked for."""
        return all(package.ok for package in self.packages)

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f"pip install '{DISTRIBUTION}[{self.name}]'"


@dataclass(frozen=True)
class Diagnosis:
    """Everything :func:`doctor` finds.

    Attributes:
        python: Version of Python.
        system: Operating system and processor architecture.
        cuda: Version of CUDA that PyTorch was built for, None for a CPU build.
        gpus: NVIDIA GPUs that the driver lists, with their compute capabilities.
        int8_instructions: Instruction sets of this CPU that speed INT8 up.
        core: The dependencies that are always needed.
        extras: The optional ones.
        backends: What can be deployed to.
        warnings: Combinations that work otherwise than one would expect.
    """

    python: str
    system: str
    cuda: str | None
    gpus: tuple[str, ...]
    int8_instructions: tuple[str, ...]
    core: tuple[Package, ...]
    extras: tuple[Extra, ...]
    backends: tuple[Backend, ...]
    warnings: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the core dependencies are all there, in their ranges."""
        return all(package.ok for package in self.core)


def doctor() -> Diagnosis:
    """Examine this machine; takes a few seconds, changes nothing."""
    import torch

    core, extras = _dependencies()
    gpus = _gpus()
    instructions = _int8_instructions()
    return Diagnosis(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cuda=torch.version.cuda,
        gpus=gpus,
        int8_instructions=instructions,
        core=core,
        extras=extras,
        backends=tuple(examine_backends(gpus, instructions, torch.cuda.is_available())),
        warnings=tuple(_warnings(gpus, torch.cuda.is_available())),
    )


def _dependencies() -> tuple[tuple[Package, ...], tuple[Extra, ...]]:
    """The core packages and the extras, from the metadata of the installed package itself."""
    try:
        requirements = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
        names = metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:  # used from a source tree that was never installed
        return (), ()

    def wanted(extra: str) -> tuple[Package, ...]:
        chosen = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": extra})]
        return tuple(_package(r) for r in chosen if (r.marker is None) == (not extra) and r.name != DISTRIBUTION)

    return wanted(""), tuple(Extra(name, wanted(name)) for name in names)


def _package(requirement: Requirement) -> Package:
    return Package(requirement.name, str(requirement.specifier), installed_version(requirement.name))


def _gpus() -> tuple[str, ...]:
    """The NVIDIA GPUs of this machine, whether or not this PyTorch can use them."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    query = [program, "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in answer.stdout.splitlines() if line.strip())


def _int8_instructions() -> tuple[str, ...]:
    listing = Path("/proc/cpuinfo")
    flags = set(listing.read_text().split()) if listing.is_file() else set()
    return tuple(name for flag, name in _INT8_INSTRUCTIONS.items() if flag in flags)


def _warnings(gpus: tuple[str, ...], torch_sees_gpu: bool) -> Iterable[str]:
    if installed_version("diffusers") and not installed_version("onnx"):
        yield (
            "diffusers without onnx: ModelOpt skips its diffusers plugin, so attention products have no quantizers, "
            f"and models quantized with onnx installed cannot be restored. pip install '{DISTRIBUTION}[onnx]'"
        )
    if gpus and not torch_sees_gpu:
        yield "there is an NVIDIA GPU, but this PyTorch does not use it: install a CUDA build of torch"


def render(diagnosis: Diagnosis) -> RenderableType:
    """The diagnosis as rich tables, to be printed by a ``rich.console.Console``."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    def mark(ok: bool) -> str:
        return "[green]yes[/]" if ok else "[red]no[/]"

    def described(package: Package) -> str:
        wanted = f" (needs {package.required})" if package.required and not package.ok else ""
        return escape(f"{package.name} {package.installed or 'missing'}{wanted}")

    machine = Table(title="This machine", show_header=False, title_justify="left")
    machine.add_row("Python", f"{diagnosis.python}, {diagnosis.system}")
    machine.add_row("PyTorch", f"CUDA {diagnosis.cuda}" if diagnosis.cuda else "CPU build")
    machine.add_row("NVIDIA GPU", escape("\n".join(diagnosis.gpus)) or "none found")
    machine.add_row(
        "CPU", f"INT8: {', '.join(diagnosis.int8_instructions)}" if diagnosis.int8_instructions else "no INT8"
    )
    machine.add_row("Core", ", ".join(described(package) for package in diagnosis.core) or "not installed as a package")

    extras = Table("extra", "ready", "packages", "to install", title="Extras", title_justify="left")
    told: set[Package] = set()
    for extra in sorted(diagnosis.extras, key=lambda extra: (extra.name in ("all", "dev"), extra.name != "onnx")):
        news = [described(package) for package in extra.packages if package not in told or not package.ok]
        told.update(extra.packages)
        packages = ", ".join(news) or "all of the above"
        extras.add_row(extra.name, mark(extra.ready), packages, "" if extra.ready else escape(extra.install))

    backends = Table("backend", "build", "run", "here", "for the rest", title="Backends", title_justify="left")
    for backend in diagnosis.backends:
        backends.add_row(
            backend.name, mark(backend.build), mark(backend.run), escape(backend.remark), escape(backend.cure)
        )
    notes = [f"[yellow]Note:[/] {escape(warning)}" for warning in diagnosis.warnings]
    return Group(machine, extras, backends, *notes)
