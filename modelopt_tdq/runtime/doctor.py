"""What is installed, what each backend can do on this machine, and what to install for the rest."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement
from packaging.version import Version

from modelopt_tdq.core.installed import DISTRIBUTION, installed_version
from modelopt_tdq.install import install_command
from modelopt_tdq.runtime.build.options import OLDEST_TENSORRT
from modelopt_tdq.version import __version__

if TYPE_CHECKING:
    from rich.text import Text

__all__ = [
    "DISTRIBUTION",
    "BackendStatus",
    "Diagnosis",
    "Extra",
    "Package",
    "as_data",
    "doctor",
    "examine_backends",
    "import_problem",
    "installed_version",
    "render",
]

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
        return install_command(self.name)


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
    backends: tuple[BackendStatus, ...]
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
            f"and models quantized with onnx installed cannot be restored. {install_command('onnx')}"
        )
    if gpus and not torch_sees_gpu:
        yield "there is an NVIDIA GPU, but this PyTorch does not use it: install a CUDA build of torch"


#: Of the column with names, in characters.
_NAME = 16


def render(diagnosis: Diagnosis, width: int = 100) -> Text:
    """The diagnosis as text, to be printed by a ``rich.console.Console`` with ``soft_wrap=True``.

    Args:
        diagnosis: What was found.
        width: Lines are no longer, in characters; but commands are never broken, so that they can be copied.
    """
    from rich.text import Text

    text = Text()

    def heading(title: str) -> None:
        text.append(f"\n{title}\n" if len(text) else f"{title}\n", style="bold")

    def line(name: str, says: str, ok: bool | None = None, command: str = "") -> None:
        mark = {None: "", True: "yes  ", False: "no   "}[ok]
        indent = 2 + _NAME + len(mark)
        text.append(f"  {name:<{_NAME}}")
        text.append(mark, style="green" if ok else "red")
        text.append(
            "\n".join(wrap(says, max(width - indent, 20), break_long_words=False)).replace("\n", "\n" + " " * indent)
        )
        text.append("\n")
        if command:
            text.append(f"{' ' * indent}{command}\n", style="cyan")

    def described(package: Package) -> str:
        wanted = f" (needs {package.required})" if package.required and not package.ok else ""
        return f"{package.name} {package.installed or 'missing'}{wanted}"

    heading("This machine")
    line("Python", f"{diagnosis.python}, {diagnosis.system}")
    line("PyTorch", f"CUDA {diagnosis.cuda}" if diagnosis.cuda else "CPU build")
    line("NVIDIA GPU", "; ".join(diagnosis.gpus) or "none found")
    line("INT8 on the CPU", ", ".join(diagnosis.int8_instructions) or "no dot products")
    line("Core", ", ".join(described(package) for package in diagnosis.core) or "not installed as a package")

    heading("Extras")
    for extra in sorted(diagnosis.extras, key=lambda extra: (extra.name in ("all", "dev"), extra.name != "onnx")):
        missing = [described(package) for package in extra.packages if not package.ok]
        there = [described(package) for package in extra.packages] if extra.name not in ("all", "dev") else []
        says = ", ".join(missing or there) or f"its {len(extra.packages)} packages are there"
        line(extra.name, says, extra.ready, "" if extra.ready else extra.install)

    heading("Backends")
    for backend in diagnosis.backends:
        does = f"build {'yes' if backend.build else 'no'}, run {'yes' if backend.run else 'no'}: {backend.remark}"
        is_command = backend.cure.startswith("pip ")
        says = does if is_command or not backend.cure else f"{does}. {backend.cure}"
        line(backend.name, says, command=backend.cure if is_command else "")
    for warning in diagnosis.warnings:
        text.append("\nNote: ", style="yellow")
        text.append(f"{warning}\n")
    return text


def as_data(diagnosis: Diagnosis) -> dict[str, Any]:
    """The diagnosis as plain data for JSON, for programs and for issue reports."""
    found = asdict(diagnosis)
    found["modelopt_tdq"] = __version__
    found["ok"] = diagnosis.ok
    for extra, shown in zip(diagnosis.extras, found["extras"], strict=True):
        shown["ready"] = extra.ready
    return found


@dataclass(frozen=True)
class BackendStatus:
    """What a deployment backend can do here.

    Attributes:
        name: Its usual name.
        build: Whether models can be prepared for it here (an engine built, a graph read).
        run: Whether models can run on it here.
        remark: What that means, in words.
        cure: What to do for the rest; empty if nothing is missing.
    """

    name: str
    build: bool
    run: bool
    remark: str
    cure: str = ""


def import_problem(module: str) -> str | None:
    """Why ``module`` cannot be imported, or None."""
    try:
        import_module(module)
    except (ImportError, OSError) as error:
        return str(error)
    return None


def _tensorrt_too_old() -> str | None:
    """Why builds refuse the installed TensorRT, or None."""
    version = str(import_module("tensorrt").__version__)
    if Version(version) >= Version(OLDEST_TENSORRT):
        return None
    return f"{version} is too old: builds need {OLDEST_TENSORRT} or later"


def _lookup_plugin() -> str:
    """Whether lowering="plugin" can be built here in its Python form."""
    for module, needs in (("tensorrt.plugin", "the full package tensorrt"), ("triton", "Triton")):
        if import_problem(module):
            return f"its Python form of the plugin TdqScaleLookup needs {needs}"
    return "the plugin TdqScaleLookup can be built in"


def examine_backends(
    gpus: tuple[str, ...], instructions: tuple[str, ...], torch_sees_gpu: bool = False
) -> Iterable[BackendStatus]:
    """One after the other; each says what it needs and what it is for."""

    def cure(extra: str) -> str:
        return install_command(extra)

    gpu = gpus[0].split(",")[0] if gpus else None
    if problem := import_problem("onnxruntime") or import_problem("onnx"):
        yield BackendStatus("ONNX Runtime", False, False, problem, cure("onnx"))
    else:
        yield BackendStatus("ONNX Runtime", True, True, "the numeric reference, on the CPU; not meant for speed")

    if problem := import_problem("openvino"):
        yield BackendStatus("OpenVINO", False, False, problem, cure("openvino"))
    else:
        speed = f"INT8 kernels use {', '.join(instructions)}" if instructions else "this CPU has no INT8 dot products"
        yield BackendStatus("OpenVINO", True, True, f"on the CPU; {speed}")

    no_torch = "To run: install a CUDA build of torch" if gpu and not torch_sees_gpu else ""
    if problem := import_problem("tensorrt_rtx"):
        yield BackendStatus("TensorRT-RTX", False, False, problem, cure("tensorrt-rtx"))
    elif gpu:
        here = f"builds ahead of time; runs on {gpu} if it is an RTX GPU"
        yield BackendStatus("TensorRT-RTX", True, torch_sees_gpu, here, no_torch)
    else:
        yield BackendStatus(
            "TensorRT-RTX", True, False, "builds ahead of time, for GPUs elsewhere", "To run: a machine with an RTX GPU"
        )

    if problem := import_problem("tensorrt"):
        needs = "" if gpu else "; it needs a machine with an NVIDIA GPU"
        yield BackendStatus("TensorRT", False, False, problem + needs, cure("tensorrt"))
    elif problem := _tensorrt_too_old():
        yield BackendStatus("TensorRT", False, False, problem, cure("tensorrt"))
    elif gpu:
        yield BackendStatus(
            "TensorRT", True, torch_sees_gpu, f"builds for and runs on {gpu}; {_lookup_plugin()}", no_torch
        )
    else:
        yield BackendStatus("TensorRT", False, False, "it needs a GPU to build, too", "A machine with an NVIDIA GPU")

    if problem := import_problem("polygraphy"):
        yield BackendStatus("Polygraphy", False, False, problem, cure("compare"))
    else:
        yield BackendStatus("Polygraphy", True, True, "compares the backends above, per time step")
