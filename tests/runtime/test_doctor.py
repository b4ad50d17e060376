import json
import sys
import types
from io import StringIO

import pytest
from packaging.specifiers import SpecifierSet
from rich.console import Console

from modelopt_tdq.install import install_command
from modelopt_tdq.runtime import doctor as module
from modelopt_tdq.runtime.doctor import (
    BackendStatus,
    Diagnosis,
    Extra,
    Package,
    as_data,
    doctor,
    examine_backends,
    import_problem,
    render,
)


@pytest.fixture(scope="module")
def diagnosis() -> Diagnosis:
    return doctor()


def text(diagnosis: Diagnosis, width: int = 200) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(render(diagnosis, width), soft_wrap=True)
    return console.file.getvalue()


def test_it_reads_the_ranges_of_this_package(diagnosis: Diagnosis) -> None:
    core = {package.name: package for package in diagnosis.core}
    assert core["torch"].ok
    assert core["nvidia-modelopt"].ok
    assert "0.46" not in SpecifierSet(core["nvidia-modelopt"].required)
    assert diagnosis.ok
    extras = {extra.name: {package.name for package in extra.packages} for extra in diagnosis.extras}
    assert {"diffusers", "onnx", "openvino", "tensorrt-rtx", "tensorrt", "compare", "report", "dev"} <= set(extras)
    assert {"onnx", "openvino"} <= extras["openvino"]
    assert "torch" not in extras["openvino"]


def test_a_backend_is_ready_exactly_when_it_imports(diagnosis: Diagnosis) -> None:
    modules = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "tensorrt_rtx": "TensorRT-RTX"}
    backends = {backend.name: backend for backend in diagnosis.backends}
    for name, shown in modules.items():
        assert backends[shown].build == (import_problem(name) is None)
        assert bool(backends[shown].cure) != backends[shown].run
    if not diagnosis.gpus:
        assert not backends["TensorRT-RTX"].run
        assert not backends["TensorRT"].build


def test_what_is_missing_is_said_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("openvino", "polygraphy"):
        monkeypatch.setitem(sys.modules, name, None)
    backends = {backend.name: backend for backend in examine_backends((), ())}
    assert not backends["OpenVINO"].run
    assert backends["OpenVINO"].cure == install_command("openvino")
    assert backends["Polygraphy"].cure == install_command("compare")


@pytest.mark.parametrize(
    ("version", "torch_sees_gpu", "build", "run", "words"),
    [
        ("10.12.0.36", True, False, False, "10.12.0.36 is too old: builds need 10.13 or later"),
        ("11.4.0.106", True, True, True, "builds for and runs on NVIDIA L4; its Python form of the plugin"),
        ("11.4.0.106", False, True, False, "builds for and runs on NVIDIA L4"),
    ],
)
def test_tensorrt_beside_a_gpu(
    monkeypatch: pytest.MonkeyPatch, version: str, torch_sees_gpu: bool, build: bool, run: bool, words: str
) -> None:
    library = types.ModuleType("tensorrt")
    library.__version__ = version
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", None)  # another test may have put one there
    found = {b.name: b for b in examine_backends(("NVIDIA L4, 8.9",), (), torch_sees_gpu)}["TensorRT"]
    assert (found.build, found.run) == (build, run)
    assert words in found.remark
    assert ("CUDA build of torch" in found.cure) == (build and not run)


def test_ranges() -> None:
    assert Package("p", ">=1,<2", "1.5").ok
    assert Package("p", ">=1,<2", "1.5+cpu").ok
    assert not Package("p", ">=1,<2", "2.0").ok
    assert not Package("p", ">=1,<2", None).ok
    assert Extra("e", (Package("p", ">=1", "1"),)).ready
    assert not Extra("e", (Package("p", ">=1", "1"), Package("q", "", None))).ready


def test_the_tables_name_versions_cures_and_notes() -> None:
    shown = text(
        Diagnosis(
            python="3.12.0",
            system="Linux x86_64",
            cuda=None,
            gpus=("NVIDIA L4, 8.9",),
            int8_instructions=("AVX512-VNNI",),
            core=(Package("torch", ">=2.9", "2.8.0"),),
            extras=(
                Extra("onnx", (Package("onnx", ">=1.18", None),)),
                Extra("all", (Package("onnx", ">=1.18", None),)),
            ),
            backends=(
                BackendStatus("OpenVINO", False, False, "No module named 'openvino'", "pip install 'x[openvino]'"),
            ),
            warnings=("diffusers without onnx",),
        )
    )
    for expected in (
        "torch 2.8.0 (needs >=2.9)",
        "NVIDIA L4, 8.9",
        "AVX512-VNNI",
        "onnx missing (needs >=1.18)",
        install_command("onnx"),
        "pip install 'x[openvino]'",
        "Note: diffusers without onnx",
    ):
        assert expected in shown


def test_the_real_tables_can_be_drawn(diagnosis: Diagnosis) -> None:
    shown = text(diagnosis)
    assert "packages are there" in shown or "missing" in shown
    assert diagnosis.python in shown


def test_a_gpu_is_found_without_cuda_in_torch(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA L4, 8.9'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert module._gpus() == ("NVIDIA L4, 8.9",)
    assert any("CUDA build" in warning for warning in module._warnings(module._gpus(), False))
    program.write_text("#!/bin/sh\nexit 9\n")
    assert module._gpus() == ()


@pytest.mark.parametrize("width", [30, 80, 200])
def test_commands_are_whole_however_narrow_the_terminal(width: int) -> None:
    missing = (Package("onnx", ">=1.18", None),)
    found = Diagnosis("3.11", "Linux", None, (), (), (), (Extra("onnx", missing),), (), ())
    assert install_command("onnx") in text(found, width)
    others = [line for line in text(found, width).splitlines() if "pip install" not in line]
    assert max(len(line) for line in others) <= max(width, 48)


def test_json_for_reports(diagnosis: Diagnosis) -> None:
    found = json.loads(json.dumps(as_data(diagnosis)))
    assert {"python", "gpus", "core", "extras", "backends", "warnings", "ok", "modelopt_tdq"} <= set(found)
    assert {package["name"]: package["installed"] for package in found["core"]}["torch"] is not None
    assert all(isinstance(extra["ready"], bool) for extra in found["extras"])
