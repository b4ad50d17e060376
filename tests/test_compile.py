"""torch.compile: no graph break of ours, no recompilation from one time step to the next.

ModelOpt itself breaks the graph twice: in its weight quantizers (a branch on the amax), which
``mtq.fold_weight`` takes away, and in its attention, which exchanges functions while it runs.
"""

from __future__ import annotations

from collections.abc import Iterator

import modelopt.torch.quantization as mtq
import pytest
import torch
from support.models import FAMILIES, TIMES, TinyDenoiser, at, fast_config, noise, quantized
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import modelopt_tdq as tdq


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture
def folded() -> nn.Module:
    model = quantized(asymmetric=True)
    mtq.fold_weight(model)
    return model


def test_one_graph_serves_every_time(folded: nn.Module) -> None:
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(folded, fullgraph=True, backend=counter)
    sample = noise(2, 3, 8, 8)
    compiled(sample, torch.tensor(500.0))
    frames = counter.frame_count
    for time in (*TIMES, 310.0, 0.5):
        assert torch.equal(compiled(sample, torch.tensor(time)), folded(sample, torch.tensor(time)))
    assert counter.frame_count == frames


def test_one_graph_serves_every_time_per_sample(folded: nn.Module) -> None:
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(folded, fullgraph=True, backend=counter)
    sample = noise(2, 3, 8, 8)
    compiled(sample, torch.tensor([900, 600]))
    frames = counter.frame_count
    for times in ([900, 20], [20, 900], [300, 300]):
        assert torch.equal(compiled(sample, torch.tensor(times)), folded(sample, torch.tensor(times)))
    assert counter.frame_count == frames


def test_inside_a_larger_compiled_function(folded: nn.Module) -> None:
    counter = CompileCounterWithBackend("eager")

    @torch.compile(fullgraph=True, backend=counter)
    def step(sample: Tensor, time: Tensor) -> Tensor:
        return sample - 0.1 * folded(sample, time)

    sample = noise(2, 3, 8, 8)
    for time in TIMES:
        t = torch.tensor(time)
        assert torch.equal(step(sample, t), sample - 0.1 * folded(sample, t))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_a_diffusers_unet() -> None:
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "add_attention": False}
    model = UNet2DModel(sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, **blocks).eval()
    mtq.quantize(model, fast_config(), FAMILIES["unet"].forward_loop())
    mtq.fold_weight(model)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    frames = 0
    for arguments in FAMILIES["unet"].data(seed=9):
        assert torch.equal(compiled(**arguments).sample, model(**arguments).sample)
        frames = frames or counter.frame_count
    assert counter.frame_count == frames


def test_inductor_computes_the_same(folded: nn.Module) -> None:
    """One quantizer by itself: whole models differ in the last bit of their convolutions."""
    quantizer = tdq.temporal_quantizers(folded)["conv1.input_quantizer"]
    compiled, x = torch.compile(quantizer, fullgraph=True), noise(3, 8, 8, 8)
    for time in TIMES[:2]:
        with at(folded, time):
            assert torch.equal(compiled(x), quantizer(x))


def test_without_folded_weights_only_modelopt_breaks_the_graph() -> None:
    model = quantized(TinyDenoiser().eval())
    explanation = torch._dynamo.explain(model)(noise(1, 3, 8, 8), torch.tensor(20.0))
    broken = [reason.user_stack[-1].filename for reason in explanation.break_reasons]
    assert broken
    assert all("modelopt/torch" in file for file in broken), broken
