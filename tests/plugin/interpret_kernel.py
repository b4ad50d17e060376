"""Runs the lookup kernel under Triton's interpreter, on cases from a file: started with TRITON_INTERPRET=1.

The variable has to be there when Triton is imported, hence a process of its own. The kernel's file is loaded by its
path, without the package: nothing else of it is needed.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import numpy as np
import torch
import triton


def _kernel(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("kernel", path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def main(kernel_file: str, cases_file: str, results_file: str) -> None:
    module = _kernel(kernel_file)
    kernel = triton.jit(module.scale_lookup)
    cases, results = np.load(cases_file), {}
    for case in sorted({name.partition("/")[0] for name in cases.files}):
        names = ("timestep", "table", "timesteps", "blocks")
        timestep, table, timesteps, blocks = (cases[f"{case}/{name}"] for name in names)
        own = (module.BLOCK_ROWS, module.BLOCK_COLUMNS)
        block_rows, block_columns = (int(n) for n in blocks) if blocks.any() else own
        batch, (rows, columns) = len(timestep), table.shape
        # more than [B, Q]: what the kernel writes past its end shows
        outputs = [torch.full([batch * columns + block_columns], torch.nan) for _ in range(2)]
        inputs = [torch.from_numpy(array) for array in (timestep, table, timesteps)]
        grid = (batch, -(-columns // block_columns))
        kernel[grid](*inputs, rows, columns, *outputs, block_rows, block_columns)
        for name, output in zip(("scale", "ratio"), outputs, strict=True):
            results[f"{case}/{name}"] = output[: batch * columns].numpy().reshape(batch, columns)
            results[f"{case}/{name}_past_end"] = output[batch * columns :].numpy()
    np.savez(results_file, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
