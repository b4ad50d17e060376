"""The bundled UNet in TensorRT-RTX: every quantized layer in low precision, and hardly a kernel more than static."""

from pathlib import Path

import modelopt.torch.quantization as mtq
import onnx
import pytest
import torch
from support.denoisers import one_row
from support.export import lowered, trace
from support.models import fast_config

import modelopt_tdq as tdq
from modelopt_tdq.lab.model_folder import load_model
from modelopt_tdq.lab.trajectories import load_scheduler, noise, sample, sample_shape
from modelopt_tdq.runtime.build.report import require_low_precision

pytest.importorskip("diffusers")
pytest.importorskip("tensorrt_rtx")

MODEL = Path(__file__).parents[2] / "trt_examples" / "ddim_cifar10" / "model"


@pytest.mark.slow
def test_kernels_of_the_bundled_unet(tmp_path: Path) -> None:
    """In INT8; convolutions in FP8, and models of a small size: test_build_families."""
    model, scheduler = load_model(MODEL), load_scheduler(MODEL)
    start = noise(2, sample_shape(model), 0)
    mtq.quantize(model, fast_config(), lambda m: sample(m, scheduler, start, 4))
    assert not tdq.scale_table(model).is_static.any()
    traced = trace(model, {"sample": start, "timestep": torch.tensor(500)})
    graphs = {"per step": lowered(traced, "ratio", model)}
    with one_row(model):
        graphs["static"] = lowered(traced, "ratio", model)
    reports = {}
    for name, graph in graphs.items():
        assert graph.context.skipped == {}
        onnx.save(graph.proto, tmp_path / "unet.onnx")
        report = tdq.build_engine(tmp_path / "unet.onnx", tmp_path / "unet.engine")
        assert len(report.quantized) == len(tdq.scale_table(model).names) > 40
        require_low_precision(report)
        products = [layer for layer in report.layers if layer.low_precision]
        assert {layer.inputs[0] for layer in products} == {"Int8"}
        reports[name] = report
    assert reports["per step"].kernels <= 1.05 * reports["static"].kernels, {b: r.kernels for b, r in reports.items()}
