"""NVIDIA's Python plugin package without TensorRT: over TensorRT-RTX, whose bindings have nearly all that it needs.

The wheel ``tensorrt-cu13-bindings`` holds the package ``tensorrt.plugin``, in Python. Under that name, with a module
``tensorrt`` of TensorRT-RTX's classes and what is missing there, NVIDIA's own code validates, registers and calls our
functions. Dimensions are symbols with a value, so that shape and launch expressions can be evaluated.
"""

from __future__ import annotations

import enum
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Dimension:
    """A size: what it is at run time, and whether it is known when the engine is built."""

    def __init__(self, value: int, constant: bool) -> None:
        self.value, self._constant = value, constant

    def is_constant(self) -> bool:
        return self._constant

    def get_constant_value(self) -> int:
        return self.value


class Builder:
    """Makes expressions, as TensorRT's IExprBuilder does."""

    def constant(self, value: int) -> Dimension:
        return Dimension(value, True)

    def operation(self, operation: Any, first: Dimension, second: Dimension) -> Dimension:
        results = {"CEIL_DIV": -(-first.value // second.value), "SUM": first.value + second.value}
        return Dimension(results[operation.name], first.is_constant() and second.is_constant())


class QuickPluginCreationRequest(enum.Enum):
    UNKNOWN = 0
    PREFER_JIT = 1
    PREFER_AOT = 2
    STRICT_JIT = 3
    STRICT_AOT = 4


class ISymExpr:
    pass


class IPluginV3QuickAOTBuild:
    pass


def _plugin_package(parent: Any) -> types.ModuleType:
    bindings = importlib.util.find_spec("tensorrt_bindings")
    folder = Path(str(bindings.origin)).parent / "plugin"  # type: ignore[union-attr]
    spec = importlib.util.spec_from_file_location(
        "tensorrt.plugin", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules["tensorrt.plugin"] = parent.plugin = module
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


@contextmanager
def stand_in(version: str = "11.4.0") -> Iterator[Any]:
    """``tensorrt``, as long as the context lasts; what was registered is gone afterwards."""
    import tensorrt_rtx

    trt: Any = types.ModuleType("tensorrt")
    trt.__dict__.update({k: v for k, v in vars(tensorrt_rtx).items() if not k.startswith("__")})
    trt.__version__ = version
    trt.__path__ = []
    trt.IDimensionExpr, trt.DimsExprs = Dimension, lambda length: [None] * length
    for missing in (QuickPluginCreationRequest, ISymExpr, IPluginV3QuickAOTBuild):
        setattr(trt, missing.__name__, missing)
    registry = trt.get_plugin_registry()
    before = {id(creator) for creator in registry.all_creators}
    sys.modules["tensorrt"] = trt
    try:
        _plugin_package(trt)
        yield trt
    finally:
        for creator in registry.all_creators:
            if id(creator) not in before and creator.name == "TdqScaleLookup":
                registry.deregister_creator(creator)
        for name in [n for n in sys.modules if n == "tensorrt" or n.startswith("tensorrt.")]:
            del sys.modules[name]
