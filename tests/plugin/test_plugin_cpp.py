"""The C++ form of the plugin: built, called as TensorRT calls it, loaded by TensorRT-RTX's registry.

Its headers come in no package: set TENSORRT_INCLUDE to the folder of TensorRT's (10.13 or later) to run these tests.
"""

from __future__ import annotations

import os
import re
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
_VERSION = Path(INCLUDE, "NvInferVersion.h")
MAJOR = int(re.findall(r"#define \w*MAJOR\w* +(\d+)", _VERSION.read_text())[0]) if INCLUDE else 0
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
library, way, *shim = sys.argv[1:]
folder = pathlib.Path(importlib.util.find_spec("tensorrt_rtx_libs").origin).parent
for name in [*shim, folder / "libtensorrt_rtx.so.1"]:
    ctypes.CDLL(str(name), mode=ctypes.RTLD_GLOBAL)
import tensorrt_rtx as trt
registry = trt.get_plugin_registry()
if way == "load_library":
    assert registry.load_library(library) is not None
else:
    ctypes.CDLL(library)
for creator in registry.all_creators:
    if creator.name == "TdqScaleLookup":
        print(creator.plugin_namespace, creator.plugin_version, len(creator.field_names))
"""


def test_a_real_registry_loads_it(build: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    done = run(sys.executable, "-c", REGISTERED, build / "libtdq_scale_lookup_vc.so", "load_library")
    assert succeeded(done).split() == ["tdq", "1", "0"]


@pytest.mark.skipif(MAJOR != 11, reason="the registry of TensorRT-RTX 1 is that of TensorRT 11")
def test_registers_itself_with_a_real_registry(build: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    shim = tmp_path / "shim.so"
    (tmp_path / "shim.c").write_text("int getInferLibMajorVersion(void) { return 11; }")
    succeeded(run("cc", "-shared", "-fPIC", tmp_path / "shim.c", "-o", shim))
    done = run(sys.executable, "-c", REGISTERED, build / "libtdq_scale_lookup.so", "dlopen", shim)
    assert succeeded(done).split() == ["tdq", "1", "0"]


def test_loaded_into_another_version(build: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    done = run(sys.executable, "-c", REGISTERED, build / "libtdq_scale_lookup.so", "dlopen")
    assert succeeded(done) == ""
    assert f"built for TensorRT {MAJOR}, but version 1 is loaded" in done.stderr


def test_loaded_before_tensorrt(build: Path) -> None:
    done = run(sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(build / 'libtdq_scale_lookup.so')!r})")
    assert done.returncode == 0
    assert "but none is loaded; the plugin is not registered" in done.stderr


def test_missing_headers(tmp_path: Path) -> None:
    done = run("cmake", "-S", SOURCES, "-B", tmp_path, "-DTENSORRT_INCLUDE=/nowhere")
    assert done.returncode != 0
    assert "no NvInferRuntime.h there" in done.stderr
