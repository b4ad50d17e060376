"""What the GPU and the libraries are."""

from __future__ import annotations

import shutil
import subprocess

import torch

from modelopt_tdq.lab.bench.gpu.part import Asked, Row
from modelopt_tdq.lab.provenance import PACKAGES, installed_versions

__all__ = ["run"]

_PACKAGES = (*PACKAGES, "triton", "tensorrt")
_ASKED = "name,driver_version,clocks.max.sm,clocks.max.memory,power.limit,memory.total"


def run(asked: Asked) -> list[Row]:
    """One row per fact."""
    facts: dict[str, object] = dict(installed_versions(_PACKAGES))
    for name in ("tensorrt_rtx", "tensorrt"):
        try:
            facts[f"import {name}"] = __import__(name).__version__
        except Exception as error:  # native libraries fail to load in many ways
            facts[f"import {name}"] = f"{type(error).__name__}: {error}"
    facts["torch built for CUDA"] = torch.version.cuda
    if torch.cuda.is_available():
        facts["compute capability"] = "{}.{}".format(*torch.cuda.get_device_capability())
        facts["multiprocessors"] = torch.cuda.get_device_properties(0).multi_processor_count
        facts["GPUs"] = torch.cuda.device_count()
    program = shutil.which("nvidia-smi")
    if program is not None:
        asked_for = [program, f"--query-gpu={_ASKED}", "--format=csv,noheader"]
        said = subprocess.run(asked_for, check=False, capture_output=True, text=True)
        facts["nvidia-smi"] = said.stdout.strip() or said.stderr.strip()
    return [{"fact": name, "value": value} for name, value in facts.items()]
