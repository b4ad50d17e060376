"""Sizes of images that an export leaves open: the same codes at other sizes, one engine for a range of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import onnx
import pytest
import torch
from support.export import LOWERINGS, Lowered, codes_by_definition, lowered
from support.models import FAMILIES, fast_config, noise
from torch import nn

import modelopt_tdq as tdq
from modelopt_tdq.export.onnx_export import marker_graph
from modelopt_tdq.runtime.build.report import require_low_precision
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession

pytest.importorskip("diffusers")

UNET = FAMILIES["unet"]
AXES = {"sample": {2: "height", -1: "width"}}


def inputs(height: int = 8, width: int = 8, batch: int = 2) -> dict[str, Any]:
    return {"sample": noise(batch, 3, height, width, seed=height), "timestep": torch.tensor(600.0)}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return mtq.quantize(UNET.make().eval(), fast_config(), UNET.forward_loop())


@pytest.fixture(scope="module")
def lowerings(model: nn.Module) -> dict[str, Lowered]:
    graph = marker_graph(model, inputs(), dynamic_batch=True, dynamic_axes=AXES)
    return {name: lowered(graph, name) for name in LOWERINGS}


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("size", [(8, 8), (16, 8), (8, 24)])
def test_codes_at_other_sizes(
    model: nn.Module, lowerings: dict[str, Lowered], lowering: str, size: tuple[int, int]
) -> None:
    made = lowerings[lowering]
    compared, wrong = codes_by_definition(made, model, inputs(*size, batch=3), 600.0)
    assert compared > 3 * 8 * size[0] * size[1]
    assert wrong == 0
    found = OnnxRuntimeSession(made.proto)(inputs(*size, batch=3))["output"]
    with torch.no_grad():
        expected = model(**inputs(*size, batch=3)).sample
    noise_power = (expected - full(model, size)).square().mean()
    assert (torch.from_numpy(found) - expected).square().mean() < 0.1 * noise_power


@torch.no_grad()
def full(model: nn.Module, size: tuple[int, int]) -> torch.Tensor:
    from modelopt_tdq.model.full_precision import full_precision

    with full_precision(model):
        return model(**inputs(*size, batch=3)).sample  # type: ignore[no-any-return]


@pytest.mark.slow
def test_names_and_ranges_in_the_engine(model: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    path = tdq.export_onnx(model, tmp_path / "m.onnx", inputs(), dynamic_axes=AXES).path
    (sample, _) = onnx.load(path).graph.input
    assert [d.dim_param or d.dim_value for d in sample.type.tensor_type.shape.dim] == [2, 3, "height", "width"]
    ranges = {"height": (8, 16, 32), "width": (8, 8, 32)}
    report = tdq.build_engine(path, tmp_path / "m.engine", dynamic_sizes=ranges, compute_capabilities=("8.9",))
    require_low_precision(report)
    with pytest.raises(tdq.TdqError, match="leaves its dimension 'height' open"):
        tdq.build_engine(path, tmp_path / "other.engine")


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"image": {2: "height"}}, "no such input"),
        ({"sample": {4: "height"}}, "Name one of its axes"),
        ({"sample": {2: "the height"}}, "not a name"),
        ({"timestep": {0: "times"}}, "Name one of its axes"),
    ],
)
def test_axes_that_cannot_be_opened(model: nn.Module, axes: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(tdq.TdqError, match=words) as error:
        tdq.export_onnx(model, tmp_path / "m.onnx", inputs(), dynamic_axes=axes)
    assert error.value.field == "dynamic_axes"
    assert not list(tmp_path.iterdir())


def test_a_size_of_one_and_a_model_that_fixes_its_size(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(tdq.TdqError, match="an export cannot tell that from 'any'"):
        tdq.export_onnx(model, tmp_path / "m.onnx", inputs(batch=1), dynamic_axes={"sample": {0: "n"}})
    with pytest.raises(tdq.TdqError, match="cannot be exported with it") as error:
        tdq.export_onnx(model, tmp_path / "m.onnx", inputs(), dynamic_axes={"sample": {1: "channels"}})
    assert error.value.field == "dynamic_axes"
