"""The Python form of the plugin, called by NVIDIA's own plugin package as TensorRT's builder calls it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
from stand_in_tensorrt import Builder, Dimension, stand_in

from modelopt_tdq import TdqError
from modelopt_tdq.errors import MissingExtraError
from modelopt_tdq.plugin import register
from modelopt_tdq.plugin.aot import NAME, NAMESPACE, VERSION
from modelopt_tdq.plugin.compile import compile_ptx

pytest.importorskip("triton")
pytest.importorskip("tensorrt_rtx")
if find_spec("tensorrt_bindings") is None:
    pytest.skip("NVIDIA's plugin package is in the wheel tensorrt-cu13-bindings", allow_module_level=True)

BATCH, ROWS, COLUMNS = 8, 20, 130


@pytest.fixture
def trt() -> Iterator[Any]:
    with stand_in() as module:
        yield module


def created(trt: Any) -> Any:
    """The plugin, made by its creator for ahead-of-time compilation."""
    register()
    from tensorrt.plugin._lib import QDP_CREATORS

    creator = QDP_CREATORS[f"{NAMESPACE}::{NAME}"]
    arguments = trt.PluginFieldCollection([]), trt.TensorRTPhase.BUILD, trt.QuickPluginCreationRequest.PREFER_AOT
    plugin = creator.create_plugin(NAME, NAMESPACE, *arguments)
    plugin.get_output_data_types([trt.float32] * 3, [1, 2, 1])
    return plugin


def dimensions(rows: int = ROWS, times: int = ROWS, constant: bool = True) -> list[list[Dimension]]:
    """Of timestep, table and timesteps; the batch is open."""
    size = {n: Dimension(n, constant) for n in (rows, times, COLUMNS)}
    return [[Dimension(BATCH, False)], [size[rows], size[COLUMNS]], [size[times]]]


def descriptors(trt: Any) -> list[Any]:
    found = []
    for shape in [(BATCH,), (ROWS, COLUMNS), (ROWS,), (BATCH, COLUMNS), (BATCH, COLUMNS)]:
        descriptor = trt.DynamicPluginTensorDesc()
        descriptor.desc.type, descriptor.desc.dims = trt.float32, shape
        descriptor.desc.format = trt.TensorFormat.LINEAR
        found.append(descriptor)
    return found


def test_registered_once(trt: Any) -> None:
    register()
    register()
    creators = [c for c in trt.get_plugin_registry().all_creators if c.name == NAME]
    assert [(c.plugin_namespace, c.plugin_version) for c in creators] == [(NAMESPACE, VERSION)]


@pytest.mark.parametrize("constant", [True, False])
def test_shapes(trt: Any, constant: bool) -> None:
    plugin = created(trt)
    outputs = plugin.get_output_shapes(dimensions(constant=constant), [], Builder())
    assert [[size.value for size in output] for output in outputs] == [[BATCH, COLUMNS]] * 2
    assert [size.is_constant() for size in outputs[0]] == [False, constant]


def test_formats(trt: Any) -> None:
    plugin = created(trt)
    plugin.get_output_shapes(dimensions(), [], Builder())
    formats = plugin.get_supported_format_combinations(descriptors(trt), 3)
    assert [(f.type, f.format) for f in formats] == [(trt.float32, trt.TensorFormat.LINEAR)] * 5


@pytest.mark.parametrize("constant", [True, False])
def test_launch(trt: Any, constant: bool) -> None:
    plugin, inputs, tensors = created(trt), dimensions(constant=constant), descriptors(trt)
    plugin.get_output_shapes(inputs, [], Builder())
    plugin.get_supported_format_combinations(tensors, 3)
    plugin.configure_plugin(tensors[:3], tensors[3:])
    plugin.set_tactic(0)

    class Sizes(dict[int, Any]):
        nbSymExprs = 0  # noqa: N815  # TensorRT's name

    sizes, launched = Sizes(), SimpleNamespace()
    plugin.get_launch_params(inputs, tensors, 3, launched, sizes, Builder())
    ptx = compile_ptx("8.0")
    grid = [getattr(launched, f"grid_{axis}").expr.value for axis in "xyz"]
    block = [getattr(launched, f"block_{axis}").expr.value for axis in "xyz"]
    assert grid == [BATCH, 3, 1]  # 130 columns, 64 at a time
    assert block == [ptx.threads, 1, 1]
    assert launched.shared_mem.expr.value == ptx.shared_bytes
    assert sizes.nbSymExprs == 2
    assert [sizes[i].expr.value for i in range(2)] == [ROWS, COLUMNS]
    assert [sizes[i].dtype for i in range(2)] == [trt.PluginArgDataType.INT32] * 2
    entry, text = plugin.get_kernel([t.desc for t in tensors[:3]], [t.desc for t in tensors[3:]])
    assert (entry, text.decode()) == (ptx.entry, ptx.text)


def test_wrong_type(trt: Any) -> None:
    plugin = created(trt)
    with pytest.raises(TdqError, match=r"table = .*HALF.*takes float32"):
        plugin.get_output_data_types([trt.float32, trt.float16, trt.float32], [1, 2, 1])


@pytest.mark.parametrize(("ranks", "field"), [([2, 2, 1], "timestep"), ([1, 4, 1], "table"), ([1, 2, 2], "timesteps")])
def test_wrong_rank(trt: Any, ranks: list[int], field: str) -> None:
    plugin = created(trt)
    with pytest.raises(TdqError, match=rf"{field} = .*timestep \[B\], table \[K, Q\] and timesteps \[K\]"):
        plugin.get_output_data_types([trt.float32] * 3, ranks)


def test_wrong_number_of_times(trt: Any) -> None:
    plugin = created(trt)
    with pytest.raises(TdqError, match="timesteps = 19: the table has 20 rows"):
        plugin.get_output_shapes(dimensions(times=19), [], Builder())


def test_too_old() -> None:
    with (
        stand_in("10.12.0.36"),
        pytest.raises(TdqError, match=r"10\.12\.0.*supported from 10\.13 on.*tensorrt>=10\.13"),
    ):
        register()


def test_lean_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_in():
        monkeypatch.setitem(sys.modules, "tensorrt.plugin", None)
        with pytest.raises(TdqError, match="without its module of Python plugins"):
            register()


def test_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match=r"modelopt-tdq\[tensorrt\]"):
        register()
