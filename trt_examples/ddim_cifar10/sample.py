#!/usr/bin/env python3
"""Sample with a quantized model, and hold the images against full precision at the same seeds.

python sample.py                                 # ratio.onnx of export.py, in OpenVINO
python sample.py --quantized w4a4 --images 64    # what quantize.py, qat.py or ptq.py saved, in PyTorch
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from modelopt_tdq.core.metrics import psnr_db
from modelopt_tdq.lab.image_metrics.efficientnet import EfficientNetLite0
from modelopt_tdq.lab.image_metrics.report import image_report
from modelopt_tdq.lab.model_folder import load_model
from modelopt_tdq.lab.report.plots import image_grid
from modelopt_tdq.lab.trajectories import load_scheduler, noise, sample, sample_shape
from modelopt_tdq.runtime.sessions.openvino import OpenVinoSession

HERE = Path(__file__).resolve().parent


class Deployed(torch.nn.Module):
    """The exported graph, called like the model."""

    def __init__(self, graph: Path) -> None:
        super().__init__()
        self.session = OpenVinoSession(graph)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor]:
        result = self.session({"sample": x.numpy(), "timestep": t.reshape(1).numpy()})
        return (torch.from_numpy(result[self.session.outputs[0]]),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "model", help="full precision")
    parser.add_argument("--quantized", type=Path, help="a saved model; left out, --graph runs in OpenVINO")
    parser.add_argument("--graph", type=Path, default=Path("ratio.onnx"))
    parser.add_argument("--images", type=int, default=8, help="the graph takes the batch that it was exported with")
    parser.add_argument("--steps", type=int, default=50, help="any: rows are found by time, not by step number")
    parser.add_argument("--seed", type=int, default=1)
    a = parser.parse_args()

    model, scheduler = load_model(a.model), load_scheduler(a.model)
    start = noise(a.images, sample_shape(model), a.seed)
    reference = sample(model, scheduler, start, a.steps).clamp(-1, 1)
    if a.quantized is None:
        label, quantized = "OpenVINO", Deployed(a.graph)
    else:
        import modelopt.torch.opt as mto

        import modelopt_tdq  # noqa: F401 - registers what the saved model needs

        mto.enable_huggingface_checkpointing()
        label, quantized = a.quantized.name, type(model).from_pretrained(a.quantized).eval()
    images = sample(quantized, scheduler, start, a.steps).clamp(-1, 1)
    print(f"{a.images} images, {a.steps} steps: {psnr_db(reference, images):.1f} dB PSNR against full precision")
    if a.quantized is not None:
        print(image_report(reference, images, EfficientNetLite0()).to_json())
    print(image_grid({"FP32": reference[:8], label: images[:8]}, Path("samples.png")))


if __name__ == "__main__":
    main()
