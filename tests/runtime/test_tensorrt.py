"""TensorRTSession on a stand-in for TensorRT that computes with ONNX Runtime on the CPU."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from stand_in_engine import LOOKUP, CudaGraphStrategy, TensorLocation, graph_stand_in, stand_in, write_engine
from support.export import set_table
from support.models import noise, quantized

import modelopt_tdq as tdq
from modelopt_tdq.export import engine_table
from modelopt_tdq.runtime.build.report import manifest_path
from modelopt_tdq.runtime.sessions import device_queue
from modelopt_tdq.runtime.sessions.device_queue import DeviceQueue
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession
from modelopt_tdq.runtime.sessions.tensorrt import TensorRTSession

VERSION = "11.4.0.106"
BACKENDS = ("tensorrt", "tensorrt_rtx")


@pytest.fixture(params=BACKENDS)
def trt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    return install(request.param, monkeypatch)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Any:
    return install("tensorrt", monkeypatch)


@pytest.fixture
def rtx(monkeypatch: pytest.MonkeyPatch) -> Any:
    return install("tensorrt_rtx", monkeypatch)


def install(backend: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = stand_in(backend, VERSION)
    monkeypatch.setitem(sys.modules, backend, module)
    monkeypatch.setattr(device_queue, "DEVICE_TYPES", ("cuda", "cpu"))
    for name, value in zip(("CUDAGraph", "graph"), graph_stand_in(module), strict=True):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    return module


@pytest.fixture(scope="module")
def model() -> Any:
    return quantized()


@pytest.fixture(scope="module")
def onnx_file(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    inputs = {"sample": noise(2, 3, 8, 8), "timestep": torch.tensor([300.0, 300.0])}
    return tdq.export_onnx(model, tmp_path_factory.mktemp("trt") / "m.onnx", inputs, dynamic_batch=True).path


@pytest.fixture(scope="module")
def table_file(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    inputs = {"sample": noise(2, 3, 8, 8), "timestep": torch.tensor(300.0)}
    return tdq.export_onnx(model, tmp_path_factory.mktemp("trt") / "t.onnx", inputs, table_input=True).path


def engine_of(module: Any, model: Path, folder: Path, **facts: Any) -> Path:
    return write_engine(model, folder / "m.engine", module.__name__, VERSION, **facts)


def session_of(module: Any, model: Path, folder: Path, **arguments: Any) -> TensorRTSession:
    return TensorRTSession(engine_of(module, model, folder), device="cpu", **arguments)


def call(batch: int = 2, seed: int = 3, time: float = 600.0) -> dict[str, torch.Tensor]:
    return {"sample": noise(batch, 3, 8, 8, seed=seed), "timestep": torch.full((batch,), time)}


def test_tensors_on_the_device_stay_tensors(trt: Any, onnx_file: Path, tmp_path: Path) -> None:
    session = session_of(trt, onnx_file, tmp_path)
    assert session.inputs == {"sample": np.dtype(np.float32), "timestep": np.dtype(np.float32)}
    assert session.shapes == {"sample": ("1..16", 3, 8, 8), "timestep": ("1..16",)}
    assert session.outputs == ["output"]
    expected = OnnxRuntimeSession(onnx_file)
    kept = []
    for batch, time in ((2, 600.0), (3, 20.0), (2, 400.0)):
        inputs = call(batch, time=time)
        found = session(inputs)["output"]
        assert isinstance(found, torch.Tensor)
        kept.append((found, expected(inputs)["output"]))
    for found, wanted in kept:  # results of earlier calls are not overwritten
        np.testing.assert_array_equal(found.numpy(), wanted)


def test_arrays_stay_arrays(trt: Any, onnx_file: Path, tmp_path: Path) -> None:
    session = session_of(trt, onnx_file, tmp_path)
    inputs = {name: value.numpy() for name, value in call().items()}
    found = session(inputs)["output"]
    assert isinstance(found, np.ndarray)
    session({**inputs, "sample": inputs["sample"] + 1})
    np.testing.assert_array_equal(found, OnnxRuntimeSession(onnx_file)(inputs)["output"])


def test_dtypes_are_converted(trt: Any, onnx_file: Path, tmp_path: Path) -> None:
    session = session_of(trt, onnx_file, tmp_path)
    inputs = {"sample": call()["sample"].double(), "timestep": torch.tensor([600, 600])}
    wanted = OnnxRuntimeSession(onnx_file)(call())["output"]
    np.testing.assert_array_equal(session(inputs)["output"].numpy(), wanted)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_bfloat16(plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda_graph: bool) -> None:
    """Tensors on the device give bfloat16 tensors; what NumPy holds gives float32 arrays, with the same numbers."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.BFLOAT16, ["batch", 3]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "x"], ["y"])], "graph", [x], [y])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 22)], ir_version=10)
    onnx.save(proto, tmp_path / "m.onnx")
    session = session_of(plain, tmp_path / "m.onnx", tmp_path, cuda_graph=cuda_graph)
    assert session.inputs == {"x": np.dtype(ml_dtypes.bfloat16)}
    values = torch.tensor([[1.5, 2.0**40, -2.25], [1 + 2.0**-7, 1 + 2.0**-9, 2.0**-130]])  # rounded: 1 + 2**-9
    wanted = 2 * values.bfloat16().float()
    for given in (values, values.bfloat16(), values.double()):
        found = session({"x": given})["y"]
        assert isinstance(found, torch.Tensor)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found.float(), wanted)
    monkeypatch.setattr(DeviceQueue, "holds", lambda queue, tensor: False)  # as tensors of the CPU beside a GPU
    for given in (
        values,
        values.bfloat16(),
        values.numpy(),
        values.numpy().astype(ml_dtypes.bfloat16),
        values.tolist(),
    ):
        array = session({"x": given})["y"]
        assert isinstance(array, np.ndarray)
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, wanted.numpy())
    assert session({"x": torch.tensor([[1, 2, 3]])})["y"].tolist() == [[2, 4, 6]]


def test_what_is_no_input_of_the_engine(trt: Any, onnx_file: Path, tmp_path: Path) -> None:
    session = session_of(trt, onnx_file, tmp_path)
    with pytest.raises(tdq.TdqError, match=r"not the inputs of the graph. Pass \['sample', 'timestep'\]"):
        session({"sample": call()["sample"]})
    for sample in (noise(17, 3, 8, 8), noise(2, 3, 8, 9), noise(3, 8, 8)):
        with pytest.raises(tdq.TdqError, match=r"built for \('1..16', 3, 8, 8\).*dynamic_sizes"):
            session({**call(), "sample": sample})
    trt.stage.fails = "out of luck"
    with pytest.raises(tdq.TdqError, match="failed to run it: out of luck"):
        session(call())


def test_fractions_for_integers(plain: Any, model: Any, tmp_path: Path) -> None:
    inputs = {"sample": noise(2, 3, 8, 8), "timestep": torch.tensor(300)}
    path = tdq.export_onnx(model, tmp_path / "m.onnx", inputs).path
    session = session_of(plain, path, tmp_path)
    session(inputs)
    with pytest.raises(tdq.TdqError, match="engine takes int64, and looking for fractions would wait"):
        session({**inputs, "timestep": torch.tensor(300.5)})
    with pytest.raises(tdq.TdqError, match="int64, which cannot hold this"):
        session({**inputs, "timestep": 300.5})


def test_one_graph_per_set_of_shapes(
    plain: Any, onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DeviceQueue, "finish", lambda queue: plain.stage.calls.append("finish"))
    session = session_of(plain, onnx_file, tmp_path, cuda_graph=True, max_shapes=2)
    expected, stage = OnnxRuntimeSession(onnx_file), plain.stage
    for batch, time in ((2, 600.0), (2, 500.0), (3, 500.0), (3, 400.0), (2, 10.0)):
        inputs = call(batch, seed=int(time), time=time)
        np.testing.assert_array_equal(session(inputs)["output"].numpy(), expected(inputs)["output"])
    assert stage.calls.count("capture") == len(stage.contexts) == 2
    assert stage.calls.count("replay") == 3
    assert "finish" not in stage.calls  # the loop never waits for the GPU
    session(call(4))  # instead of batch 3, which was not used for longest
    session(call(2))
    assert stage.calls.count("capture") == 3
    session(call(3))
    assert stage.calls.count("capture") == 4
    assert stage.calls.count("finish") == 2  # before something is freed that may run
    assert {context._memory for context in stage.contexts} == {session._contexts._memory.data_ptr()}


def test_without_graphs_one_context_serves_all(trt: Any, onnx_file: Path, tmp_path: Path) -> None:
    session = session_of(trt, onnx_file, tmp_path)
    for batch in (1, 2, 3, 1):
        session(call(batch))
    assert len(trt.stage.contexts) == 1
    assert "capture" not in trt.stage.calls


def test_an_engine_that_cannot_be_captured(plain: Any, onnx_file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(*arguments: Any, **more: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    with pytest.raises(tdq.TdqError, match=r"cannot be captured .*not permitted.*Leave cuda_graph out"):
        session_of(plain, onnx_file, tmp_path, cuda_graph=True)(call())


def test_run_time_cache_of_rtx(rtx: Any, onnx_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.engine.runtime_cache"
    with session_of(rtx, onnx_file, tmp_path, cuda_graph=True) as session:
        assert not file.exists()
        session(call())
        assert file.read_bytes() == b"kernels of this GPU"
    assert "capture" not in rtx.stage.calls
    config = rtx.stage.contexts[0]._config
    assert config.cuda_graph_strategy is CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    assert config._cache is not None
    assert session_of(rtx, onnx_file, tmp_path)._contexts._cache.loaded
    file.write_bytes(b"kernels of another GPU")
    foreign = session_of(rtx, onnx_file, tmp_path)
    assert not foreign._contexts._cache.loaded
    foreign(call())
    assert file.read_bytes() == b"kernels of this GPU"
    file.unlink()
    with session_of(rtx, onnx_file, tmp_path, runtime_cache=False) as session:
        session(call())
    assert not file.exists()


def test_tables_are_swapped_without_a_rebuild(trt: Any, model: Any, table_file: Path, tmp_path: Path) -> None:
    expected = OnnxRuntimeSession(table_file)
    own = tdq.scale_table(model)
    session = session_of(trt, table_file, tmp_path, table=model, cuda_graph=True)
    assert set(session.inputs) == {"sample", "timestep"}
    tables = [own, other(model, 4.0), other(model, 9.0), own]
    results = []
    for table in tables:
        session.set_table(table)
        for time in (0.0, 400.0):
            inputs = {"sample": noise(2, 3, 8, 8, seed=3), "timestep": torch.tensor(time)}
            found = session(inputs)["output"].numpy()
            np.testing.assert_array_equal(found, expected(inputs | engine_table(table_file, table))["output"])
            results.append(found)
    assert not np.array_equal(results[2], results[4])
    if not session._contexts.capture:
        return
    assert trt.stage.calls.count("capture") == 3  # the third table has as many rows as the second


def other(model: Any, spread: float) -> tdq.ScaleTable:
    """Another table of the model, which keeps its own."""
    own = tdq.scale_table(model)
    table = set_table(model, [3.0, 77.0, 500.0], spread=spread)
    tdq.set_scale_table(model, own)
    return table


def test_a_pipeline_passes_a_table_on(
    plain: Any, model: Any, table_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TensorRTSession.__init__.__kwdefaults__, "device", "cpu")
    engine, expected = engine_of(plain, table_file, tmp_path), OnnxRuntimeSession(table_file)
    inputs = {"sample": noise(2, 3, 8, 8, seed=3), "timestep": torch.tensor(400.0)}
    first, second = (engine_table(table_file, other(model, spread)) for spread in (4.0, 9.0))
    pipeline = SimpleNamespace(components={"unet": model}, unet=model)
    tdq.swap_denoiser(pipeline, engine, backend="tensorrt", component="unet", table=first)
    session = pipeline.unet.session
    for table in (first, second):
        found = pipeline.unet(**inputs)[0]
        np.testing.assert_array_equal(found.numpy(), expected(inputs | table)["output"])
        tdq.swap_denoiser(pipeline, session, component="unet", table=second)


def test_tables_of_other_engines(plain: Any, model: Any, table_file: Path, onnx_file: Path, tmp_path: Path) -> None:
    with pytest.raises(tdq.TdqError, match=r"takes its table as an input. Pass TensorRTSession\(engine, table"):
        session_of(plain, table_file, tmp_path)
    session = session_of(plain, table_file, tmp_path, table=model)
    own = tdq.scale_table(model)
    fewer = tdq.ScaleTable(timesteps=own.timesteps, scale=own.scale[:, 1:], names=own.names[1:])
    with pytest.raises(tdq.TdqError, match="lacks these quantizers"):
        session.set_table(fewer)
    arrays = engine_table(table_file, model)
    with pytest.raises(tdq.TdqError, match="not the inputs"):
        session.set_table({"tdq_table": arrays["tdq_table"]})
    with pytest.raises(tdq.TdqError, match=r"not \[K, M\] and \[K\]"):
        session.set_table({**arrays, "tdq_edges": arrays["tdq_edges"][1:]})
    with pytest.raises(tdq.TdqError, match="built for"):
        session.set_table({**arrays, "tdq_table": arrays["tdq_table"][:, 1:]})
    with pytest.raises(tdq.TdqError, match=r"the engine takes none. Export with table_input=True"):
        session_of(plain, onnx_file, tmp_path, table=model)


def test_engines_that_nobody_vouches_for(plain: Any, onnx_file: Path, tmp_path: Path) -> None:
    engine = engine_of(plain, onnx_file, tmp_path)
    engine.write_bytes(engine.read_bytes() + onnx.ModelProto(doc_string="changed").SerializeToString())
    with pytest.raises(tdq.TdqError, match=r"checksum.*or pass trust=True"):
        TensorRTSession(engine, device="cpu")
    assert "deserialize" not in plain.stage.calls
    manifest_path(engine).unlink()
    with pytest.raises(tdq.TdqError, match=r"no such file.*or pass trust=True"):
        TensorRTSession(engine, device="cpu")
    with pytest.raises(tdq.TdqError, match="without a manifest does not tell its backend"):
        TensorRTSession(engine, trust=True, device="cpu")
    session = TensorRTSession(engine, trust=True, backend="tensorrt", device="cpu")
    assert session.report is None
    assert session(call())["output"].shape == (2, 3, 8, 8)
    with pytest.raises(tdq.TdqError, match="no such file"):
        TensorRTSession(tmp_path / "gone.engine", trust=True, device="cpu")
    with pytest.raises(tdq.TdqError, match="was built by tensorrt"):
        TensorRTSession(engine_of(plain, onnx_file, tmp_path), backend="tensorrt_rtx", device="cpu")


def test_another_release(trt: Any, onnx_file: Path, tmp_path: Path) -> None:
    engine = engine_of(trt, onnx_file, tmp_path)
    trt.__version__ = "11.4.0.999"  # a build number more is the same release
    TensorRTSession(engine, device="cpu")
    for other in ("11.5.0", "10.13.3", "11.4.1"):
        trt.__version__ = other
        message = rf"{trt.__name__} = '{other}'.*built by {trt.__name__} 11.4.0.106, and engines run in the release"
        with pytest.raises(tdq.TdqError, match=message):
            TensorRTSession(engine, device="cpu")


def test_version_compatible_engines(plain: Any, onnx_file: Path, tmp_path: Path) -> None:
    engine = engine_of(plain, onnx_file, tmp_path, version_compatible=True)
    lean = tmp_path / "libnvinfer_lean.so"
    lean.write_bytes(b"")
    plain.__version__ = "11.5.0"
    with pytest.raises(tdq.TdqError, match="takes that version's lean runtime library"):
        TensorRTSession(engine, device="cpu")
    TensorRTSession(engine, device="cpu", lean_runtime=lean)(call())
    assert "load_runtime libnvinfer_lean.so" in plain.stage.calls
    plain.__version__ = "11.3.0"
    with pytest.raises(tdq.TdqError, match="runs in that release and later ones"):
        TensorRTSession(engine, device="cpu", lean_runtime=lean)


@pytest.mark.parametrize(
    ("backend", "facts", "capability", "message"),
    [
        ("tensorrt", {}, "9.0", "built for compute capability 8.9, and this is 9.0. Build the engine on this machine"),
        ("tensorrt", {"hardware_compatibility": "same_compute_capability"}, "8.9", ""),
        ("tensorrt", {"hardware_compatibility": "same_compute_capability"}, "9.0", "this is 9.0"),
        ("tensorrt", {"hardware_compatibility": "ampere_plus"}, "12.0", ""),
        ("tensorrt", {"hardware_compatibility": "ampere_plus"}, "7.5", "this is 7.5"),
        ("tensorrt", {"compute_capabilities": ()}, "9.0", ""),
        ("tensorrt_rtx", {"compute_capabilities": ("8.9", "12.0")}, "12.0", ""),
        ("tensorrt_rtx", {"compute_capabilities": ("8.9",)}, "12.0", r"compute_capabilities=\['8.9', '12.0'\]"),
    ],
)
def test_another_gpu(
    backend: str,
    facts: dict[str, Any],
    capability: str,
    message: str,
    onnx_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_of(install(backend, monkeypatch), onnx_file, tmp_path, **facts)
    monkeypatch.setattr(DeviceQueue, "capability", capability)
    with pytest.raises(tdq.TdqError, match=message) if message else nullcontext():
        TensorRTSession(engine, device="cpu")


def test_plugins_of_the_engine(plain: Any, onnx_file: Path, tmp_path: Path) -> None:
    engine = engine_of(plain, onnx_file, tmp_path, plugins=(LOOKUP,))
    with pytest.raises(tdq.TdqError, match="needs the plugin tdq::TdqScaleLookup, which is not registered"):
        TensorRTSession(engine, device="cpu")
    with pytest.raises(tdq.TdqError, match="it cannot be loaded"):
        TensorRTSession(engine, device="cpu", plugins=[engine])
    plain.stage.plugins.add(("TdqScaleLookup", "1", "tdq"))
    TensorRTSession(engine, device="cpu")


def test_what_tensorrt_itself_refuses(trt: Any, onnx_file: Path, tmp_path: Path) -> None:
    engine = engine_of(trt, onnx_file, tmp_path)
    trt.stage.location = TensorLocation.HOST
    with pytest.raises(tdq.TdqError, match="read on the host"):
        TensorRTSession(engine, device="cpu")
    trt.stage.fails = "wrong magic"
    with pytest.raises(tdq.TdqError, match="cannot load it: wrong magic"):
        TensorRTSession(engine, device="cpu")
    if trt.__name__ == "tensorrt_rtx":
        trt.stage.invalid = 2
        with pytest.raises(tdq.TdqError, match="finds it invalid: UNSUPPORTED_CC"):
            TensorRTSession(engine, device="cpu")


def test_arguments(onnx_file: Path, tmp_path: Path, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(plain, onnx_file, tmp_path)
    with pytest.raises(tdq.TdqError, match="max_shapes = 0"):
        TensorRTSession(engine, max_shapes=0, device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(tdq.TdqError, match="PyTorch sees no NVIDIA GPU"):
        TensorRTSession(engine)
    monkeypatch.setattr(device_queue, "DEVICE_TYPES", ("cuda",))
    with pytest.raises(tdq.TdqError, match="NVIDIA GPUs only"):
        TensorRTSession(engine, device="cpu")


def test_an_older_manifest_is_read(plain: Any, onnx_file: Path, tmp_path: Path) -> None:
    engine = engine_of(plain, onnx_file, tmp_path)
    content = json.loads(manifest_path(engine).read_text())
    for new in ("version_compatible", "hardware_compatibility", "plugins", "onnx_metadata"):
        del content[new]
    manifest_path(engine).write_text(json.dumps(content))
    assert TensorRTSession(engine, device="cpu").report == tdq.EngineReport.load(engine)


def test_the_real_tensorrt_rtx_judges_a_damaged_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(device_queue, "DEVICE_TYPES", ("cuda", "cpu"))
    damaged = tmp_path / "m.engine"
    damaged.write_bytes(b"x" * 4096)
    with pytest.raises(tdq.TdqError, match="finds it invalid: MALFORMED_ENGINE"):
        TensorRTSession(damaged, backend="tensorrt_rtx", trust=True, device="cpu")


def test_a_pipeline_runs_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    from support.models import fast_config
    from support.pipelines import FAMILIES

    family = FAMILIES["dit"]
    pipeline, call = family.tiny(), family.tiny_call(0)
    tdq.quantize_pipeline(pipeline, fast_config(), calls=[call], steps=2, progress=False)
    inputs = tdq.sample_inputs(pipeline, **call)
    path = tdq.export_onnx(pipeline.transformer, tmp_path / "m.onnx", inputs).path
    monkeypatch.setitem(TensorRTSession.__init__.__kwdefaults__, "device", "cpu")
    pipeline.set_progress_bar_config(disable=True)
    images = {}
    for backend in ("onnxruntime", *BACKENDS):
        file = path
        if backend in BACKENDS:
            file = engine_of(install(backend, monkeypatch), path, tmp_path)
        tdq.swap_denoiser(pipeline, file, backend=backend, component="transformer")
        arguments = {**call, "num_inference_steps": 3, "output_type": "np"}
        images[backend] = pipeline(**arguments, generator=torch.Generator().manual_seed(9))[0]
    assert isinstance(pipeline.transformer.session, TensorRTSession)
    for backend in BACKENDS:
        np.testing.assert_array_equal(images[backend], images["onnxruntime"])


@pytest.mark.parametrize("table_input", [False, True])
def test_an_engine_is_compared_with_the_reference(
    trt: Any,
    model: Any,
    onnx_file: Path,
    table_file: Path,
    tmp_path: Path,
    table_input: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("polygraphy")
    from modelopt_tdq.compare import compare_model

    monkeypatch.setitem(TensorRTSession.__init__.__kwdefaults__, "device", "cpu")
    graph, backend = table_file if table_input else onnx_file, trt.__name__
    calls = [call(time=time) for time in (20.0, 600.0)]
    if table_input:  # exported with one time for the batch
        calls = [{**inputs, "timestep": inputs["timestep"][0]} for inputs in calls]
    arguments: dict[str, Any] = {"backends": [backend], "layers": False, "lowered_path": graph, "progress": False}
    sound = compare_model(model, calls, files={backend: engine_of(trt, graph, tmp_path)}, **arguments)
    assert [step.backend for step in sound.steps] == [backend] * 2
    assert sound.passed
    with pytest.raises(tdq.TdqError, match=f"{backend} runs an engine"):
        compare_model(model, calls, **arguments)
    wrong = onnx.load(graph)
    weight = next(tensor for tensor in wrong.graph.initializer if tensor.name.endswith("weight_quantizer/scale"))
    weight.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(weight), weight.name))
    onnx.save(wrong, tmp_path / "wrong.onnx")
    engine = engine_of(trt, tmp_path / "wrong.onnx", tmp_path)
    assert not compare_model(model, calls, files={backend: engine}, **arguments).passed


def test_the_time_of_a_batch_is_not_waited_for(model: Any) -> None:
    session = SimpleNamespace(inputs={"sample": np.float32, "timestep": np.float32}, outputs=["output"])
    denoiser = tdq.EngineDenoiser(session, model)
    # a tensor without values: to look at them is an error, as it is a wait on the GPU
    time = torch.empty((), device="meta")
    assert denoiser._fitted("timestep", time.expand(2), ()).shape == ()
    with pytest.raises(RuntimeError, match="meta"):
        denoiser._fitted("timestep", torch.empty(2, device="meta"), ())
