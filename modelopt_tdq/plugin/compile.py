"""The lookup kernel as PTX: compiled by Triton, ahead of time, on any machine.

PTX and not machine code: the driver finishes it for the GPU at hand, so that four targets serve every GPU from
compute capability 8.0 on.

    python -m modelopt_tdq.plugin.compile --output build/ptx

writes one file per target, and the C++ header that embeds them all.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelopt_tdq.core.files import write_text
from modelopt_tdq.errors import TdqError, require
from modelopt_tdq.plugin.kernel import BLOCK_COLUMNS, BLOCK_ROWS, scale_lookup

__all__ = ["CAPABILITIES", "HEADER", "Ptx", "compile_ptx", "cpp_header", "target_for", "write_all"]

#: Compute capabilities that are compiled for, ascending.
CAPABILITIES = ("8.0", "8.9", "9.0", "12.0")

#: Name of the C++ header.
HEADER = "tdq_scale_lookup_ptx.h"

#: PTX ISA 8.7, of CUDA 12.8: the first with sm_120. Newer ones need newer drivers, and the kernel nothing of them.
_PTX_VERSION = 87

_THREADS = 128

_SIGNATURE = {
    "timestep_ptr": "*fp32",
    "table_ptr": "*fp32",
    "timesteps_ptr": "*fp32",
    "rows": "i32",
    "columns": "i32",
    "scale_ptr": "*fp32",
    "ratio_ptr": "*fp32",
}
_CONSTANTS = {"block_rows": BLOCK_ROWS, "block_columns": BLOCK_COLUMNS}


@dataclass(frozen=True)
class Ptx:
    """The kernel for one target, and how it is launched: a grid of (B, ceil(Q / block_columns)) blocks.

    Attributes:
        capability: Compute capability, "9.0"; GPUs of this one and of later ones can run it.
        text: PTX, null-free ASCII.
        entry: Name of the kernel. Its parameters are those of ``scale_lookup``, pointers of 8 and sizes of 4 bytes.
        threads: Per block, all along x.
        shared_bytes: Dynamic shared memory per block.
        block_columns: Columns of the table that one block looks up.
    """

    capability: str
    text: str
    entry: str
    threads: int
    shared_bytes: int
    block_columns: int = BLOCK_COLUMNS


def target_for(capability: str) -> str:
    """The compiled target that a GPU runs: the highest one that is not above it.

    Args:
        capability: Of the GPU, "8.6".

    Raises:
        TdqError: Not a compute capability, or one below the lowest target.
    """
    match = re.fullmatch(r"(\d+)\.(\d+)", capability)
    fitting = [] if match is None else [c for c in CAPABILITIES if _number(c) <= _number(capability)]
    if not fitting:
        raise TdqError(
            "capability",
            capability,
            "not the compute capability of a GPU that the plugin supports",
            f"Use {CAPABILITIES[0]} or a later one, written as 'major.minor'",
        )
    return fitting[-1]


def compile_ptx(capability: str) -> Ptx:
    """Compile the kernel; no GPU and no CUDA toolkit is needed.

    Args:
        capability: One of :data:`CAPABILITIES`.

    Raises:
        TdqError: Not one of these; or Triton is set to interpret kernels instead of compiling them.
        MissingExtraError: Triton is not installed (extra ``plugin``).
    """
    if capability not in CAPABILITIES:
        raise TdqError("capability", capability, "not a target of the plugin", f"Use one of {list(CAPABILITIES)}")
    triton, compiler = require("triton", "plugin"), require("triton.backends.compiler", "plugin")
    if triton.knobs.runtime.interpret:
        raise TdqError(
            "TRITON_INTERPRET", "1", "Triton interprets kernels now, and compiles none", "Start without this variable"
        )
    number = _number(capability)
    source = triton.compiler.ASTSource(
        fn=triton.jit(scale_lookup),
        signature={**_SIGNATURE, **dict.fromkeys(_CONSTANTS, "constexpr")},
        constexprs=_CONSTANTS,
    )
    compiled = triton.compile(
        source,
        target=compiler.GPUTarget("cuda", number, 32),
        # no contraction: a product and a sum round as they are written, whatever Triton's default is
        options={"num_warps": _THREADS // 32, "ptx_version": _PTX_VERSION, "enable_fp_fusion": False},
    )
    facts = compiled.metadata
    for scratch in ("global_scratch_size", "profile_scratch_size"):
        if getattr(facts, scratch, 0):
            raise TdqError(
                "triton", triton.__version__, f"it compiles the kernel with a {scratch}", "Use another version"
            )
    text = _portable(_without_scratch(_without_debug(compiled.asm["ptx"]), facts.name, triton), number)
    return Ptx(capability, text, facts.name, facts.num_warps * 32, facts.shared)


def _number(capability: str) -> int:
    major, minor = capability.split(".")
    return int(major) * 10 + int(minor)


def _without_debug(text: str) -> str:
    """Drop line numbers, comments and debugging sections, which hold paths of this machine."""
    code = text[: match.start()] if (match := re.search(r"^\s*\.(file|section)\s", text, re.M)) else text
    lines = (re.sub(r"\s*//.*", "", line).rstrip() for line in code.splitlines())
    return "\n".join(line for line in lines if line and not re.match(r"\s*\.loc\s", line)) + "\n"


def _without_scratch(text: str, entry: str, triton: Any) -> str:
    """Drop the parameters behind the kernel's own: pointers to scratch memory, which TensorRT does not pass."""
    declared = re.search(rf"\.entry {entry}\(\s*(.*?)\s*\)", text, re.S)
    parameters = [] if declared is None else [p.strip() for p in declared.group(1).split(",")]
    extra = [p.split()[-1] for p in parameters[len(_SIGNATURE) :]]
    if declared is None or len(parameters) < len(_SIGNATURE) or any(text.count(name) != 1 for name in extra):
        raise TdqError(
            "triton",
            triton.__version__,
            f"it compiles the kernel with other parameters than expected: {parameters}",
            "Use another version",
        )
    own = ",\n\t".join(parameters[: len(_SIGNATURE)])
    return text[: declared.start(1)] + own + text[declared.end(1) :]


def _portable(text: str, number: int) -> str:
    """Target sm_90 instead of sm_90a: the kernel uses nothing that later GPUs lack."""
    return re.sub(rf"^\.target sm_{number}a\b", f".target sm_{number}", text, flags=re.M)


def cpp_header(kernels: Sequence[Ptx]) -> str:
    """C++ source that holds the kernels, in ascending order of capability."""
    texts = "".join(
        f'inline constexpr char kPtx{_number(k.capability)}[] = R"ptx(\n{k.text})ptx";\n\n' for k in kernels
    )
    entries = "".join(
        f'    {{{_number(k.capability)}, kPtx{_number(k.capability)}, "{k.entry}", {k.threads}, {k.shared_bytes}, '
        f"{k.block_columns}}},\n"
        for k in kernels
    )
    return (
        "// Written by modelopt_tdq.plugin.compile: the kernel of modelopt_tdq/plugin/kernel.py. Not for editing.\n"
        "#pragma once\n\n"
        "namespace tdq\n{\n\n"
        "//! A kernel for GPUs of compute capability `capability / 10.capability % 10` and later ones.\n"
        "struct Kernel\n{\n"
        "    int capability;\n    char const* ptx;\n    char const* entry;\n"
        "    unsigned int threads;\n    unsigned int sharedBytes;\n    int blockColumns;\n};\n\n"
        f"{texts}//! Ascending by capability.\n"
        f"inline constexpr Kernel kKernels[] = {{\n{entries}}};\n\n"
        "} // namespace tdq\n"
    )


def write_all(folder: str | Path) -> list[Path]:
    """Write ``scale_lookup_sm<NN>.ptx`` of every target, and the C++ header with all of them.

    Returns:
        The files.
    """
    target = Path(folder)
    kernels = [compile_ptx(capability) for capability in CAPABILITIES]
    contents = {f"{k.entry}_sm{_number(k.capability)}.ptx": k.text for k in kernels} | {HEADER: cpp_header(kernels)}
    return [write_text(target / name, content) for name, content in contents.items()]


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m modelopt_tdq.plugin.compile", description=__doc__)
    parser.add_argument("--output", required=True, help="folder to write to")
    for path in write_all(parser.parse_args().output):
        print(path)


if __name__ == "__main__":
    try:
        _main()
    except TdqError as error:
        raise SystemExit(f"Error: {error}") from None
