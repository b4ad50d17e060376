"""Graphs in which each token or frame has the scale of its own time: codes and outputs are those of the torch model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import oracle
from support.export import LOWERINGS, lowered, set_table, trace
from support.slow import slow_but
from support.token_models import (
    TIMES,
    VIDEOS,
    Frames,
    Tokens,
    different,
    quantized,
    quantized_video,
    sample,
    video_call,
)
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq import TdqError
from modelopt_tdq.export import engine_table
from modelopt_tdq.export.onnx_export import MarkerGraph
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession

KINDS = (Tokens, Frames)


@pytest.fixture(scope="module")
def models() -> dict[type[nn.Module], nn.Module]:
    return {kind: quantized(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def graphs(models: Any) -> dict[tuple[type[nn.Module], bool], MarkerGraph]:
    def traced(kind: type[nn.Module], corrected: bool) -> MarkerGraph:
        model = copy.deepcopy(models[kind])
        if corrected:
            _corrected(model)
        inputs = {"sample": sample(kind), "timestep": different(kind)}
        return trace(model, inputs, dynamic_batch=corrected)

    return {(kind, corrected): traced(kind, corrected) for kind in KINDS for corrected in (False, True)}


def _corrected(model: nn.Module, only: str = "") -> None:
    generator = torch.Generator().manual_seed(5)
    layers = [name.rpartition(".")[0] for name in tdq.temporal_quantizers(model) if only in name]
    widths = {name: model.get_submodule(name).weight.shape[0] for name in layers}
    gain = {n: 0.5 + torch.rand(len(TIMES), w, generator=generator) for n, w in widths.items()}
    bias = {n: torch.randn(len(TIMES), w, generator=generator) for n, w in widths.items()}
    tdq.set_layer_correction(model, tdq.LayerCorrection(torch.tensor(TIMES), gain, bias))


def _watched(model: nn.Module, x: Tensor, times: Tensor) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """The output; and of each quantizer, by name, what it read and gave."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    quantizers = tdq.temporal_quantizers(model)
    hooks = [
        q.register_forward_hook(lambda m, args, out, n=name: seen.update({n: (args[0], out)}))
        for name, q in quantizers.items()
    ]
    with torch.no_grad():
        output = model(x, times)
    for hook in hooks:
        hook.remove()
    return output, seen


def _times_of(x: Tensor, times: Tensor) -> np.ndarray[Any, Any]:
    """Of each number in ``x``, found by the sizes that the two models have."""
    batch, tokens = times.shape
    if x.shape[0] == batch * tokens:
        return times.reshape(-1, *(1,) * (x.dim() - 1)).expand(x.shape).numpy()
    axis = next(axis for axis in (2, 1) if x.dim() > axis and x.shape[axis] in (tokens, 4 * tokens) and axis < 3)
    shape = [1] * x.dim()
    shape[0], shape[axis] = batch, x.shape[axis]
    return times.repeat_interleave(x.shape[axis] // tokens, 1).reshape(shape).expand(x.shape).numpy()


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("table", [{}, {"offset": True, "dequant": True}, {"bits": 4, "dequant": True}])
def test_codes_are_those_of_the_definition(models: Any, graphs: Any, kind: Any, lowering: str, table: Any) -> None:
    model = copy.deepcopy(models[kind])
    found = set_table(model, list(TIMES), base=0.05, **table)
    graph = lowered(graphs[kind, False], lowering, model)
    codes = OnnxRuntimeSession(graph.proto, codes=True)
    x, times = sample(kind, seed=4), different(kind, seed=4)
    results = codes({"sample": x.numpy(), "timestep": times.numpy()})
    first = next(iter(found.names))  # reads what no other layer has rounded
    _, seen = _watched(model, x, times)
    compared = 0
    for column, name in enumerate(found.names):
        read = seen[name][0]
        rows = torch.bucketize(torch.from_numpy(_times_of(read, times).copy()), torch.tensor([150.0, 450.0, 750.0]))
        scale = found.scale[:, column][rows].numpy()
        offset = 0.0 if found.offset is None else found.offset[:, column][rows].numpy()
        expected = oracle.codes(read.numpy(), scale, offset, table.get("bits", 8))
        got = results[f"{name}/codes"]
        if got.shape != expected.shape:  # padded explicitly
            got = got[..., 1:-1, 1:-1]
        wrong = int((got != expected).sum())
        # behind the first layer an operator's rounding may move a value over an edge
        assert wrong == 0 if name == first else wrong <= 1 + expected.size // 200, name
        compared += expected.size
    assert compared > 150


@pytest.mark.parametrize("lowering", [*LOWERINGS, "table_input"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("corrected", [False, True])
def test_outputs_are_those_of_the_torch_model(
    models: Any, graphs: Any, kind: Any, lowering: str, corrected: bool
) -> None:
    model = copy.deepcopy(models[kind])
    if corrected:  # and channels are divided
        _corrected(model)
        for name, quantizer in tdq.temporal_quantizers(model).items():
            layer: Any = model.get_submodule(name.rpartition(".")[0])
            divisor = 2.0 ** (torch.arange(layer.weight.shape[1]) % 3 - 1.0)
            quantizer.set_channels(divisor.reshape(-1, *(1,) * (layer.weight.dim() - 2)))
    set_table(model, list(TIMES), base=0.05, offset=True, dequant=True)
    as_input = lowering == "table_input"
    graph = lowered(graphs[kind, corrected], "ratio" if as_input else lowering, model, table_input=as_input)
    assert not graph.context.skipped or lowering == "reference"
    session = OnnxRuntimeSession(graph.proto)
    table = engine_table(graph.proto, model) if as_input else {}
    for batch in (2, 3) if corrected else (2,):
        x, times = sample(kind, batch, seed=8), different(kind, batch, seed=8)
        with torch.no_grad():
            expected = model(x, times)
        found = session({"sample": x.numpy(), "timestep": times.numpy(), **table})[session.outputs[0]]
        error = (torch.from_numpy(found) - expected).abs()
        # but for values that an operator's rounding moved over an edge
        assert float((error > 1e-4 * expected.abs().max()).float().mean()) < 0.02
        same = torch.full_like(times, 600.0)
        with torch.no_grad():
            expected = model(x, same)
        found = session({"sample": x.numpy(), "timestep": same.numpy(), **table})[session.outputs[0]]
        error = (torch.from_numpy(found) - expected).abs()
        assert float((error > 1e-4 * expected.abs().max()).float().mean()) < 0.02


@pytest.mark.parametrize(
    "name", slow_but(["WanTransformer3DModel", "SkyReelsV2Transformer3DModel"], "WanTransformer3DModel")
)
def test_videos_whose_first_frame_is_given(name: str) -> None:
    model = quantized_video(name)
    _corrected(model, only="attn1.to_q")
    times = torch.tensor([[0.0, 900.0]]).expand(VIDEOS[name], 2)
    tensors = video_call(name, times, seed=5)
    graph = trace(model, tensors)
    with torch.no_grad():
        expected = model(**tensors)[0]
        equal = model(**video_call(name, times[:, 1:].expand(-1, 2), seed=5))[0]
    feeds = {k: v.numpy() for k, v in tensors.items() if isinstance(v, Tensor)}
    for lowering in LOWERINGS:
        proto = lowered(graph, lowering).proto
        session = OnnxRuntimeSession(proto)
        found = torch.from_numpy(session({n: feeds[n] for n in session.inputs})[session.outputs[0]])
        error = float((found - expected).norm() / expected.norm())
        assert error < 0.2 * float((equal - expected).norm() / expected.norm())
        assert error < 2e-3


def test_a_graph_of_equal_times_says_where_they_differ(models: Any, tmp_path: Path) -> None:
    x = sample(Tokens)
    times = torch.tensor([300.0, 600.0]).unsqueeze(1).expand(2, 5).contiguous()
    path = tdq.export_onnx(models[Tokens], tmp_path / "m.onnx", {"sample": x, "timestep": times}).path
    session = OnnxRuntimeSession(path)

    def output(times: Tensor) -> Tensor:
        return torch.from_numpy(session({"sample": x.numpy(), "timestep": times.numpy()})[session.outputs[0]])

    with torch.no_grad():
        expected = models[Tokens](x, times)
    assert torch.allclose(output(times), expected, atol=1e-4)
    assert bool(output(different(Tokens)).isnan().all())


def test_what_cannot_be_matched_is_named(models: Any, tmp_path: Path) -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text = nn.Linear(8, 8)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return sample + self.text(sample[:, :3] * timestep[:, :1, None]).mean(1, keepdim=True)

    import modelopt.torch.quantization as mtq
    from support.models import fast_config

    def forward_loop(model: nn.Module) -> None:
        for time in (1.0, 300.0):
            model(sample(Tokens), torch.full((2, 5), time))

    model = mtq.quantize(Text().eval(), fast_config(), forward_loop)
    inputs = {"sample": sample(Tokens), "timestep": different(Tokens)}
    with pytest.raises(TdqError, match=r"text\.input_quantizer takes an activation of shape \(2, 3, 8\)"):
        tdq.export_onnx(model, tmp_path / "m.onnx", inputs)
    assert not list(tmp_path.iterdir())
