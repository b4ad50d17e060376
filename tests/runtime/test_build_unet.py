"""The bundled UNet in TensorRT-RTX: every quantized layer in low precision, and hardly a kernel more than static."""

from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from support.models import fast_config

import modelopt_tdq as tdq
from modelopt_tdq.export import export_onnx
from modelopt_tdq.lab.model_folder import load_model
from modelopt_tdq.lab.trajectories import load_scheduler, noise, sample, sample_shape
from modelopt_tdq.runtime.build.report import require_low_precision

pytest.importorskip("diffusers")
pytest.importorskip("onnx")
pytest.importorskip("tensorrt_rtx")

MODEL = Path(__file__).parents[2] / "trt_examples" / "ddim_cifar10" / "model"


@pytest.mark.parametrize("bits", [8, (4, 3)], ids=["int8", "fp8"])
def test_kernels_of_the_bundled_unet(tmp_path: Path, bits: Any) -> None:
    reports = {}
    for bins in ("per_step", 1):
        model, scheduler = load_model(MODEL), load_scheduler(MODEL)
        start = noise(2, sample_shape(model), 0)
        config = fast_config(weight_bits=bits, activation_bits=bits, bins=bins)
        mtq.quantize(model, config, lambda m, start=start, scheduler=scheduler: sample(m, scheduler, start, 4))
        assert tdq.scale_table(model).is_static.all() == (bins == 1)
        inputs = {"sample": start, "timestep": torch.tensor(500)}
        exported = export_onnx(model, tmp_path / "unet.onnx", inputs)
        assert not exported.skipped
        report = tdq.build_engine(exported.path, tmp_path / "unet.engine")
        weights = [name for name in exported.quantized if name.endswith("weight_quantizer")]
        assert len(report.quantized) == len(weights) > 40
        require_low_precision(report)
        expected = "Int8" if bits == 8 else "FP8"
        products = [layer for layer in report.layers if layer.low_precision]
        assert {layer.inputs[0] for layer in products} == {expected}
        reports[bins] = report
    assert reports["per_step"].kernels <= 1.05 * reports[1].kernels, {b: r.kernels for b, r in reports.items()}
