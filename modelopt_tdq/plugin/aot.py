"""The Python ahead-of-time form of the plugin: TensorRT embeds the kernel's PTX in the engine.

    import modelopt_tdq.plugin
    modelopt_tdq.plugin.register()  # before the ONNX file is parsed

Python is needed to build the engine, not to run it. The engine's data are inputs of the plugin, since attributes are
not kept with an ahead-of-time kernel.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import GenericAlias
from typing import Any

from modelopt_tdq.errors import MissingExtraError, TdqError, require

__all__ = ["NAME", "NAMESPACE", "VERSION", "register"]

#: How TensorRT's registry, and an ONNX node, name the plugin. TensorRT gives every Python plugin version "1".
NAMESPACE, NAME, VERSION = "tdq", "TdqScaleLookup", "1"

_OLDEST = (10, 13)

_INPUTS = ("timestep", "table", "timesteps")
_RANKS = (1, 2, 1)


def register() -> None:
    """Register ``tdq::TdqScaleLookup`` with TensorRT's plugin registry; a second call does nothing.

    Inputs timestep [B], table [K, Q] and timesteps [K], strictly ascending; outputs s [B, Q] and s / s_ref [B, Q];
    float32, linear. B, K and Q may be dynamic. :func:`modelopt_tdq.plugin.kernel.scale_lookup` has the arithmetic.

    The engine takes the PTX of the oldest target, which every later GPU runs too: an engine that is built hardware
    compatible stays so, and the kernel has nothing to gain from newer instructions.

    Raises:
        TdqError: TensorRT is older than 10.13.
        MissingExtraError: TensorRT (extra ``tensorrt``) or Triton (extra ``plugin``) is not installed.
    """
    trt, trtp = _tensorrt()
    require("triton", "plugin")
    # the C++ library may have registered it: the same kernel, under the same name
    if trt.get_plugin_registry().get_creator(NAME, VERSION, NAMESPACE) is not None:
        return
    plugin_id = f"{NAMESPACE}::{NAME}"
    desc, several = trtp.TensorDesc, GenericAlias(tuple, (trtp.TensorDesc, trtp.TensorDesc))
    kernel = GenericAlias(tuple, (str, str, trtp.KernelLaunchParams, trtp.SymExprs))
    inputs = dict.fromkeys(_INPUTS, desc)
    trtp.register(plugin_id)(_typed(_describe(trt, trtp), **inputs, **{"return": several}))
    combinations = GenericAlias(list, (trtp.AutoTuneCombination,))
    trtp.autotune(plugin_id)(_typed(_formats(trtp), **inputs, outputs=several, **{"return": combinations}))
    trtp.aot_impl(plugin_id)(_typed(_launch(trtp), **inputs, outputs=several, tactic=int, **{"return": kernel}))


def _tensorrt() -> tuple[Any, Any]:
    """TensorRT, and its module of Python plugins."""
    trt = require("tensorrt", "tensorrt")
    version = tuple(int(part) for part in re.findall(r"\d+", trt.__version__)[:2])
    if version < _OLDEST:
        raise TdqError(
            "tensorrt",
            trt.__version__,
            "ahead-of-time plugins in Python, whose kernel is part of the engine, are supported from 10.13 on",
            "Install tensorrt>=10.13, or export with lowering='ratio', which needs no plugin",
        )
    try:
        return trt, require("tensorrt.plugin", "tensorrt")
    except MissingExtraError as error:
        raise TdqError(
            "tensorrt",
            trt.__version__,
            f"it comes without its module of Python plugins ({error.__cause__})",
            "Install the full package tensorrt, not one of its lean or dispatch variants",
        ) from error


def _typed(function: Callable[..., Any], **annotations: Any) -> Callable[..., Any]:
    """TensorRT reads the types of the arguments, which only it knows."""
    function.__annotations__ = annotations
    return function


def _describe(trt: Any, trtp: Any) -> Callable[..., Any]:
    def describe(timestep: Any, table: Any, timesteps: Any) -> Any:
        _check(trt, timestep, table, timesteps)
        shape = timestep.shape_expr[0], table.shape_expr[1]
        return tuple(trtp.from_shape_expr(shape, dtype=trt.float32) for _ in range(2))

    return describe


def _check(trt: Any, *inputs: Any) -> None:
    for name, desc, rank in zip(_INPUTS, inputs, _RANKS, strict=True):
        if desc.dtype != trt.float32:
            raise TdqError(name, str(desc.dtype), f"{NAME} takes float32", "Cast it in front of the plugin")
        if desc.ndim != rank:
            raise TdqError(
                name,
                f"{desc.ndim} dimensions",
                f"{NAME} takes timestep [B], table [K, Q] and timesteps [K]",
                "Use the node that export_onnx writes with lowering='plugin'",
            )
    rows = [desc.shape_expr[0] for desc in inputs[1:]]
    # there are no sizes yet when TensorRT asks for the types alone, and none at all where they are dynamic
    known = [size.constant_value() for size in rows if not size.is_fake and size.is_constant]
    if len(set(known)) > 1:
        raise TdqError(
            "timesteps",
            known[1],
            f"the table has {known[0]} rows",
            "Pass one time per row: timesteps [K], table [K, Q]",
        )


def _formats(trtp: Any) -> Callable[..., Any]:
    def formats(timestep: Any, table: Any, timesteps: Any, outputs: Any) -> Any:
        return [trtp.AutoTuneCombination(", ".join(["FP32"] * 5), "LINEAR")]

    return formats


def _launch(trtp: Any) -> Callable[..., Any]:
    def launch(timestep: Any, table: Any, timesteps: Any, outputs: Any, tactic: int) -> Any:
        # here, so that `python -m modelopt_tdq.plugin.compile` is not imported by its own package first
        from modelopt_tdq.plugin.compile import CAPABILITIES, compile_ptx

        ptx = compile_ptx(CAPABILITIES[0])
        rows, columns = table.shape_expr
        grid = trtp.KernelLaunchParams(
            grid_x=timestep.shape_expr[0],
            grid_y=trtp.cdiv(columns, ptx.block_columns),
            block_x=ptx.threads,
            shared_mem=ptx.shared_bytes,
        )
        sizes = trtp.SymIntExprs(2)  # passed between the inputs and the outputs
        sizes[0], sizes[1] = trtp.SymInt32(rows), trtp.SymInt32(columns)
        return ptx.entry, ptx.text, grid, sizes

    return launch
