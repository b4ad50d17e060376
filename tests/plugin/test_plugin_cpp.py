"""The C++ form of the plugin: built, called as TensorRT calls it, loaded by TensorRT-RTX's registry.

Its headers come in no package: set TENSORRT_INCLUDE to the folder of TensorRT's (10.13 or later) to run these tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import modelopt_tdq.plugin
from modelopt_tdq.plugin.compile import compile_ptx

INCLUDE = os.environ.get("TENSORRT_INCLUDE", "")
pytestmark = [
    pytest.mark.skipif(not INCLUDE, reason="TENSORRT_INCLUDE does not name a folder with TensorRT's headers"),
    pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("c++") is None, reason="no cmake, or no C++"),
]

HERE = Path(__file__).parent
SOURCES = Path(modelopt_tdq.plugin.__file__).parent / "cpp"


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([str(c) for c in command], env=variables, capture_output=True, text=True, check=False)


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The libraries, as the CMake file builds them; and a program that calls the plugin."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("cpp")
    options = [f"-DTENSORRT_INCLUDE={INCLUDE}", f"-DPython3_EXECUTABLE={sys.executable}", "-DCMAKE_CXX_FLAGS=-Werror"]
    succeeded(run("cmake", "-S", SOURCES, "-B", folder, *options))
    succeeded(run("cmake", "--build", folder))
    cuda = Path(find_spec("triton").origin).parent / "backends/nvidia/include"  # type: ignore[union-attr, arg-type]
    compiler = [
        "c++",
        "-std=c++17",
        "-Wall",
        "-isystem",
        INCLUDE,
        "-isystem",
        cuda,
        "-I",
        SOURCES,
        "-I",
        folder / "ptx",
    ]
    sources = [SOURCES / name for name in ("tdq_scale_lookup.cpp", "cuda_driver.cpp", "loaded_tensorrt.cpp")]
    program = [HERE / "plugin_contract.cpp", *sources, "-rdynamic", "-ldl", "-o", folder / "contract"]
    succeeded(run(*compiler, *program))
    (folder / "driver").mkdir()
    succeeded(run(*compiler, "-shared", "-fPIC", HERE / "recording_driver.cpp", "-o", folder / "driver/libcuda.so.1"))
    return folder


def test_contract_without_a_gpu(build: Path) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU")
    succeeded(run(build / "contract"))


@pytest.mark.parametrize(
    ("capability", "target"), [("80", "sm_80"), ("86", "sm_80"), ("90", "sm_90"), ("121", "sm_120")]
)
def test_launch(build: Path, capability: str, target: str) -> None:
    driver = {"LD_LIBRARY_PATH": str(build / "driver"), "RECORDED_CAPABILITY": capability}
    lines = succeeded(run(build / "contract", "gpu", **driver)).splitlines()
    ptx = compile_ptx("8.0")
    # inputs, K, Q, outputs; 130 columns are three blocks of 64
    launch = (
        f"launch 0x22 grid 8 3 1 block {ptx.threads} 1 1 shared {ptx.shared_bytes} stream 0x77 "
        "arguments 0x1000 0x1004 0x1008 0x14 0x82 0x100c 0x1010"
    )
    once = [f"load {target}", f"function {ptx.entry}", launch, "unload 0x11"]
    assert lines == once * 2  # a plugin of the builder, and one of the runtime


def test_gpu_that_is_too_old(build: Path) -> None:
    driver = {"LD_LIBRARY_PATH": str(build / "driver"), "RECORDED_CAPABILITY": "75"}
    done = run(build / "contract", "gpu", **driver)
    assert "compute capability 7.5 are not supported" in done.stdout


REGISTERED = """
import ctypes, importlib.util, pathlib, sys
folder = pathlib.Path(importlib.util.find_spec("tensorrt_rtx_libs").origin).parent
ctypes.CDLL(str(folder / "libtensorrt_rtx.so.1"), mode=ctypes.RTLD_GLOBAL)
import tensorrt_rtx as trt
registry = trt.get_plugin_registry()
if sys.argv[2] == "load_library":
    assert registry.load_library(sys.argv[1]) is not None
else:
    ctypes.CDLL(sys.argv[1])
creator = registry.get_creator("TdqScaleLookup", "1", "tdq")
print(creator.name, creator.plugin_version, creator.plugin_namespace, len(creator.field_names))
"""


@pytest.mark.parametrize(("library", "way"), [("tdq_scale_lookup", "dlopen"), ("tdq_scale_lookup_vc", "load_library")])
def test_a_real_registry_takes_it(build: Path, library: str, way: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    done = run(sys.executable, "-c", REGISTERED, build / f"lib{library}.so", way)
    assert succeeded(done).split() == ["TdqScaleLookup", "1", "tdq", "0"]


def test_loaded_before_tensorrt(build: Path) -> None:
    done = run(sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(build / 'libtdq_scale_lookup.so')!r})")
    assert done.returncode == 0
    assert "the plugin is not registered" in done.stderr


def test_missing_headers(tmp_path: Path) -> None:
    done = run("cmake", "-S", SOURCES, "-B", tmp_path, "-DTENSORRT_INCLUDE=/nowhere")
    assert done.returncode != 0
    assert "no NvInferRuntime.h there" in done.stderr
