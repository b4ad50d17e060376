"""Values between NumPy and torch, in the types of engines."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import modelopt_tdq as tdq
from modelopt_tdq.runtime.sessions.tensor_types import host_array, host_tensor, numpy_dtype, torch_dtype


@pytest.mark.parametrize("name", ["FLOAT", "HALF", "BF16", "INT32", "INT64", "INT8", "UINT8", "BOOL"])
def test_there_and_back(name: str) -> None:
    if name == "BF16":
        pytest.importorskip("ml_dtypes")
    dtype = torch_dtype("x", SimpleNamespace(name=name))
    values = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    array = np.asarray([[0, 1], [1, 0]]).astype(numpy_dtype(dtype))
    assert torch.equal(host_tensor(array).to(dtype), values)
    found = host_array(values)
    assert found.dtype == (np.float32 if name == "BF16" else array.dtype)
    np.testing.assert_array_equal(found, array.astype(found.dtype))
    values.zero_()
    assert found[0, 1] == 1  # a copy


def test_types_that_buffers_do_not_have() -> None:
    with pytest.raises(tdq.TdqError, match=r"x.*its type is FP4. Export with one of FLOAT"):
        torch_dtype("x", SimpleNamespace(name="FP4"))
