"""The columns of the matrix, in the order in which they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.bench.zoo import deployment_stages, model_stages
from modelopt_tdq.lab.bench.zoo.stage import Stage

__all__ = ["STAGES", "chosen_stages"]

STAGES: Mapping[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("full", "full precision", model_stages.full),
        Stage("quantize", "quantized over five times", model_stages.quantize, ("full",)),
        Stage("save", "saved", model_stages.save, ("quantize",)),
        Stage("restore", "restored bit for bit in another process", model_stages.restore, ("save",), fresh=True),
        Stage("temporal", "temporal features from a table", model_stages.temporal, ("quantize",)),
        Stage("export", "exported in both lowerings", deployment_stages.export, ("quantize",)),
        Stage("onnxruntime", "ONNX Runtime", deployment_stages.onnxruntime, ("export",)),
        Stage("openvino", "OpenVINO", deployment_stages.openvino, ("export",)),
        Stage("tensorrt_rtx", "TensorRT-RTX builds it, in low precision", deployment_stages.tensorrt_rtx, ("export",)),
        Stage(
            "temporal_export",
            "exported with its table of temporal features, in ONNX Runtime",
            deployment_stages.temporal_export,
            ("temporal", "export"),
            on_request=True,  # it takes as long as most others together
        ),
    )
}


def chosen_stages(names: Sequence[str]) -> list[Stage]:
    """Those of these names, and those that they need, in order; if there are no names, all but those on request.

    Raises:
        TdqError: There is no such stage.
    """
    wanted = set(names or [stage.name for stage in STAGES.values() if not stage.on_request])
    for name in names:
        if name not in STAGES:
            raise TdqError("stages", name, "no such stage", f"Use some of {', '.join(STAGES)}")
    for stage in reversed(list(STAGES.values())):
        if stage.name in wanted:
            wanted |= set(stage.needs)
    return [stage for stage in STAGES.values() if stage.name in wanted]
