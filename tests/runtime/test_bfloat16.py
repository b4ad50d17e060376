"""bfloat16, which NumPy does not have: tensors go into sessions and come out as the numbers that they are."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import modelopt.torch.quantization as mtq
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.runtime.sessions.feeds import as_feeds


def _doubling(path: Path) -> Path:
    x, y = (helper.make_tensor_value_info(name, TensorProto.BFLOAT16, [3]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "graph", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


@pytest.mark.parametrize("make", [torch.tensor, lambda values: torch.tensor(values, dtype=torch.bfloat16), np.array])
def test_openvino_computes_with_the_numbers(tmp_path: Path, make: object) -> None:
    session = tdq.OpenVinoSession(_doubling(tmp_path / "m.onnx"), num_threads=1)
    assert session.inputs["x"] == ml_dtypes.bfloat16
    values = [1.5, 2.0**40, -2.25]  # read as float16, they would be 2.1, inf and -2.3
    assert session({"x": make(values)})["y"].tolist() == [3.0, 2.0**41, -4.5]  # type: ignore[operator]


def test_tensors_of_every_type_can_be_fed() -> None:
    x = torch.tensor([1.0, -3.0], dtype=torch.bfloat16)
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        found = as_feeds({"x": x}, {"x": np.dtype(dtype)})["x"]
        assert found.dtype == dtype
        assert found.astype(np.float32).tolist() == [1.0, -3.0]
    with pytest.raises(tdq.TdqError, match="cannot hold"):
        as_feeds({"x": torch.tensor([1.5], dtype=torch.bfloat16)}, {"x": np.dtype(np.int64)})


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        hidden = nn.functional.silu(self.first(sample * (0.1 + timestep.reshape(-1, 1) / 1000).to(sample)))
        return self.second(hidden)


@torch.no_grad()
def test_a_model_in_bfloat16_runs_in_openvino(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Mlp().eval().bfloat16()
    exact = Mlp().eval()
    exact.load_state_dict({name: value.float() for name, value in base.state_dict().items()})
    data = [(torch.randn(4, 16).bfloat16(), torch.tensor([time])) for time in (10.0, 300.0, 900.0)]
    model = mtq.quantize(base, tdq.make_config(high_precision=(), progress=False), lambda m: [m(x, t) for x, t in data])
    x, time = data[1]
    tdq.export_onnx(model, tmp_path / "m.onnx", {"sample": x, "timestep": time})
    found = tdq.OpenVinoSession(tmp_path / "m.onnx", num_threads=1)({"sample": x, "timestep": time})["output"]
    reference = exact(x.float(), time)
    noise = (model(x, time).float() - reference).square().sum()
    assert float((torch.from_numpy(found) - reference).square().sum()) < 1.5 * float(noise)
