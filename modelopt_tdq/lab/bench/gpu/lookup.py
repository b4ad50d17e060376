"""The lookup kernel on the GPU: as Triton launches it and as the driver compiles its PTX, against NumPy."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelopt_tdq.core.schedule import row_index
from modelopt_tdq.errors import TdqError, require
from modelopt_tdq.lab.bench.gpu.part import Asked, Row
from modelopt_tdq.lab.bench.gpu.timing import median_times
from modelopt_tdq.plugin.compile import Ptx, compile_ptx, target_for
from modelopt_tdq.plugin.kernel import BLOCK_COLUMNS, BLOCK_ROWS, scale_lookup

__all__ = ["run"]

Launch = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


def _case(random: np.random.Generator, rows: int, columns: int, batch: int) -> tuple[Any, Any, Any]:
    """Times [B] at rows, half-way points and the numbers next to them; rows' times [K]; a table [K, Q]."""
    timesteps = np.sort(random.choice(4000, rows, replace=False)).astype(np.float32)
    spread = random.uniform(-20, 20, columns) + random.uniform(0, 4, (rows, columns))
    half = ((timesteps[1:].astype(np.float64) + timesteps[:-1]) / 2).astype(np.float32)
    near = np.concatenate([timesteps, half])
    near = np.concatenate([near, *(np.nextafter(near, np.float32(end)) for end in (np.inf, -np.inf))])
    return random.choice(near, batch).astype(np.float32), timesteps, np.exp2(spread).astype(np.float32)


def _expected(timestep: Any, timesteps: Any, table: Any) -> tuple[Any, Any]:
    """Scales s and ratios s / s_ref, [B, Q] each."""
    half = (timesteps[1:].astype(np.float64) + timesteps[:-1]) / 2
    scale = table[np.searchsorted(half, timestep.astype(np.float64), side="left")]
    return scale, scale / np.ldexp(np.float32(0.5), np.frexp(table.min(0))[1])


def _triton() -> Launch:
    triton = require("triton", "plugin")
    kernel = triton.jit(scale_lookup)

    def launch(timestep: Tensor, table: Tensor, timesteps: Tensor, scale: Tensor, ratio: Tensor) -> None:
        rows, columns = table.shape
        grid = (len(timestep), -(-columns // BLOCK_COLUMNS))
        kernel[grid](timestep, table, timesteps, rows, columns, scale, ratio, BLOCK_ROWS, BLOCK_COLUMNS)

    return launch


def _checked(driver: Any, status: int, doing: str) -> None:
    if status:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{doing}: {(text.value or b'').decode()} ({status})")


def _ptx(compiled: Ptx) -> Launch:
    """The PTX that the TensorRT plugins carry, compiled and launched by the CUDA driver."""
    driver = ctypes.CDLL("libcuda.so.1")
    torch.zeros(1, device="cuda")  # torch makes the context that the module is loaded into
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    text = ctypes.create_string_buffer(compiled.text.encode())
    _checked(driver, driver.cuModuleLoadData(ctypes.byref(module), text), "the driver compiles the PTX")
    entry = compiled.entry.encode()
    _checked(driver, driver.cuModuleGetFunction(ctypes.byref(function), module, entry), "the kernel is found")

    def launch(timestep: Tensor, table: Tensor, timesteps: Tensor, scale: Tensor, ratio: Tensor) -> None:
        rows, columns = table.shape
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (timestep, table, timesteps)]
        values = [*pointers, ctypes.c_int32(rows), ctypes.c_int32(columns)]
        values += [ctypes.c_void_p(tensor.data_ptr()) for tensor in (scale, ratio)]
        arguments = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        grid = (len(timestep), -(-columns // compiled.block_columns), 1)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        status = driver.cuLaunchKernel(
            function, *grid, compiled.threads, 1, 1, compiled.shared_bytes, stream, arguments, None
        )
        _checked(driver, status, "the kernel is launched")

    return launch


def _differences(launch: Launch, device: str, sizes: tuple[tuple[int, int, int], ...]) -> tuple[int, int]:
    """Numbers that differ from NumPy's, and numbers that were compared."""
    random = np.random.default_rng(0)
    wrong = compared = 0
    for rows, columns, batch in sizes:
        timestep, timesteps, table = _case(random, rows, columns, batch)
        t, table_there, times_there = (torch.from_numpy(a).to(device) for a in (timestep, table, timesteps))
        scale = torch.full((batch, columns), float("nan"), device=device)
        ratio = torch.full_like(scale, float("nan"))
        launch(t, table_there, times_there, scale, ratio)
        for found, wanted in zip((scale, ratio), _expected(timestep, timesteps, table), strict=True):
            wrong += int((found.cpu().numpy() != wanted).sum())
            compared += wanted.size
    return wrong, compared


def _times(launch: Launch, columns: int, repeats: int) -> dict[str, float]:
    """Seconds of the lookup for 20 times, of the same in torch, and of a copy of as many bytes."""
    timestep, timesteps, table = _case(np.random.default_rng(1), 20, columns, 1)
    t, table_there, times_there = (torch.from_numpy(a).cuda() for a in (timestep, table, timesteps))
    scale, ratio = torch.empty(1, columns, device="cuda"), torch.empty(1, columns, device="cuda")
    copied = torch.empty_like(table_there[:2])
    calls: dict[str, Callable[[], object]] = {
        "kernel": lambda: launch(t, table_there, times_there, scale, ratio),
        "torch": lambda: table_there[row_index(t, times_there)],
        "copy": lambda: copied.copy_(table_there[:2]),
    }
    return median_times(calls, repeats=repeats)


def run(asked: Asked) -> list[Row]:
    """Differences of each form of the kernel, then the time of one launch for as many quantizers as models have.

    Raises:
        TdqError: Triton is missing.
    """
    if asked.rehearse:  # Triton interprets the kernel
        wrong, compared = _differences(_triton(), "cpu", ((2, 70, 2), (40, 70, 3)))
        return [{"form": "Triton, interpreted", "compared": compared, "different": wrong}]
    sizes = ((2, 1500, 64), (20, 3000, 64), (50, 1500, 64), (1000, 1500, 64))
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    target = target_for(capability)
    launches = {"Triton": _triton(), f"PTX of {target} through the driver": _ptx(compile_ptx(target))}
    rows: list[Row] = []
    for name, launch in launches.items():
        wrong, compared = _differences(launch, "cuda", sizes)
        rows.append({"form": name, "compared": compared, "different": wrong})
        asked.keep(rows)
    if any(row["different"] for row in rows):
        raise TdqError("kernel", capability, "it differs from NumPy", "Report it with the rows above")
    for columns in (50, 256, 1000):
        times = _times(launches["Triton"], columns, 50)
        micro = {f"{name} us": round(value * 1e6, 2) for name, value in times.items()}
        rows.append({"form": f"one launch, {columns} quantizers, 20 rows", **micro})
        asked.keep(rows)
    return rows
