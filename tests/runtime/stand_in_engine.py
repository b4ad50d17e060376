"""TensorRT's run-time side without a GPU: classes and calls of its bindings, computing with ONNX Runtime on the CPU.

An "engine" is an ONNX file. Everything else is as strict as TensorRT is: memory is reached by the addresses that it is
given, with the shapes that it is given, when it is told to execute. What the classes here have, the real ones have:
`test_bindings.py` checks that, and code that is run on them can use nothing else.
"""

from __future__ import annotations

import copy
import ctypes
import enum
import types
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from modelopt_tdq.export.table_input import ROWS
from modelopt_tdq.runtime.build.onnx_model import PluginNode, read_onnx
from modelopt_tdq.runtime.build.report import EngineReport, sha256
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession


class DataType(enum.Enum):
    FLOAT = "float32"
    HALF = "float16"
    BF16 = "bfloat16"
    INT64 = "int64"


class TensorIOMode(enum.Enum):
    INPUT = 0
    OUTPUT = 1


class TensorLocation(enum.Enum):
    DEVICE = 0
    HOST = 1


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC = 0
    USER_MANAGED = 2


class CudaGraphStrategy(enum.Enum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class EngineValidity(enum.Enum):
    VALID = 0
    INVALID = 2


class EngineInvalidityDiagnostics(enum.IntEnum):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2


class ILogger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3

    def __init__(self) -> None:
        pass

    def log(self, severity: Any, message: str) -> None:
        raise NotImplementedError


class IPluginRegistry:
    def __init__(self, module: Any) -> None:
        self._module = module

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return (name, version, namespace) if (name, version, namespace) in self._module.stage.plugins else None

    def load_library(self, path: str) -> Any:
        return object()


class IRuntimeCache:
    def __init__(self) -> None:
        self._content = b""

    def deserialize(self, blob: bytes) -> bool:
        taken = blob.startswith(b"kernels of this GPU")
        self._content = blob if taken else b""
        return taken

    def serialize(self) -> bytes:
        return self._content or b"kernels of this GPU"


class IRuntimeConfig:
    def __init__(self) -> None:
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self._cache: Any = None

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache = cache
        return True


@dataclass
class Memory:
    """What an address stands for in one launch."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def array(self) -> np.ndarray[Any, Any]:
        size = int(np.prod(self.shape)) * self.dtype.itemsize
        raw = (ctypes.c_char * size).from_address(self.address)
        return np.frombuffer(raw, dtype=self.dtype).reshape(self.shape)


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, config: Any) -> None:
        self._engine, self._config = engine, config
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory: int | None = None
        self._state = 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._state += 1
        if len(shape) != len(self._engine._tensors[name][1]):
            return False
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._state += 1
        self._addresses[name] = int(memory)
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= self._engine.device_memory_size_v2
        self._memory = memory

    def infer_shapes(self) -> list[str]:
        return sorted(set(self._engine._inputs) - set(self._shapes))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        batch = next(shape[0] for each, shape in self._shapes.items() if shape and not each.startswith("tdq_"))
        return tuple(batch if size < 0 else size for size in self._engine._tensors[name][1])

    def execute_async_v3(self, stream_handle: int) -> bool:
        stage = self._engine._module.stage
        stage.calls.append("execute")
        if stage.fails:
            self._engine._logger.log(ILogger.Severity.ERROR, stage.fails)
            return False
        if self._config is ExecutionContextAllocationStrategy.USER_MANAGED:
            assert self._memory, "no device memory was set"
        memory = {
            name: Memory(self._addresses[name], self.get_tensor_shape(name), np.dtype(dtype))
            for name, (dtype, _, _) in self._engine._tensors.items()
        }

        def compute(state: int | None = None) -> None:
            assert state in (None, self._state), "the context has changed since the graph was captured"
            feeds = {name: memory[name].array() for name in self._engine._inputs}
            feeds = {name: _without_bfloat16(value) for name, value in feeds.items()}
            for name, result in self._engine._session(feeds).items():
                memory[name].array()[...] = result

        if stage.capturing is None:
            compute()
        else:
            state = self._state
            stage.capturing.append(lambda: compute(state))
        return True


def _without_bfloat16(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def _float_outside(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with float32 in place of bfloat16, which ONNX Runtime's arrays do not have: a buffer's numbers."""
    model = copy.deepcopy(model)
    kinds = onnx.TensorProto
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == kinds.BFLOAT16:
            value.type.tensor_type.elem_type = kinds.FLOAT
    return model


class ICudaEngine:
    device_memory_size_v2 = 512

    def __init__(self, module: Any, logger: Any, content: bytes) -> None:
        model = onnx.load_from_string(content)
        self._module, self._logger = module, logger
        self._session = OnnxRuntimeSession(_float_outside(model))
        self._tensors: dict[str, tuple[str, tuple[int, ...], TensorIOMode]] = {}
        for values, mode in ((model.graph.input, TensorIOMode.INPUT), (model.graph.output, TensorIOMode.OUTPUT)):
            for value in values:
                kind = value.type.tensor_type
                shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
                dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
                self._tensors[value.name] = (str(dtype), shape, mode)
        self._inputs = [name for name, (_, _, mode) in self._tensors.items() if mode is TensorIOMode.INPUT]
        rows = {d.dim_param for v in model.graph.input for d in v.type.tensor_type.shape.dim}
        self._most = {"rows": 1000 if ROWS in rows else 0, "batch": 16}

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self._tensors[name][2]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType(self._tensors[name][0])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name][1]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return self._module.stage.location

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        assert profile_index == 0
        most = self._most["rows" if name.startswith("tdq_") else "batch"]
        return [tuple(n if size < 0 else size for size in self._tensors[name][1]) for n in (1, 2, most)]

    def create_execution_context(self, strategy: Any = ExecutionContextAllocationStrategy.STATIC) -> Any:
        context = IExecutionContext(self, strategy)
        self._module.stage.contexts.append(context)
        return context

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()


class Runtime:
    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._module: Any = None
        self.engine_host_code_allowed = False

    def get_engine_validity(self, buffer: bytes) -> tuple[Any, int]:
        invalid = self._module.stage.invalid
        return (EngineValidity.INVALID if invalid else EngineValidity.VALID), int(invalid)

    def load_runtime(self, path: str) -> Runtime | None:
        self._module.stage.calls.append(f"load_runtime {Path(path).name}")
        return self

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        self._module.stage.calls.append("deserialize")
        assert not self.engine_host_code_allowed
        if self._module.stage.fails:
            self._logger.log(ILogger.Severity.ERROR, self._module.stage.fails)
            return None
        return ICudaEngine(self._module, self._logger, serialized_engine)


#: What only TensorRT-RTX has, and its bindings in the wheel of TensorRT do not.
RTX_ONLY = (CudaGraphStrategy, EngineValidity, EngineInvalidityDiagnostics, IRuntimeCache)

CLASSES = (
    DataType,
    TensorIOMode,
    TensorLocation,
    ExecutionContextAllocationStrategy,
    ILogger,
    IPluginRegistry,
    IRuntimeConfig,
    IExecutionContext,
    ICudaEngine,
    Runtime,
    *RTX_ONLY,
)


@dataclass
class Stage:
    """What happened, and what is to happen."""

    calls: list[str] = field(default_factory=list)
    contexts: list[IExecutionContext] = field(default_factory=list)
    plugins: set[tuple[str, str, str]] = field(default_factory=set)
    capturing: list[Any] | None = None
    fails: str = ""
    invalid: int = 0
    location: TensorLocation = TensorLocation.DEVICE


def stand_in(backend: str, version: str) -> Any:
    """The module, to be put into ``sys.modules``; ``stage`` is its own."""
    module: Any = types.ModuleType(backend)
    module.__version__, module.stage = version, Stage()
    for each in CLASSES:
        if backend == "tensorrt_rtx" or each not in RTX_ONLY:
            setattr(module, each.__name__, each)
    module.Runtime = type("Runtime", (Runtime,), {"_module": module})
    module.Runtime.__init__ = lambda self, logger: self.__dict__.update(_logger=logger, engine_host_code_allowed=False)
    module.get_plugin_registry = lambda: IPluginRegistry(module)
    return module


def graph_stand_in(module: Any) -> tuple[Any, Any]:
    """CUDAGraph, and the context manager that captures into one."""

    class CUDAGraph:
        def __init__(self) -> None:
            self.launches: list[Any] = []

        def replay(self) -> None:
            module.stage.calls.append("replay")
            for launch in self.launches:
                launch()

    @contextmanager
    def graph(captured: Any, stream: Any, capture_error_mode: str) -> Any:
        module.stage.calls.append("capture")
        module.stage.capturing = captured.launches
        yield
        module.stage.capturing = None

    return CUDAGraph, graph


def write_engine(model: Path, engine: Path, backend: str, version: str, **facts: Any) -> Path:
    """An engine file for the stand-in, with the manifest that a build writes."""
    engine.write_bytes(model.read_bytes())
    known = read_onnx(model)
    values: dict[str, Any] = {
        "engine": engine,
        "backend": backend,
        "backend_version": version,
        "compute_capabilities": ("8.9",),
        "engine_sha256": sha256(engine),
        "onnx_sha256": {model.name: sha256(model)},
        "quantized": known.quantized,
        "layers": (),
        "onnx_metadata": known.metadata,
    }
    EngineReport(**values | facts).save()
    return engine


LOOKUP = PluginNode("tdq", "TdqScaleLookup", "1")
