"""What models cost deployed: kernels of TensorRT-RTX engines, built and not run, and the time of OpenVINO."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import numpy as np
from record import timed
from torch import nn

import modelopt_tdq as tdq
from modelopt_tdq.lab.example_call import example_call
from modelopt_tdq.runtime.sessions.openvino import OpenVinoSession

__all__ = ["deployed"]

#: Calls of each graph before those that are timed.
_WARM_UP = 5


def deployed(models: dict[str, nn.Module], repetitions: int) -> tuple[dict[str, int], dict[str, float]]:
    """Kernels of the engine, and median milliseconds of OpenVINO with one thread, of models of one architecture.

    The graphs are run in turn.

    Raises:
        RuntimeError: A quantizer is not deployed in low precision.
    """
    kernels, sessions = {}, {}
    inputs = example_call(next(iter(models.values())), samples=1)
    with tempfile.TemporaryDirectory() as folder:
        for kind, model in models.items():
            path = Path(folder) / f"{kind}.onnx"
            report = tdq.export_onnx(model, path, inputs)
            if report.skipped:
                raise RuntimeError(f"not in low precision: {report.skipped}")
            kernels[kind] = tdq.build_engine(path, path.with_suffix(".engine")).kernels
            sessions[kind] = OpenVinoSession(path, num_threads=1)
    times: dict[str, list[float]] = {kind: [] for kind in sessions}
    arrays = [np.asarray(value) for value in inputs.values()]
    for repetition in range(repetitions + _WARM_UP):
        for kind, session in sessions.items():
            feed = dict(zip(session.inputs, arrays, strict=True))
            seconds = timed(lambda s=session, f=feed: s(f))  # type: ignore[misc]
            if repetition >= _WARM_UP:
                times[kind].append(1e3 * seconds)
    return kernels, {kind: statistics.median(values) for kind, values in times.items()}
