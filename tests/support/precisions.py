"""Which of OpenVINO's kernels compute with integers."""

from __future__ import annotations

from modelopt_tdq.runtime.sessions.openvino import OpenVinoSession


def integer_kernels(session: OpenVinoSession) -> list[str]:
    """Operator and type of each node. Processors that multiply unsigned with signed bytes (AVX-512 VNNI, as opposed to
    AMX) run the same kernels on shifted codes, which OpenVINO calls u8: i8 here."""
    return [kernel.replace(" u8", " i8") for kernel in session.executed_precisions().values()]
