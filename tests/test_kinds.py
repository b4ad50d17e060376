"""The table of kinds of layers: what it says of the presets and backends is what these do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from support.models import fast_config, loop, noise
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.model.kinds import BACKENDS, KINDS, LINEAR, TRANSPOSED_CONVOLUTION, Kind, kind_of, without_kernel


class _Both(nn.Module):
    """One convolution, one transposed, one linear layer, over channels of a sequence [B, C, L]."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(8, 8, 3, padding=1)
        self.upsample = nn.ConvTranspose1d(8, 8, 4, stride=2, padding=1)
        self.linear = nn.Linear(8, 8)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        h = torch.nn.functional.silu(self.convolution(sample * (1 + timestep.reshape(-1, 1, 1) / 100)))
        h = torch.nn.functional.silu(self.upsample(h))
        return self.linear(h.movedim(1, 2)).movedim(1, 2)


DATA = [(noise(1, 8, 16, seed=int(time)), torch.tensor([time])) for time in (20.0, 900.0)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = mtq.quantize(_Both().eval(), fast_config(conv_transpose=True), loop(DATA))
    path = tmp_path_factory.mktemp("kinds") / "m.onnx"
    tdq.export_onnx(model, path, dict(zip(("sample", "timestep"), DATA[0], strict=True)))
    return path


def _said(backend: str) -> dict[str, bool]:
    """Whether each layer of the model runs in INT8, by what the table says."""
    layers = dict(_Both().named_children())
    kinds: dict[str, Kind] = {name: kind for name, layer in layers.items() if (kind := kind_of(layer)) is not None}
    assert len(kinds) == 3
    return {name: kind.runs_in_low_precision(backend, "int8") for name, kind in kinds.items()}


def test_onnxruntime_runs_what_the_table_says(exported: Path, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(exported), options, providers=["CPUExecutionProvider"])
    nodes = {node.name: node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    found = {name: nodes[f"node/{name}/product"] for name in _said("onnxruntime")}
    assert {name: "Integer" in operator for name, operator in found.items()} == _said("onnxruntime")


def test_openvino_runs_what_the_table_says(exported: Path) -> None:
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(str(exported), "CPU", {"INFERENCE_NUM_THREADS": 1})
    infos = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    types = {i["layerType"].astype(str): i["runtimePrecision"].astype(str) for i in infos if "layerType" in i}
    names = {"convolution": "Convolution", "upsample": "Deconvolution", "linear": "FullyConnected"}
    assert {name: types[kind] in ("i8", "u8") for name, kind in names.items()} == _said("openvino")


def test_tensorrt_rtx_runs_what_the_table_says(exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    report = tdq.build_engine(exported, tmp_path / "m.engine", allow_float=True)
    found = {name: report.low_precision(f"node/{name}/product") for name in _said("tensorrt_rtx")}
    assert found == _said("tensorrt_rtx")


def test_the_presets_read_the_table() -> None:
    def parents(**fields: Any) -> set[str]:
        return {rule["parent_class"] for rule in tdq.make_config(**fields)["quant_cfg"] if "parent_class" in rule}

    by_default = {parent for kind in KINDS if kind.by_default for parent in kind.rules}
    assert parents() == by_default == {"nn.Linear", "nn.Conv1d", "nn.Conv2d", "nn.Conv3d"}
    assert parents(conv_transpose=True) - parents() == set(TRANSPOSED_CONVOLUTION.rules)


def test_what_the_presets_leave_out_has_a_reason() -> None:
    assert all(bool(kind.why_not) != kind.by_default for kind in KINDS)
    assert all(set(missing) <= set(BACKENDS) for kind in KINDS for missing in kind.missing.values())


def test_messages_name_engine_builders_only() -> None:
    assert set(without_kernel("ConvTranspose")) == {"tensorrt_rtx", "tensorrt"}
    assert without_kernel("Conv") == without_kernel("MatMul") == without_kernel("Relu") == {}
    assert set(without_kernel("Conv", "fp8")) == {"openvino"}
    assert kind_of(nn.LayerNorm(4)) is None
    assert kind_of(nn.Linear(4, 4)) is LINEAR
