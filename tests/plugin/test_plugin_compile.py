"""The lookup kernel as PTX: what TensorRT and the driver will find in it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from modelopt_tdq import TdqError
from modelopt_tdq.plugin.compile import (
    CAPABILITIES,
    HEADER,
    Ptx,
    _without_scratch,
    compile_ptx,
    cpp_header,
    target_for,
    write_all,
)
from modelopt_tdq.plugin.kernel import BLOCK_COLUMNS

triton = pytest.importorskip("triton")

# three inputs, K and Q, two outputs
PARAMETERS = ["u64", "u64", "u64", "u32", "u32", "u64", "u64"]


@pytest.fixture(scope="module")
def kernels() -> dict[str, Ptx]:
    return {capability: compile_ptx(capability) for capability in CAPABILITIES}


def parameters(ptx: Ptx) -> list[str]:
    declared = re.search(rf"\.visible \.entry {ptx.entry}\((.*?)\)", ptx.text, re.S)
    assert declared is not None
    return re.findall(r"\.param \.(\w+)", declared.group(1))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_facts(kernels: dict[str, Ptx], capability: str) -> None:
    ptx = kernels[capability]
    assert ptx.text.startswith(".version 8.7\n")  # CUDA 12.8: the driver of TensorRT 10.13 takes it
    assert f"\n.target sm_{capability.replace('.', '')}\n" in ptx.text  # no "a": later GPUs run it too
    assert parameters(ptx) == PARAMETERS
    assert (ptx.entry, ptx.threads, ptx.block_columns) == ("scale_lookup", 128, BLOCK_COLUMNS)
    assert 0 < ptx.shared_bytes <= 4096
    assert f".reqntid {ptx.threads}\n" in ptx.text
    assert ptx.text.isascii()
    assert "\0" not in ptx.text


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_arithmetic_is_as_written(kernels: dict[str, Ptx], capability: str) -> None:
    text = kernels[capability].text
    # exact half-way points, correctly rounded division, denormals kept, nothing contracted
    assert "add.rn.f64" in text
    assert re.findall(r"\bdiv\.\S+", text) == ["div.rn.f32"]
    assert not re.search(r"\.ftz|\.approx|\bfma\.", text)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_nothing_of_this_machine(kernels: dict[str, Ptx], capability: str) -> None:
    text = kernels[capability].text
    assert not re.search(r"//|/\w+/|kernel\.py|\.loc|\.file|\.section", text)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_assembles(kernels: dict[str, Ptx], capability: str, tmp_path: Path) -> None:
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    if not ptxas.is_file():
        pytest.skip("this build of Triton has no ptxas")
    source = tmp_path / "kernel.ptx"
    source.write_text(kernels[capability].text)
    command = [ptxas, f"-arch=sm_{capability.replace('.', '')}", "-v", source, "-o", tmp_path / "kernel.cubin"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "0 bytes spill stores" in done.stderr


def test_ptx_of_the_oldest_target_assembles_for_the_newest(kernels: dict[str, Ptx], tmp_path: Path) -> None:
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    if not ptxas.is_file():
        pytest.skip("this build of Triton has no ptxas")
    (tmp_path / "kernel.ptx").write_text(kernels["8.0"].text)
    command = [ptxas, "-arch=sm_120", tmp_path / "kernel.ptx", "-o", tmp_path / "kernel.cubin"]
    subprocess.run(command, check=True)


@pytest.mark.parametrize(
    ("device", "target"),
    [
        ("8.0", "8.0"),
        ("8.6", "8.0"),
        ("8.9", "8.9"),
        ("9.0", "9.0"),
        ("10.0", "9.0"),
        ("12.0", "12.0"),
        ("12.1", "12.0"),
    ],
)
def test_target_of_a_device(device: str, target: str) -> None:
    assert target_for(device) == target


@pytest.mark.parametrize("capability", ["7.5", "sm_90", "90", ""])
def test_unsupported_device(capability: str) -> None:
    with pytest.raises(TdqError, match="compute capability of a GPU that the plugin supports"):
        target_for(capability)


def test_unknown_target() -> None:
    with pytest.raises(TdqError, match=r"8\.6.*not a target"):
        compile_ptx("8.6")


def test_interpreter_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(TdqError, match="Triton interprets kernels now"):
        compile_ptx("8.0")


ENTRY = ".visible .entry scale_lookup(\n{}\n)\n.reqntid 128\n{{\n{}}}\n"


def _entry(count: int, body: str = "") -> str:
    return ENTRY.format(",\n".join(f"\t.param .u64 p{n}" for n in range(count)), body)


@pytest.mark.parametrize("count", [7, 8, 9])
def test_scratch_is_dropped(count: int) -> None:
    kept = _without_scratch(_entry(count), "scale_lookup", triton)
    assert re.findall(r"p\d", kept) == [f"p{n}" for n in range(7)]


@pytest.mark.parametrize("text", [_entry(6), _entry(9, "ld.param.b64 %rd1, [p8];\n"), "no kernel"])
def test_unexpected_parameters(text: str) -> None:
    with pytest.raises(TdqError, match="other parameters than expected"):
        _without_scratch(text, "scale_lookup", triton)


def test_files(kernels: dict[str, Ptx], tmp_path: Path) -> None:
    files = write_all(tmp_path / "ptx")
    assert sorted(f.name for f in files) == sorted(
        [HEADER, *(f"scale_lookup_sm{c.replace('.', '')}.ptx" for c in CAPABILITIES)]
    )
    header = (tmp_path / "ptx" / HEADER).read_text()
    assert header == cpp_header(list(kernels.values()))
    for capability, ptx in kernels.items():
        number = capability.replace(".", "")
        assert (tmp_path / "ptx" / f"scale_lookup_sm{number}.ptx").read_text() == ptx.text
        assert ptx.text in header
        assert f'{{{number}, kPtx{number}, "scale_lookup", 128, {ptx.shared_bytes}, {BLOCK_COLUMNS}}}' in header


def test_command(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "modelopt_tdq.plugin.compile", "--output", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert [Path(line).parent for line in done.stdout.splitlines()] == [tmp_path] * 5
    assert "warning" not in done.stderr.lower()
    assert (tmp_path / HEADER).is_file()
