"""Layers that look their output up: what they give, when they run after all, and that nothing else changes."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.quantization.nn import QuantModule
from safetensors.torch import load_file, save_file
from support.models import SMALL_UNET, TIMES, TinyDenoiser, calls, fast_config, loop, noise
from support.temporal import UPSTREAM, head_names, make_table, unet_table
from support.unchanged import picture, same
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import modelopt_tdq as tdq
from modelopt_tdq import TdqError
from modelopt_tdq.model.timestep import CurrentTimestep, find_timestep
from modelopt_tdq.temporal_features.runtime import (
    FEATURES,
    feature_table,
    free_modules,
    has_features,
    install_features,
    remove_features,
    restore_features,
    temporal_features,
)
from modelopt_tdq.temporal_features.table import FeatureTable
from modelopt_tdq.training.attention import make_attention_trainable

UNET = SMALL_UNET
BETWEEN = 437.0


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def _full_precision() -> nn.Module:
    torch.manual_seed(0)
    return UNET.make().eval()


@functools.cache
def _table(outside: Any = "nearest", bits: int | None = 8) -> tuple[FeatureTable, dict[str, tuple[int, ...]]]:
    return unet_table(_full_precision(), UNET.data()[0], outside, bits)


@pytest.fixture(scope="module")
def quantized() -> nn.Module:
    """Everything is quantized, the time MLP and the heads too."""
    return mtq.quantize(_full_precision(), fast_config(high_precision=()), UNET.forward_loop())


def _with_features(quantized: nn.Module, outside: Any = "nearest", bits: int | None = 8) -> nn.Module:
    model = copy.deepcopy(quantized)
    install_features(model, *_table(outside, bits), "timestep")
    return model


def _break_layers(model: nn.Module) -> None:
    """What must not run gives NaN if it does."""
    for name in [*head_names(model), *UPSTREAM]:
        model.get_submodule(name).weight.fill_(torch.nan)


def _by_hooks(quantized: nn.Module, table: FeatureTable, time: Tensor) -> nn.Module:
    """The same by other means: the layers run, and their outputs are exchanged."""
    model = copy.deepcopy(quantized)
    for name in table.features:
        found = table.lookup(name, time)

        def exchange(module: nn.Module, args: Any, output: Tensor, found: Tensor = found) -> Tensor:
            return found.expand_as(output).to(output.dtype)

        model.get_submodule(name).register_forward_hook(exchange)
    return model


@pytest.mark.parametrize(("outside", "bits"), [("nearest", None), ("nearest", 4), ("linear", 8), ("linear", None)])
def test_the_model_computes_with_the_rows_and_nothing_upstream_runs(
    quantized: nn.Module, outside: Any, bits: int | None
) -> None:
    model, (table, _) = _with_features(quantized, outside, bits), _table(outside, bits)
    _break_layers(model)
    upstream: list[Tensor] = []
    for name in UPSTREAM:
        model.get_submodule(name).register_forward_hook(lambda module, args, output: upstream.append(output))
    sample = noise(2, 3, 8, 8, seed=5)
    times = [*TIMES, BETWEEN, 0.0, 1000.0]
    for time in [*(torch.tensor(t) for t in times), torch.tensor([BETWEEN]), torch.tensor([300.0, BETWEEN])]:
        expected = _by_hooks(quantized, table, time)(sample, time).sample
        assert torch.equal(model(sample, time).sample, expected), time
    assert len({float(model(sample, torch.tensor(t)).sample.sum()) for t in times[:4]}) == 4
    assert all(not bool(output.any()) and output.shape == (2, 32) for output in upstream)


def test_exact_computes_where_a_time_is_no_row(quantized: nn.Module) -> None:
    model, (table, _) = _with_features(quantized, "exact"), _table("exact")
    sample = noise(2, 3, 8, 8, seed=5)

    def layer_runs(time: Tensor) -> int:
        runs: list[nn.Module] = []
        layers = [model.get_submodule(name).input_quantizer for name in head_names(model)]
        hooks = [layer.register_forward_hook(lambda module, *_: runs.append(module)) for layer in layers]
        model(sample, time)
        for hook in hooks:
            hook.remove()
        return len(runs)

    row, other = torch.tensor(600.0), torch.tensor(BETWEEN)
    assert torch.equal(model(sample, row).sample, _by_hooks(quantized, table, row)(sample, row).sample)
    assert torch.equal(model(sample, other).sample, quantized(sample, other).sample)
    assert (layer_runs(row), layer_runs(other), layer_runs(row)) == (0, len(head_names(model)), 0)
    # a batch with both: each sample gets what it would get in such a batch by itself
    mixed = torch.tensor([600.0, BETWEEN])
    found = model(sample, mixed).sample
    looked_up = _by_hooks(quantized, table, row)(sample, torch.tensor([600.0, 600.0])).sample
    computed = quantized(sample, torch.tensor([BETWEEN, BETWEEN])).sample
    torch.testing.assert_close(found[0], looked_up[0])
    torch.testing.assert_close(found[1], computed[1])
    assert not torch.allclose(found[0], quantized(sample, mixed).sample[0], atol=1e-5)


def test_in_training_mode_too_the_features_are_looked_up(quantized: nn.Module) -> None:
    model = _with_features(quantized)
    make_attention_trainable(model)
    expected = model(**UNET.data()[1]).sample
    with torch.enable_grad():
        found = model.train()(**UNET.data()[1]).sample
        found.square().sum().backward()
    torch.testing.assert_close(found, expected)
    frozen = {*head_names(model), *UPSTREAM}
    for name in frozen:
        assert model.get_submodule(name).weight.grad is None
    assert model.get_submodule("conv_in").weight.grad.any()


class Head(nn.Module):
    """One layer that is looked up, called as the test likes."""

    def __init__(self, layer: nn.Module, batch_factor: int = 1) -> None:
        super().__init__()
        self.layer, self.batch_factor = layer, batch_factor

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.layer(sample.repeat_interleave(self.batch_factor, 0))


def _head(shape: tuple[int, ...] = (4,), factor: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor]:
    model = Head(nn.Linear(3, 4), factor).eval().to(dtype)
    values = torch.randn(3, *shape)
    install_features(model, make_table({"layer": values}, [0.0, 5.0, 9.0], bits=None), {}, "timestep")
    return model, values


def test_times_and_batches() -> None:
    model, values = _head()
    assert torch.equal(model(torch.ones(2, 3), torch.tensor(5)), values[[1, 1]])
    assert torch.equal(model(torch.ones(2, 3), torch.tensor([9.0, 0.0])), values[[2, 0]])
    frames, values = _head(factor=3)
    assert torch.equal(frames(torch.ones(2, 3), torch.tensor([9.0, 0.0])), values[[2, 2, 2, 0, 0, 0]])
    tokens, values = _head((1, 4))
    assert torch.equal(tokens(torch.ones(2, 1, 3), torch.tensor(9.0)), values[[2, 2]])
    with pytest.raises(TdqError, match="3 times cannot be matched"):
        model(torch.ones(2, 3), torch.tensor([9.0, 0.0, 5.0]))


def test_the_output_has_memory_of_its_own() -> None:
    model, values = _head()
    model(torch.ones(1, 3), torch.tensor(5.0)).add_(1)
    model(torch.ones(2, 3), torch.tensor(5.0)).add_(1)
    assert torch.equal(model(torch.ones(1, 3), torch.tensor(5.0)), values[[1]])


def test_the_dtype_is_the_one_that_the_layer_returns() -> None:
    x, time = torch.ones(2, 3), torch.tensor(5.0)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        model, values = _head(dtype=dtype)
        assert torch.equal(model(x.to(dtype), time), values[[1, 1]].to(dtype))
    model, values = _head()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert torch.equal(model(x, time), values[[1, 1]].to(dtype))
            assert nn.Linear(3, 4)(x).dtype == dtype
            assert model(x.double(), time).dtype == torch.float64
    embedding = Head(nn.Embedding(10, 4)).eval().half()
    install_features(embedding, make_table({"layer": values}, [0.0, 5.0, 9.0], bits=None), {}, "timestep")
    assert embedding(torch.tensor([1, 2]), time).dtype == torch.float16


def test_half_precision_leaves_the_table_as_it_is(quantized: nn.Module) -> None:
    for bits in (None, 8):
        model, (table, _) = _with_features(quantized, bits=bits), _table(bits=bits)
        for converted in (model.half(), model.to(torch.bfloat16), model.float()):
            found = feature_table(converted)
            assert all(torch.equal(found.features[n].dense(), f.dense()) for n, f in table.features.items())
            assert torch.equal(found.timesteps, table.timesteps)
    coarse = {name: feature.dense().half() for name, feature in table.features.items()}
    install_features(model, make_table(coarse, sorted(TIMES), bits=None), {}, "timestep")
    assert {b.dtype for n, b in temporal_features(model).named_buffers() if "data" in n} == {torch.int16}
    assert all(torch.equal(feature_table(model).features[n].dense(), v.float()) for n, v in coarse.items())


def test_a_copy_has_its_own_features_and_its_own_time(quantized: nn.Module) -> None:
    model = _with_features(quantized)
    twin = copy.deepcopy(model)
    sample = noise(1, 3, 8, 8)
    before = model(sample, torch.tensor(20.0)).sample
    # each time that the copy calls its head, the original knows none
    states: list[bool] = []
    head = twin.get_submodule(head_names(twin)[0])
    handle = head.register_forward_hook(
        lambda *_: states.extend(find_timestep(one).value is not None for one in (twin, model)),
    )
    twin(sample, torch.tensor(900.0))
    handle.remove()
    assert states == [True, False]
    for part in (temporal_features(twin)._timestep, twin.get_submodule(head_names(twin)[0])._tdq_features._timestep):
        assert isinstance(part, CurrentTimestep)
        assert part is find_timestep(twin)
    remove_features(twin)
    assert torch.equal(model(sample, torch.tensor(20.0)).sample, before)
    assert has_features(model)


def test_removing_leaves_no_trace(quantized: nn.Module) -> None:
    model = copy.deepcopy(quantized)
    model(**UNET.data()[0])
    before = picture(model)
    for outside in ("nearest", "exact"):
        install_features(model, *_table(outside), "timestep")
        assert isinstance(model.get_submodule(head_names(model)[0]), QuantModule)
        remove_features(model)
        after = picture(model)
        assert after.keys() == before.keys()
        assert all(same(before[name], after[name]) for name in before)
    assert not has_features(model)


def test_installing_again_replaces(quantized: nn.Module) -> None:
    model = _with_features(quantized, "exact")
    install_features(model, *_table("linear", 4), "timestep")
    assert feature_table(model).outside == "linear"
    depth = [kind for kind in type(model.get_submodule(head_names(model)[0])).__mro__ if kind.__name__ == "LookedUp"]
    assert len(depth) == 1
    remove_features(model)
    assert torch.equal(model(**UNET.data()[0]).sample, quantized(**UNET.data()[0]).sample)


def test_freed_layers_are_gone_from_the_state_dict(quantized: nn.Module) -> None:
    model = _with_features(quantized)
    columns = len(tdq.scale_table(model).names)
    expected = model(**UNET.data()[1]).sample
    size = sum(v.numel() for v in model.state_dict().values())
    layers = [model.get_submodule(name) for name in [*head_names(model), *UPSTREAM]]
    count = sum(p.numel() for layer in layers for p in layer.parameters())
    assert free_modules(model) == 4 * count
    assert size - sum(v.numel() for v in model.state_dict().values()) == count
    assert all(p.numel() == 0 for layer in layers for p in layer.parameters())
    assert torch.equal(model(**UNET.data()[1]).sample, expected)
    assert len(tdq.scale_table(model).names) == columns - len(layers)
    mtq.fold_weight(model)
    assert torch.equal(model(**UNET.data()[1]).sample, expected)
    assert free_modules(model) == 0
    table, superseded = _table()
    for refused in (
        lambda: remove_features(model),
        lambda: install_features(model, _table("exact")[0], superseded, "timestep"),
        lambda: install_features(model, table, {}, "timestep"),
    ):
        with pytest.raises(TdqError, match="were dropped"):
            refused()
    assert torch.equal(model(**UNET.data()[1]).sample, expected)
    install_features(model, *_table("linear", 4), "timestep")
    assert not torch.equal(model(**UNET.data()[1]).sample, expected)
    install_features(model, table, superseded, "timestep")
    assert torch.equal(model(**UNET.data()[1]).sample, expected)
    assert temporal_features(model).description["freed"]


def test_weights_that_another_layer_shares_stay() -> None:
    class Tied(Head):
        def __init__(self) -> None:
            super().__init__(nn.Linear(3, 4))
            self.other = nn.Linear(3, 4)
            self.other.weight = self.layer.weight

    model = Tied().eval()
    weight = model.other.weight.clone()
    install_features(model, make_table({"layer": torch.ones(1, 4)}, [0.0]), {}, "timestep")
    assert free_modules(model) == 4 * 4  # the bias
    assert torch.equal(model.other.weight, weight)


def test_exact_keeps_its_layers(quantized: nn.Module) -> None:
    with pytest.raises(TdqError, match="need the layers"):
        free_modules(_with_features(quantized, "exact"))


@pytest.mark.parametrize("freed", [False, True])
@pytest.mark.parametrize("outside", ["nearest", "linear", "exact"])
def test_restored_from_a_description_and_a_state_dict(
    quantized: nn.Module, tmp_path: Path, outside: Any, freed: bool
) -> None:
    if outside == "exact" and freed:
        return
    model = _with_features(quantized, outside, None if outside == "exact" else 8)
    if freed:
        free_modules(model)
    mto.save(model, tmp_path / "model.pt")
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    description = json.loads(json.dumps(temporal_features(model).description))

    restored = _full_precision()
    mto.restore_from_modelopt_state(restored, mto.modelopt_state(model))
    features = restore_features(restored, description)
    assert features.awaits_state
    with pytest.raises(TdqError, match="their values were not loaded"):
        feature_table(restored)
    assert bool(features.look_up(0, torch.tensor([20.0])).isnan().all())
    restored.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    for arguments in [*UNET.data(), {**UNET.data()[0], "timestep": torch.tensor(BETWEEN)}]:
        assert torch.equal(restored(**arguments).sample, model(**arguments).sample)
    assert feature_table(restored).metadata == feature_table(model).metadata
    if freed:
        with pytest.raises(TdqError, match="were dropped"):
            remove_features(restored)


def test_on_the_meta_device(quantized: nn.Module) -> None:
    model = _with_features(quantized)
    free_modules(model)
    with torch.device("meta"):
        empty = UNET.make().eval()
    features = restore_features(empty, temporal_features(model).description)
    assert features.awaits_state
    assert all(buffer.is_meta for buffer in features.buffers())
    assert all(p.is_meta and p.numel() == 0 for p in empty.get_submodule(UPSTREAM[0]).parameters())


@pytest.mark.parametrize("outside", ["linear", "exact"])
def test_one_compiled_graph_serves_every_time(outside: Any) -> None:
    torch._dynamo.reset()
    values = torch.randn(3, 8)
    model = TinyDenoiser().eval()
    mtq.quantize(model, fast_config(high_precision=()), loop(calls()))
    mtq.fold_weight(model)
    table = make_table({"time_embedding": values}, [20.0, 300.0, 900.0], outside)
    install_features(model, table, {}, "timestep")
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    sample, frames = noise(2, 3, 8, 8), 0
    for time in (*TIMES, BETWEEN, 0.0):
        assert torch.equal(compiled(sample, torch.tensor(time)), model(sample, torch.tensor(time)))
        frames = frames or counter.frame_count
    assert counter.frame_count == frames
    torch._dynamo.reset()


_ONE = make_table({"layer": torch.ones(1, 4)}, [0.0])

_REFUSED: dict[str, tuple[str, Any]] = {
    "a layer that is not there": (
        "features",
        lambda m: install_features(m, make_table({"head": torch.ones(1, 4)}, [0.0]), {}, "timestep"),
    ),
    "the root": ("features", lambda m: install_features(m, _ONE, {"": (4,)}, "timestep")),
    "superseded that is not there": ("features", lambda m: install_features(m, _ONE, {"up": (4,)}, "timestep")),
    "both": ("superseded", lambda m: install_features(m, _ONE, {"layer": (4,)}, "timestep")),
    "another width": (
        "features",
        lambda m: install_features(m, make_table({"layer": torch.ones(1, 5)}, [0.0]), {}, "timestep"),
    ),
    "no such argument": ("timestep_argument", lambda m: install_features(m, _ONE, {}, "sigma")),
    "metadata that is no JSON": (
        "metadata",
        lambda m: install_features(m, make_table({"layer": torch.ones(1, 4)}, [0.0], x=object()), {}, "timestep"),
    ),
    "nothing to remove": ("model", remove_features),
    "nothing to read": ("model", feature_table),
    "nothing to free": ("model", free_modules),
}


@pytest.mark.parametrize("case", _REFUSED)
def test_what_cannot_be_used_is_refused_and_changes_nothing(case: str) -> None:
    field, call = _REFUSED[case]
    model = Head(nn.Linear(3, 4)).eval()
    before = picture(model)
    with pytest.raises(TdqError) as error:
        call(model)
    assert error.value.field == field
    assert error.value.cure
    after = picture(model)
    assert after.keys() == before.keys()
    assert all(same(before[name], after[name]) for name in before)


def test_a_forward_that_was_replaced_on_the_layer_is_refused() -> None:
    model = Head(nn.Linear(3, 4)).eval()
    own = model.layer.forward
    model.layer.forward = lambda x: own(x) + 1
    with pytest.raises(TdqError, match="its forward was replaced"):
        install_features(model, _ONE, {}, "timestep")


def test_a_part_of_the_model_called_by_itself_says_so() -> None:
    model, _ = _head()
    with pytest.raises(TdqError, match="outside of any call of the model"):
        model.layer(torch.ones(1, 3))


def test_the_repr_says_what_is_there() -> None:
    model, _ = _head()
    assert "TemporalFeatures(features=1, rows=3, outside=nearest)" in repr(model)
    assert FEATURES in dict(model.named_children())
