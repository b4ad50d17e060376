"""``swap_denoiser``: let a pipeline run on an engine instead of its torch denoiser; ``restore_denoiser``: and back."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from modelopt_tdq.errors import TdqError
from modelopt_tdq.export.table_input import EDGES_INPUT, TABLE_INPUT, engine_table
from modelopt_tdq.model.model_table import scale_table, temporal_quantizers
from modelopt_tdq.pipeline.by_time import SIDES, EnginesByTime, require_boundary
from modelopt_tdq.pipeline.component import denoiser, denoiser_name, put_denoiser
from modelopt_tdq.pipeline.engine_denoiser import EngineDenoiser
from modelopt_tdq.runtime.build.options import BUILDERS
from modelopt_tdq.runtime.sessions.forward_names import by_forward_names
from modelopt_tdq.runtime.sessions.open_session import open_session

__all__ = ["restore_denoiser", "swap_denoiser"]


def swap_denoiser(
    pipeline: Any,
    engine: str | os.PathLike[str] | Mapping[str, Any] | Any,
    *,
    component: str | None = None,
    timestep: str = "timestep",
    backend: str = "onnxruntime",
    table: Mapping[str, Any] | None = None,
    boundary: float | None = None,
    free: bool = False,
    **options: Any,
) -> Any:
    """Put a session where the denoiser of a pipeline was, so that ``pipeline(prompt)`` runs on it.

    From then on, what would change the torch denoiser (``load_lora_weights``, ``enable_freeu``, ...) is refused, since
    it would not change the engine; :func:`restore_denoiser` puts the torch denoiser back.

    Args:
        pipeline: From diffusers.
        engine: A session; or an ONNX file, or an engine with its manifest, for ``backend``. For CUDA graphs, pass a
            :class:`~modelopt_tdq.runtime.sessions.tensorrt.TensorRTSession`. Or two of these by the names ``high``, for
            the times at or above ``boundary``, and ``low``; None in a place leaves these times to the torch denoiser.
        component: Name of the denoiser, where several components take a time, or of a module inside a component.
        timestep: The argument of its forward that holds the time.
        backend: ``onnxruntime`` or ``openvino`` for an ONNX file, ``tensorrt`` or ``tensorrt_rtx`` for an engine.
        table: For a file exported with ``table_input=True``: what :func:`~modelopt_tdq.engine_table` gives.
            Left out with an ONNX file, it is that of the pipeline's own denoiser.
        boundary: With two engines: the least time of ``high``, in the model's own units (what its forward is given).
            :func:`~modelopt_tdq.time_boundary` finds one from a comparison.
        free: Drop the weights of the torch denoiser; what the pipeline asks it for is kept.
        **options: Of the session's class, where ``engine`` is a file: ``providers=["tensorrt_rtx"]`` of ONNX Runtime.

    Returns:
        ``pipeline``.

    Raises:
        TdqError: There is no denoiser, no such file, or the session does not take what the denoiser takes; two engines
            and no boundary, or one outside of the schedule.
    """
    name = denoiser_name(pipeline, component, timestep)
    original = denoiser(pipeline, name)
    if isinstance(original, EngineDenoiser):
        original = original.original

    def swapped_in(one: Any) -> EngineDenoiser:
        return _swapped(one, original, timestep, backend, table, options)

    if isinstance(engine, Mapping):
        swapped: EngineDenoiser = _by_time(engine, original, timestep, swapped_in, boundary, free)
    elif boundary is not None:
        raise TdqError("boundary", boundary, "there is one engine", 'Pass two: {"high": engine, "low": other}')
    else:
        swapped = swapped_in(engine)
    if free:
        original.to("meta")
    put_denoiser(pipeline, name, swapped)
    return pipeline


def restore_denoiser(pipeline: Any, *, component: str | None = None, timestep: str = "timestep") -> Any:
    """Put the torch denoiser back where :func:`swap_denoiser` put a session.

    Args:
        pipeline: From diffusers.
        component: Name of the denoiser, where several components take a time, or of a module inside a component.
        timestep: The argument of its forward that holds the time.

    Returns:
        ``pipeline``.

    Raises:
        TdqError: There is no denoiser, no session in its place, or its weights were dropped (``free=True``).
    """
    name = denoiser_name(pipeline, component, timestep)
    swapped = denoiser(pipeline, name)
    if not isinstance(swapped, EngineDenoiser):
        raise TdqError("component", name, "it is the torch denoiser", "Nothing is to be done")
    if any(parameter.is_meta for parameter in swapped.original.parameters()):
        place = re.sub(r"\.(\d+)", r"[\1]", name)
        raise TdqError(
            "component",
            name,
            "the weights of the torch denoiser were dropped, by swap_denoiser(free=True)",
            f"Load it again, and set it: pipeline.{place} = model",
        )
    put_denoiser(pipeline, name, swapped.original)
    return pipeline


def _swapped(
    engine: Any,
    original: nn.Module,
    timestep: str,
    backend: str,
    table: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> EngineDenoiser:
    """One engine in the place of ``original``."""
    is_file = isinstance(engine, (str, os.PathLike))
    if options and not is_file:
        raise TdqError(
            "engine", type(engine).__name__, f"it is open already, without {', '.join(options)}", "Pass a file"
        )
    session = _session(engine, backend, table, options) if is_file else engine
    if table is not None and hasattr(session, "set_table"):  # it holds its table itself, on its device
        if not is_file:
            session.set_table(table)
        table = None
    parameters = inspect.signature(original.forward).parameters
    unknown = [i for i in by_forward_names(session).inputs if i.partition(".")[0] not in parameters]
    if set(unknown) == {TABLE_INPUT, EDGES_INPUT}:
        table = _table(engine, original) if table is None else table
        unknown = [i for i in unknown if i not in table]
    if unknown:
        raise TdqError(
            "engine", unknown, f"{type(original).__name__} has no such arguments", "Use an engine of this denoiser"
        )
    return EngineDenoiser(session, original, timestep, table)


def _by_time(
    engines: Mapping[str, Any],
    original: nn.Module,
    timestep: str,
    swapped_in: Callable[[Any], EngineDenoiser],
    boundary: float | None,
    free: bool,
) -> EnginesByTime:
    """Two engines in the place of ``original``."""
    if set(engines) != set(SIDES):
        raise TdqError(
            "engine", sorted(map(str, engines)), "not two engines by name", f"Name them {' and '.join(SIDES)}"
        )
    if all(engine is None for engine in engines.values()):
        raise TdqError("engine", None, "there is no engine", "Pass one for high, low, or both")
    if free and any(engine is None for engine in engines.values()):
        raise TdqError("free", free, "the torch denoiser computes one of the sides", "Leave free out")
    known = scale_table(original).timesteps.tolist() if temporal_quantizers(original) else []
    least = require_boundary(boundary, known)
    sides = {side: original if engine is None else swapped_in(engine) for side, engine in engines.items()}
    return EnginesByTime(sides, least, original, timestep)


def _table(engine: Any, original: nn.Module) -> Mapping[str, Any]:
    """The inputs that hold the table of the quantized torch denoiser."""
    if isinstance(engine, (str, os.PathLike)) and Path(engine).suffix == ".onnx":
        return engine_table(engine, original)
    raise TdqError(
        "table",
        None,
        "the engine takes its table as an input",
        "Pass table=modelopt_tdq.engine_table('model.onnx', table), of the ONNX file it was built from",
    )


def _session(
    file: str | os.PathLike[str], backend: str, table: Mapping[str, Any] | None, options: Mapping[str, Any]
) -> Any:
    # an engine holds its table itself, on its device
    table_too = {"table": table} if backend in BUILDERS else {}
    return open_session(file, backend, **table_too, **options)
