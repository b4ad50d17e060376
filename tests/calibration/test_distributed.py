"""Several processes: the table is that of one process with all the data, and none is left waiting."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
import torch.distributed as dist
from support.models import TIMES, TinyDenoiser, calls, fast_config, loop, noise, quantized
from support.processes import results
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import modelopt_tdq as tdq
from modelopt_tdq import TdqError
from modelopt_tdq.calibration import output_error
from modelopt_tdq.core import together
from modelopt_tdq.core.distributed import gather

Data = Sequence[tuple[Tensor, Tensor]]

_OUTPUT = {"statistic": "output", "protect_steps": True, "replay_samples": 3}

_CONFIGS: dict[str, dict[str, Any]] = {
    "max": {"statistic": "max"},
    "mse": {"statistic": "mse"},
    "percentile": {"statistic": "percentile", "percentile": 99.0},
    "entropy": {"statistic": "entropy"},
    "offset": {"statistic": "mse", "asymmetric": True},
    "output": _OUTPUT,
}


def _share(rank: int) -> Data:
    """Six samples at each of four times; the last time is seen by the second process alone. All of it for -1."""
    everything = calls(samples=6, batch=2)
    first = [call for i, call in enumerate(everything) if i % 3 == 0 and float(call[1]) != TIMES[-1]]
    second = [call for call in everything if not any(call is other for other in first)]
    return {0: first, 1: second, -1: everything}[rank]


def _in_step(rank: int) -> Data:
    """As many calls in both processes, at other times: the second has four, the first, three of them. All for -1."""
    shares = [calls(4, 2, TIMES[:3], seed=50), calls(3, 2, TIMES[1:], seed=70)]
    return [*shares[0], *shares[1]] if rank < 0 else shares[rank]


class InStep(TinyDenoiser):
    """Its forward communicates, as that of sharded models does: what a call adds may depend on the other's call."""

    def __init__(self) -> None:
        super().__init__()
        self.mixes = False
        self.times: list[float] = []

    def forward(self, sample: Tensor, timestep: Tensor, context: Tensor | None = None) -> Tensor:  # type: ignore[override]
        self.times.append(float(torch.as_tensor(timestep).flatten()[0]))
        if together.active():
            total = sample.clone() if self.mixes else torch.zeros(1)
            dist.all_reduce(total)
            sample = total / dist.get_world_size() if self.mixes else sample
        return super().forward(sample, timestep, context)


def _columns(model: nn.Module) -> dict[str, Any]:
    table = tdq.scale_table(model)
    return {"timesteps": table.timesteps, "scale": table.scale, "offset": table.offset, "names": table.names}


def _calibrated(rank: int, **fields: Any) -> dict[str, Any]:
    return _columns(quantized(data=_share(rank), **fields))


def _communicating(rank: int, mixes: bool = False, **fields: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    model = InStep().eval()
    model.mixes = mixes
    quantized(model, calls(6) if mixes else _in_step(rank), **{**_OUTPUT, **fields})
    return {**_columns(model), "times": model.times}


def _others(rank: int) -> dict[str, Any]:
    """ModelOpt's own quantizers: per channel, and one that only the second process runs."""

    class Sometimes(TinyDenoiser):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
            if float(sample.mean()) > 5:
                self.conv2(torch.nn.functional.pad(sample, (0, 0, 0, 0, 0, 5)))
            return self.conv1(torch.nn.functional.pad(sample, (0, 0, 0, 0, 0, 5)))

    data = [*_share(rank), (torch.full((1, 3, 8, 8), 9.0), torch.tensor(TIMES[0]))][: None if rank else -1]
    config = fast_config()
    config["quant_cfg"].append({"quantizer_name": "*conv2.input_quantizer", "cfg": {"num_bits": 8, "axis": 1}})
    torch.manual_seed(0)
    sometimes = mtq.quantize(Sometimes().eval(), config, loop(data))
    config["quant_cfg"].append({"quantizer_name": "*mix.input_quantizer", "cfg": {"num_bits": 8, "axis": -1}})
    torch.manual_seed(0)
    always = mtq.quantize(TinyDenoiser().eval(), config, loop(_share(rank)))
    return {
        "sometimes": sometimes.conv2.input_quantizer.amax,
        "conv2": always.conv2.input_quantizer.amax,
        "mix": always.mix.input_quantizer.amax,
    }


def _smoothed(rank: int) -> dict[str, Any]:
    config = fast_config()
    config["algorithm"] = ["smoothquant", config["algorithm"]]
    torch.manual_seed(0)
    model = mtq.quantize(TinyDenoiser().eval(), config, loop(_share(rank)))
    return {**_columns(model), "pre_quant_scale": model.mix.input_quantizer.pre_quant_scale}


def _rounded(rank: int, **fields: Any) -> dict[str, Any]:
    """Weights rounded by what all processes' layers read."""
    everything = calls(samples=6, batch=1)
    data = everything if rank < 0 else everything[rank::2]
    model = quantized(data=data, weight_bits=4, rounding="compensated", **fields)
    weights = {
        name: layer.weight.detach() for name, layer in model.named_modules() if hasattr(layer, "weight_quantizer")
    }
    return {**_columns(model), **weights}


def _channels(rank: int, **fields: Any) -> dict[str, Any]:
    model = quantized(data=_share(rank), **fields)
    quantizers = tdq.temporal_quantizers(model).items()
    found = {name: q.channel_divisor for name, q in quantizers}
    found |= {f"{name}, shift": q.channel_shift for name, q in quantizers}
    return {**_columns(model), **{name: vector for name, vector in found.items() if vector is not None}}


def _layer_in_second(rank: int) -> dict[str, Any]:
    """A layer that one process never runs."""
    data = [*_share(rank), (torch.full((1, 3, 8, 8), 9.0), torch.tensor(TIMES[0]))][: None if rank else -1]

    class Lonely(TinyDenoiser):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
            hidden = torch.nn.functional.pad(sample, (0, 0, 0, 0, 0, 5))
            return self.conv2(hidden) if float(sample.mean()) > 5 else self.conv1(hidden)

    torch.manual_seed(0)
    return _columns(mtq.quantize(Lonely().eval(), fast_config(), loop(data)))


def _without_data(rank: int) -> dict[str, Any]:
    """The first process has none."""
    return _columns(quantized(data=[] if rank == 0 else _share(-1), **_OUTPUT))


def _analyzed(rank: int) -> dict[str, Any]:
    torch.manual_seed(0)
    found = tdq.analyze(
        InStep().eval(), loop(_in_step(rank)), fast_config(**_OUTPUT), target=44.0, probes=4, progress=False
    )
    return {
        "db": torch.tensor([found.static_db, found.temporal_db, found.max_db]),
        "headroom": {layer.name: torch.tensor([layer.loss_db, layer.sqnr_db]) for layer in found.layers},
        "sensitivity": {s.name: torch.tensor([s.activation_db, s.weight_db]) for s in found.sensitivity["temporal"]},
        "proposal": found.proposals["static"].layers,
    }


class NoWayBack(TinyDenoiser):
    """Its backward pass fails in the second process, as where memory is short."""

    fails = False

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
        if self.fails and torch.is_grad_enabled():
            raise RuntimeError("out of memory")
        return super().forward(sample, timestep)


def _analyzed_one_by_one(rank: int) -> dict[str, bool]:
    torch.manual_seed(0)
    model = NoWayBack().eval()
    model.fails = rank == 1
    found = tdq.analyze(model, loop(_in_step(rank)), fast_config(), probes=1, progress=False)
    return {layer.name: layer.estimated for layer in found.sensitivity["temporal"]}


def _two_sizes(rank: int) -> dict[str, Any]:
    """The first process has more samples of one size, both together have more of the other."""
    small, large = calls(samples=3, batch=1), calls(samples=5, batch=1)
    small = [(sample[..., :4, :4], time) for sample, time in small]
    shares = [[*small, *calls(samples=2, batch=1)], large[2:5] + large[7:10] + large[12:15] + large[17:20]]
    data = [*small, *large] if rank < 0 else shares[rank]
    return _columns(quantized(data=data, **{**_OUTPUT, "replay_samples": 20}))


def _temporal(rank: int) -> dict[str, Any]:
    """The first process has no data."""
    config = fast_config(method="tdq_temporal", iterations=3)
    torch.manual_seed(0)
    model = mtq.quantize(TinyDenoiser().eval(), config, loop([] if rank == 0 else _share(-1)))
    return {"output": model(noise(2, 3, 8, 8), torch.tensor(TIMES[1])), "features": model.time_embedding.state_dict()}


def _parallel(rank: int) -> dict[str, Any]:
    """The wrapper is what the user has: it is quantized, and called."""
    torch.manual_seed(0)
    model = TinyDenoiser().eval()
    parallel = DistributedDataParallel(model) if rank >= 0 else model
    mtq.quantize(parallel, fast_config(**_OUTPUT), loop(_in_step(rank)))
    time, x = torch.tensor(TIMES[1]), noise(2, 3, 8, 8)
    return {**_columns(model), "output": parallel(x, time) + model(x, time)}


def _sharded(rank: int, first: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = TinyDenoiser().eval()
    config = fast_config(**{**_OUTPUT, "weights": "mse"})
    if rank >= 0 and first:
        fully_shard(model)
    mtq.quantize(model, {**config, "algorithm": None})
    if rank >= 0 and not first:
        fully_shard(model.conv2)  # its own calls communicate
        fully_shard(model)
    mtq.calibrate(model, config["algorithm"], loop(_in_step(rank)))
    return {**_columns(model), "output": model(noise(2, 3, 8, 8), torch.tensor(TIMES[1]))}


class Pair(nn.Module):
    """Half of what the first layer makes depends on small inputs alone, the other half on large ones alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)
        self.first.weight.data[:16, 8:] = 0
        self.first.weight.data[16:, :8] = 0

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        scale = torch.ones(16)
        scale[8:] = 1 + 9 * timestep / 1000
        return self.second(torch.nn.functional.silu(self.first(sample * scale)))


def _tensor_parallel(rank: int) -> dict[str, Any]:
    """Each process has half of the channels between the layers; the data is the same."""
    torch.manual_seed(0)
    model = Pair().eval()
    if rank >= 0:
        plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
        parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    data = [(noise(6, 16, seed=i), torch.tensor(time)) for i, time in enumerate(TIMES)]
    quantized(model, data, **_OUTPUT)
    first, second = (layer.weight_quantizer.amax for layer in (model.first, model.second))
    return {**_columns(model), "first": torch.cat(gather(first)), "second": second}


_SCENARIOS: dict[str, Callable[[int], dict[str, Any]]] = {
    **{name: functools.partial(_calibrated, **fields) for name, fields in _CONFIGS.items()},
    "communicating, 1 sample": functools.partial(_communicating, replay_samples=1),
    "communicating, 3 samples": _communicating,
    "communicating, all samples": functools.partial(_communicating, replay_samples=20),
    "the same samples in both": functools.partial(_communicating, mixes=True),
    "quantizers of ModelOpt": _others,
    "smoothquant": _smoothed,
    "channels": functools.partial(_channels, channel_smoothing=0.5),
    "channels, chosen": functools.partial(
        _channels, channel_smoothing="auto", statistic="mse", activation_bits=4, asymmetric="auto"
    ),
    "channels, shifted": functools.partial(_channels, channel_smoothing="auto", channel_shift="auto"),
    "rounding": _rounded,
    "rounding, few bits": functools.partial(_rounded, activation_bits=4),
    "a layer in one only": _layer_in_second,
    "no data in one": _without_data,
    "two sizes": _two_sizes,
    "temporal features": _temporal,
    "data parallel": _parallel,
    "sharded, then quantized": functools.partial(_sharded, first=True),
    "tensor parallel": _tensor_parallel,
    "quantized, then sharded": functools.partial(_sharded, first=False),
}


class Failing(TinyDenoiser):
    """Raises at one of its calls."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
        self.left -= 1
        if self.left < 0:
            raise ValueError("tired")
        return super().forward(sample, timestep)


def _failures(rank: int) -> dict[str, str]:
    """By what goes wrong in the second process, or in both, what each says, and whether its model is as it was."""
    few, many = calls(times=TIMES[:2]), 10**9
    broken = [(torch.full_like(few[0][0], torch.nan), few[0][1]), *few[1:]]
    cases: dict[str, tuple[int, Data, dict[str, Any]]] = {
        "NaN": (many, broken if rank else few, {}),
        "in the loop": (2 if rank else many, few, {}),
        "output error": (len(few) + 1 if rank else many, few, _OUTPUT),
        "protection": (len(few) + 4 if rank else many, few, _OUTPUT),
        "no data in any": (many, [], {}),
        "too many times together": (many, calls(times=TIMES[2 * rank : 2 * rank + 2]), {"max_steps": 3}),
        "other settings": (many, few, {"statistic": "max" if rank else "mse"}),
        "other quantizers": (many, few, {}),
        "other sizes": (many, [(sample[..., : 8 - 2 * rank], time) for sample, time in few], {}),
    }
    found = {}
    for name, (after, data, fields) in cases.items():
        config = fast_config(**fields)
        if name == "other quantizers" and rank:
            config["quant_cfg"].append({"quantizer_name": "conv1.input_quantizer", "enable": False})
        if name == "other sizes":
            config["quant_cfg"].append({"quantizer_name": "conv1.input_quantizer", "cfg": {"num_bits": 8, "axis": 3}})
        model = mtq.quantize(Failing(many).eval(), {**config, "algorithm": None})
        before = [(type(m), m.training, dict(m.named_buffers(recurse=False))) for m in model.modules()]
        model.left = after
        try:
            mtq.calibrate(model, config["algorithm"], loop(data))
            found[name] = "calibrated"
        except (TdqError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
        after_ = [(type(m), m.training, dict(m.named_buffers(recurse=False))) for m in model.modules()]
        found[f"{name}: as before"] = str(str(before) == str(after_))
    return found


def _refused_when_sharded() -> dict[str, str]:
    model = TinyDenoiser().eval()
    fully_shard(model)
    tried: dict[str, Callable[[], Any]] = {
        "analysis": lambda: tdq.analyze(model, loop(calls()), fast_config()),
        "temporal features": lambda: mtq.quantize(model, fast_config(method="tdq_temporal"), loop(calls())),
    }
    found = {}
    for name, attempt in tried.items():
        with pytest.raises(TdqError) as error:
            attempt()
        found[name] = str(error.value)
    return found


_ALL = {**_SCENARIOS, "analysis": _analyzed, "no way back": _analyzed_one_by_one}


def _two(rank: int) -> dict[str, Any]:
    output_error._PROBE_ELEMENTS = 1 << 11  # several calls of a layer for all its candidates, as in large models
    found: dict[str, Any] = {"failures": _failures(rank)}  # and all that follows works
    found["refused"] = _refused_when_sharded()
    return found | {name: run(rank) for name, run in _ALL.items()}


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results(_two, 2, tmp_path_factory.mktemp("two"))


def _equal(found: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(_equal(found[key], value) for key, value in expected.items())
    return torch.equal(found, expected) if isinstance(expected, Tensor) else bool(found == expected)


@pytest.mark.parametrize("name", _SCENARIOS)
def test_two_processes_agree_with_one(processes: list[dict[str, Any]], name: str) -> None:
    expected = _SCENARIOS[name](-1)
    expected.pop("times", None)
    for found in processes:
        for key, value in expected.items():
            assert _equal(found[name][key], value), key


@pytest.mark.parametrize("name", [name for name in _SCENARIOS if name.startswith("communicating")])
def test_all_make_the_same_calls_in_the_same_order(processes: list[dict[str, Any]], name: str) -> None:
    first, second = (found[name]["times"] for found in processes)
    recorded = len(_in_step(0))
    assert first[:recorded] != second[:recorded]  # each has its own data
    assert first[recorded:] == second[recorded:]
    assert set(first[recorded:]) == set(TIMES)


def test_analysis_agrees_with_one(processes: list[dict[str, Any]]) -> None:
    expected = _analyzed(-1)
    first, second = (found["analysis"] for found in processes)
    assert _equal(first, second)
    assert first["proposal"] == expected["proposal"] != ()
    assert first["headroom"].keys() == expected["headroom"].keys()
    # batches of other sizes round differently, which shows where the noise is 60 dB below the signal
    torch.testing.assert_close(first["db"], expected["db"], rtol=0, atol=1e-3)
    for part in ("headroom", "sensitivity"):
        for name, value in expected[part].items():
            torch.testing.assert_close(first[part][name], value, rtol=0, atol=1e-3)


def test_without_backward_passes_in_one_there_are_none_in_any(processes: list[dict[str, Any]]) -> None:
    first, second = (found["no way back"] for found in processes)
    assert first == second
    assert first
    assert not any(first.values())


_REASONS = {
    "NaN": "TdqError: forward_loop = 'conv1.input_quantizer': the input of this quantizer held NaN",
    "in the loop": "ValueError: tired",
    "output error": "ValueError: tired",
    "protection": "ValueError: tired",
}


@pytest.mark.parametrize("name", _REASONS)
def test_what_fails_in_one_process_fails_in_all(processes: list[dict[str, Any]], name: str) -> None:
    first, second = (found["failures"][name] for found in processes)
    assert second.startswith(_REASONS[name])
    assert first.startswith(f"TdqError: rank = 1: this process failed, and with it all others: {_REASONS[name]}")


_SAME = {
    "no data in any": "it never called the model",
    "too many times together": "max_steps = 3: forward_loop visits more different times",
    "other settings": "algorithm = 'statistic': it is 'mse' in the process of rank 0, and 'max' in that of rank 1",
    "other quantizers": "'conv1.input_quantizer': it is (8, None, None) in the process of rank 0, and nothing in",
    "other sizes": "forward_loop = 'conv1.input_quantizer': its activation has other sizes in other processes",
}


@pytest.mark.parametrize("name", _SAME)
def test_what_cannot_be_brought_together_is_refused_in_all(processes: list[dict[str, Any]], name: str) -> None:
    for found in processes:
        assert found["failures"][name].startswith("TdqError: ")
        assert _SAME[name] in found["failures"][name]


def test_a_failure_leaves_the_models_as_they_were(processes: list[dict[str, Any]]) -> None:
    for found in processes:
        assert {value for key, value in found["failures"].items() if key.endswith("as before")} == {"True"}


def test_what_needs_whole_parameters_is_refused(processes: list[dict[str, Any]]) -> None:
    for found in processes:
        for message in found["refused"].values():
            assert "its parameters are spread over processes" in message
            assert "before `fully_shard`" in message


def test_distributed_data_parallel(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = quantized()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("conv" in name or "mix" in name)
        parallel = DistributedDataParallel(model)
        for time in TIMES:
            assert torch.equal(parallel(noise(2, 3, 8, 8), time), model(noise(2, 3, 8, 8), time))
        parallel(noise(2, 3, 8, 8), torch.tensor(TIMES[:2])).square().sum().backward()
        assert model.get_submodule("conv1").weight.grad is not None
        state = nn.Module.state_dict(parallel)
        assert "module.conv1.input_quantizer._scale_bits" in state
    finally:
        dist.destroy_process_group()
