"""``open_session``: a deployed model, whatever runs it, as one kind of object."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from modelopt_tdq.errors import TdqError

__all__ = ["SESSIONS", "Session", "open_session"]


class Session(Protocol):
    """A model that runs: values by input name in, values by output name out.

    Attributes:
        inputs: Data type of each input, by name.
        shapes: Of each input; an open size is a string.
        outputs: Names, in order.
        metadata: What the file says about itself, by key.
    """

    inputs: dict[str, Any]
    shapes: dict[str, tuple[Any, ...]]
    outputs: list[str]

    @property
    def metadata(self) -> Mapping[str, str]:
        """See the class."""

    def __call__(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Run once."""


def _onnxruntime(file: str | os.PathLike[str], **options: Any) -> Session:
    from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession

    return OnnxRuntimeSession(file, **options)


def _openvino(file: str | os.PathLike[str], **options: Any) -> Session:
    from modelopt_tdq.runtime.sessions.openvino import OpenVinoSession

    return OpenVinoSession(file, **options)


def _tensorrt(file: str | os.PathLike[str], **options: Any) -> Session:
    from modelopt_tdq.runtime.sessions.tensorrt import TensorRTSession

    return TensorRTSession(file, backend="tensorrt", **options)


def _tensorrt_rtx(file: str | os.PathLike[str], **options: Any) -> Session:
    from modelopt_tdq.runtime.sessions.tensorrt import TensorRTSession

    return TensorRTSession(file, backend="tensorrt_rtx", **options)


#: How each backend opens a file: ONNX for the first two, an engine with its manifest for the others.
SESSIONS: dict[str, Callable[..., Session]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "tensorrt": _tensorrt,
    "tensorrt_rtx": _tensorrt_rtx,
}


def open_session(file: str | os.PathLike[str], backend: str = "onnxruntime", **options: Any) -> Session:
    """Open an exported model or a built engine.

    Args:
        file: ONNX file for ``onnxruntime`` and ``openvino``; engine for ``tensorrt`` and ``tensorrt_rtx``.
        backend: Key of :data:`SESSIONS`.
        **options: Of the session's class.

    Raises:
        TdqError: There is no such backend or file, or the backend cannot load it.
        MissingExtraError: The backend is not installed.
    """
    if backend not in SESSIONS:
        raise TdqError("backend", backend, "no such session", f"Use one of {', '.join(SESSIONS)}, or pass a session")
    return SESSIONS[backend](file, **options)
