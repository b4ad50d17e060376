"""The stand-in for TensorRT has nothing that the real bindings lack."""

from __future__ import annotations

import enum
from importlib.util import find_spec
from pathlib import Path

import pytest
import stand_in_engine
from stand_in_engine import CLASSES, RTX_ONLY

#: Used when engines are built by TensorRT, beyond what tests build with TensorRT-RTX.
BUILD_ONLY = {
    "BuilderFlag": ("VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"),
    "HardwareCompatibilityLevel": ("NONE", "SAME_COMPUTE_CAPABILITY", "AMPERE_PLUS"),
    "IBuilderConfig": (
        "set_flag",
        "hardware_compatibility_level",
        "create_timing_cache",
        "set_timing_cache",
        "get_timing_cache",
        "add_optimization_profile",
        "profiling_verbosity",
    ),
    "ITimingCache": ("serialize",),
    "IPluginRegistry": ("get_creator", "load_library"),
    "EngineInspector": ("get_engine_information",),
}


def used(cls: type) -> set[str]:
    """The names of a class of the stand-in: methods, attributes of its instances, members."""
    if issubclass(cls, enum.Enum):
        return set(cls.__members__)
    instance = {"IRuntimeConfig": {"cuda_graph_strategy"}, "Runtime": {"engine_host_code_allowed"}}
    return {name for name in vars(cls) if not name.startswith("_")} | instance.get(cls.__name__, set())


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_tensorrt_rtx_has_what_sessions_use(cls: type) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    assert used(cls) <= set(dir(getattr(trt, cls.__name__)))


@pytest.mark.parametrize("name", BUILD_ONLY)
def test_tensorrt_rtx_has_what_builds_use(name: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    assert set(BUILD_ONLY[name]) <= set(dir(getattr(trt, name)))


def test_tensorrt_has_them_too() -> None:
    """Its library does not load without TensorRT, but holds the names as strings."""
    spec = find_spec("tensorrt_bindings")
    if spec is None:
        pytest.skip("the bindings are in the wheel tensorrt-cu13-bindings")
    content = (Path(str(spec.origin)).parent / "tensorrt.so").read_bytes()
    wanted = {name for names in BUILD_ONLY.values() for name in names} | {"PREFER_AOT_PYTHON_PLUGINS"}
    for cls in set(CLASSES) - set(RTX_ONLY):
        wanted |= {cls.__name__, *used(cls)}
    wanted -= {"create_runtime_cache", "set_runtime_cache", "cuda_graph_strategy", "get_engine_validity"}  # RTX alone
    # a string may be stored as the end of a longer one
    assert not {name for name in wanted if f"{name}\0".encode() not in content}
    assert b"no_such_name_at_all\0" not in content


def test_the_stand_in_is_used_whole() -> None:
    """Otherwise its own list of classes would not be what is compared."""
    public = {name for name, value in vars(stand_in_engine).items() if isinstance(value, type)}
    assert {cls.__name__ for cls in CLASSES} <= public
