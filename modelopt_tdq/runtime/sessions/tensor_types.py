"""TensorRT's data types in torch and NumPy, and values between them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelopt_tdq.errors import TdqError, require

__all__ = ["host_array", "host_tensor", "numpy_dtype", "torch_dtype"]

_TORCH = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
}


def torch_dtype(tensor: str, kind: Any) -> torch.dtype:
    """The dtype of buffers for a tensor of the engine.

    Args:
        tensor: Its name.
        kind: Of TensorRT's DataType.

    Raises:
        TdqError: Inputs and outputs of this type are not supported.
    """
    if kind.name not in _TORCH:
        raise TdqError("engine", tensor, f"its type is {kind.name}", f"Export with one of {', '.join(_TORCH)}")
    return _TORCH[kind.name]


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """The same type in NumPy, whose bfloat16 is that of ml_dtypes."""
    name = str(dtype).removeprefix("torch.")
    return np.dtype(require("ml_dtypes", "onnx").bfloat16 if name == "bfloat16" else name)


def host_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """The same values on the host; torch does not know NumPy's bfloat16."""
    return torch.from_numpy(array.astype(np.float32) if array.dtype.name == "bfloat16" else array)


def host_array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A copy on the host; bfloat16, which NumPy itself does not have, as float32."""
    dtype = torch.float32 if tensor.dtype == torch.bfloat16 else tensor.dtype
    array: np.ndarray[Any, Any] = tensor.to("cpu", dtype, copy=True).numpy()
    return array
