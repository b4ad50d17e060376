"""Execution providers of ONNX Runtime: what computes a session's graph, and with which options.

Facts of ONNX Runtime 1.31 and of the package onnxruntime-ep-nv-tensorrt-rtx-cu13 0.5.0, from their documentation and
headers. On the machine that this was written on no GPU was at hand: the options and errors are tested, and the CPU's
provider runs; no other has run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelopt_tdq.errors import TdqError
from modelopt_tdq.install import install_command
from modelopt_tdq.runtime.build.onnx_model import read_onnx
from modelopt_tdq.runtime.build.shape_profile import shape_profile

__all__ = ["PROVIDERS", "Chosen", "Provider", "add_providers", "profile_options", "resolved"]

#: How ONNX Runtime's options call the three shapes of a profile.
_WHICH = ("min", "opt", "max")


@dataclass(frozen=True)
class Provider:
    """One way to compute a graph.

    Attributes:
        name: ONNX Runtime's own.
        install: Command that brings it.
        package: Python package of a provider that is a library of its own; None: part of ONNX Runtime.
        profile: Prefix of its options for the ranges of open sizes; None: it needs none.
        options: What graphs with explicit quantization need.
    """

    name: str
    install: str
    package: str | None = None
    profile: str | None = None
    options: Mapping[str, str] | None = None


#: By the names of this package; those of ONNX Runtime are taken as well.
PROVIDERS: Mapping[str, Provider] = {
    "cpu": Provider("CPUExecutionProvider", "pip install onnxruntime"),
    "cuda": Provider("CUDAExecutionProvider", "pip uninstall onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'"),
    "tensorrt": Provider(
        "TensorrtExecutionProvider",
        "pip uninstall onnxruntime && pip install onnxruntime-gpu tensorrt",
        profile="trt_profile",
        # without it the builder of TensorRT 10 and earlier refuses INT8 operands
        options={"trt_int8_enable": "1"},
    ),
    "tensorrt_rtx": Provider(
        "NvTensorRTRTXExecutionProvider",
        install_command("onnxruntime-rtx"),
        package="onnxruntime_ep_nv_tensorrt_rtx",
        profile="nv_profile",
    ),
}

_BY_OWN_NAME = {provider.name: provider for provider in PROVIDERS.values()}

#: A provider by name, or by name and options.
Chosen = str | tuple[str, Mapping[str, Any]]


def profile_options(
    provider: Provider, file: Path, sizes: Mapping[str, tuple[int, int, int]] | None = None
) -> dict[str, str]:
    """The provider's options for the ranges of a graph's open sizes, made from the axes that export left open.

    Args:
        provider: One with a profile.
        file: ONNX file.
        sizes: As ``dynamic_sizes`` of :func:`~modelopt_tdq.build_engine`, and with its defaults for batches.

    Returns:
        Three options, such as ``nv_profile_min_shapes``: ``sample:1x4x64x64,timestep:1``; none where all sizes are
        fixed.

    Raises:
        TdqError: As :func:`~modelopt_tdq.runtime.build.shape_profile.shape_profile`.
    """
    if provider.profile is None:
        return {}
    shapes = shape_profile(read_onnx(file), sizes or {})
    return {
        f"{provider.profile}_{which}_shapes": ",".join(
            f"{tensor}:{'x'.join(map(str, ranges[number]))}" for tensor, ranges in shapes.items()
        )
        for number, which in enumerate(_WHICH)
        if shapes
    }


def add_providers(
    ort: Any,
    options: Any,
    chosen: Sequence[Chosen],
    file: Path | None = None,
    sizes: Mapping[str, tuple[int, int, int]] | None = None,
) -> list[tuple[str, dict[str, str]]]:
    """Make the providers ready.

    Where ``cpu`` is not among them, a node that they cannot compute is an error rather than computed on the CPU.

    Args:
        ort: The module ``onnxruntime``.
        options: Its ``SessionOptions``; providers that are libraries of their own are added to it.
        chosen: Names, or names with options, which precede those of this package; first come, first served.
        file: The graph, for the ranges of its open sizes; None of a graph in memory, which has no profile then.
        sizes: As of :func:`profile_options`.

    Returns:
        The others, as ``InferenceSession`` takes them; empty where there are only libraries.

    Raises:
        TdqError: A provider is unknown, not installed, or finds no device.
    """
    if isinstance(chosen, str) or not chosen:
        raise TdqError("providers", chosen, "not a list of providers", f"Pass some of {', '.join(PROVIDERS)}")
    wanted = [resolved(each) for each in chosen]
    inside: list[tuple[str, dict[str, str]]] = []
    for provider, own in wanted:
        profile = {} if file is None else profile_options(provider, file, sizes)
        made = {**(provider.options or {}), **profile, **{name: str(value) for name, value in own.items()}}
        if provider.package is not None:
            options.add_provider_for_devices(_devices(ort, provider), made)
        elif provider.name not in ort.get_available_providers():
            raise _absent(provider, f"ONNX Runtime has {', '.join(ort.get_available_providers())}")
        else:
            inside.append((provider.name, made))
    if all(provider is not PROVIDERS["cpu"] for provider, _ in wanted):
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return inside


def resolved(chosen: Chosen) -> tuple[Provider, Mapping[str, Any]]:
    """A provider and the options that the caller gives it.

    Raises:
        TdqError: There is no such provider.
    """
    name, options = (chosen, {}) if isinstance(chosen, str) else chosen
    provider = PROVIDERS.get(name) or _BY_OWN_NAME.get(name)
    if provider is None:
        raise TdqError("providers", name, "no such provider", f"Use some of {', '.join(PROVIDERS)}")
    return provider, options


def _absent(provider: Provider, problem: str) -> TdqError:
    return TdqError("providers", provider.name, f"it is not there: {problem}", provider.install)


def _devices(ort: Any, provider: Provider) -> list[Any]:
    """The devices of a provider that is a library, which is loaded once per process."""
    package = str(provider.package)
    if importlib.util.find_spec(package) is None:
        raise _absent(provider, f"the package {package} is not installed")
    library: Any = importlib.import_module(package)

    def devices() -> list[Any]:
        return [device for device in ort.get_ep_devices() if device.ep_name == provider.name]

    found = devices()
    if not found:
        try:
            ort.register_execution_provider_library(provider.name, library.get_library_path())
        except Exception as error:  # of ONNX Runtime, which has a class for each code
            raise TdqError(
                "providers",
                provider.name,
                f"its library cannot be loaded ({error})",
                "It needs an NVIDIA GPU and its driver; check with nvidia-smi",
            ) from error
        found = devices()
    if not found:
        raise TdqError(
            "providers",
            provider.name,
            "it finds no GPU that it serves",
            "It serves RTX GPUs from Ampere (SM 8.6) on; use another provider",
        )
    return found
