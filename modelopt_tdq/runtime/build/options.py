"""What an engine is built for and with, and which of it a backend cannot do."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modelopt_tdq.errors import TdqError
from modelopt_tdq.runtime.build.onnx_model import OnnxFacts

__all__ = [
    "AOT_PLUGIN",
    "BUILDERS",
    "DEFAULT_COMPUTE_CAPABILITIES",
    "HARDWARE_COMPATIBILITY",
    "OLDEST_TENSORRT",
    "BuildOptions",
]

#: Backend (the library's import name) to the extra that installs it.
BUILDERS = {"tensorrt_rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}

#: The first TensorRT whose quantize scales need not be constants of the build, and with ahead-of-time plugins.
OLDEST_TENSORRT = "10.13"

#: Ada and consumer Blackwell: the oldest and the newest GPUs with FP8 that TensorRT-RTX names.
DEFAULT_COMPUTE_CAPABILITIES = ("8.9", "12.0")

#: Which other GPUs than the one it was built on TensorRT's engine may run on, to TensorRT's name for it.
HARDWARE_COMPATIBILITY = {
    "none": "NONE",
    "same_compute_capability": "SAME_COMPUTE_CAPABILITY",
    "ampere_plus": "AMPERE_PLUS",
}

#: Stands for the Python form of the lookup plugin among ``plugins``; the others are files.
AOT_PLUGIN = "aot"

#: Compute capability from which a type has tensor-core kernels. Below, TensorRT-RTX refuses FP8, and
#: runs INT8 in float without a word.
_FIRST_WITH = {"FP8": (8, 9), "INT8": (8, 0)}


@dataclass(frozen=True)
class BuildOptions:
    """Arguments of :func:`~modelopt_tdq.build_engine`, which describes them."""

    backend: str = "tensorrt_rtx"
    compute_capabilities: Sequence[str] = DEFAULT_COMPUTE_CAPABILITIES
    plugins: Sequence[str | os.PathLike[str]] = ()
    version_compatible: bool = False
    hardware_compatibility: str = "none"
    timing_cache: str | os.PathLike[str] | None = None

    @property
    def targets(self) -> tuple[str, ...]:
        """The GPUs to compile for, which TensorRT does not ask for."""
        return tuple(self.compute_capabilities) if self.backend == "tensorrt_rtx" else ()

    @property
    def libraries(self) -> tuple[str, ...]:
        """The plugins that are files, as absolute paths."""
        return tuple(str(Path(plugin).absolute()) for plugin in self.plugins if plugin != AOT_PLUGIN)

    def check(self, facts: OnnxFacts | None = None) -> None:
        """Check the options themselves; with ``facts``, whether the model can be built with them.

        Raises:
            TdqError: One cannot be used.
        """
        if self.backend not in BUILDERS:
            raise TdqError("backend", self.backend, "not a known backend", f"Use one of {', '.join(BUILDERS)}")
        if self.hardware_compatibility not in HARDWARE_COMPATIBILITY:
            raise TdqError(
                "hardware_compatibility",
                self.hardware_compatibility,
                "no such level",
                f"Use one of {', '.join(HARDWARE_COMPATIBILITY)}",
            )
        if self.backend == "tensorrt_rtx":
            self._refuse_for_rtx()
            _check_capabilities(self.compute_capabilities)
        elif tuple(self.compute_capabilities) != DEFAULT_COMPUTE_CAPABILITIES:
            raise TdqError(
                "compute_capabilities",
                self.compute_capabilities,
                "TensorRT builds for the GPU of this machine only",
                "Leave the argument out, or use backend='tensorrt_rtx'",
            )
        self._check_plugins()
        if facts is not None:
            self._check_needed_plugins(facts)
            if self.backend == "tensorrt_rtx":
                _check_types(facts, self.compute_capabilities)

    def _refuse_for_rtx(self) -> None:
        refused = {
            "version_compatible": (
                self.version_compatible,
                "an engine of TensorRT-RTX runs in the release that built it, in no other",
                "Build with the release that will run it, or use backend='tensorrt'",
            ),
            "hardware_compatibility": (
                self.hardware_compatibility != "none",
                "TensorRT-RTX compiles for the GPUs that it is given",
                "Name them in compute_capabilities",
            ),
            "timing_cache": (
                self.timing_cache is not None,
                "TensorRT-RTX times no kernels when it builds: there the cache does nothing but need a GPU",
                "Leave it out; when engines run, TensorRTSession keeps the kernels that were compiled",
            ),
            "plugins": (
                bool(self.plugins),
                "TensorRT-RTX has no Python plugins, and adds none in C++ to a network",
                "Leave them out and export with lowering='ratio', which needs none; or use backend='tensorrt'",
            ),
        }
        for field, (wrong, problem, cure) in refused.items():
            if wrong:
                raise TdqError(field, getattr(self, field), problem, cure)

    def _check_plugins(self) -> None:
        if isinstance(self.plugins, (str, bytes)):
            raise TdqError("plugins", self.plugins, "not a list", f"Pass a list of files, or [{AOT_PLUGIN!r}]")
        for library in self.libraries:
            if not Path(library).is_file():
                raise TdqError(
                    "plugins",
                    library,
                    "no such file",
                    f"Build it as modelopt_tdq/plugin/README.md says, or pass {AOT_PLUGIN!r} for the Python form",
                )
        if AOT_PLUGIN in self.plugins and self.libraries:
            raise TdqError(
                "plugins", list(self.plugins), "both forms of the plugin, of the same name", "Pass one of them"
            )

    def _check_needed_plugins(self, facts: OnnxFacts) -> None:
        names = [str(plugin) for plugin in facts.plugins]
        if names and self.backend == "tensorrt_rtx":
            raise TdqError(
                "onnx_path",
                names,
                "the model needs this plugin, and TensorRT-RTX takes none: neither in Python nor in C++",
                "Export with lowering='ratio', which needs no plugin, or build with backend='tensorrt'",
            )
        if names and not self.plugins:
            raise TdqError(
                "plugins",
                names,
                "the model needs this plugin, and it was not given",
                f"Pass plugins=[{AOT_PLUGIN!r}] for the Python form, or the path of its C++ library",
            )


def _check_capabilities(compute_capabilities: Sequence[str]) -> None:
    well_formed = not isinstance(compute_capabilities, str) and all(
        isinstance(capability, str) and re.fullmatch(r"\d+\.\d", capability) for capability in compute_capabilities
    )
    if not well_formed or not compute_capabilities or len(set(compute_capabilities)) < len(compute_capabilities):
        raise TdqError(
            "compute_capabilities",
            compute_capabilities,
            "not a list of different compute capabilities",
            f"Pass strings such as {DEFAULT_COMPUTE_CAPABILITIES}",
        )


def _check_types(facts: OnnxFacts, compute_capabilities: Sequence[str]) -> None:
    for name in sorted(facts.quantized_types & set(_FIRST_WITH)):
        first = _FIRST_WITH[name]
        for capability in compute_capabilities:
            if tuple(int(part) for part in capability.split(".")) < first:
                raise TdqError(
                    "compute_capabilities",
                    capability,
                    f"TensorRT-RTX has no {name} kernels for this GPU, and the model is quantized to {name}",
                    f"Build for {first[0]}.{first[1]} or later" + (", or quantize to INT8" if name == "FP8" else ""),
                )
