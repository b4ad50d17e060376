"""Four processes, each with its own samples, by everything that a recipe does: what one process gives.

To the last bit, scales and weights; but corrections are fitted to what layers give, and products of one sample and of a
batch round in other ways: by some 1e-6, seen on a CPU with one thread.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from support.models import TinyDenoiser, loop, noise
from support.places import back
from support.processes import results
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import modelopt_tdq as tdq
from modelopt_tdq import TdqError
from modelopt_tdq.model.stored_weight import at_rest, kept, replace_weight, whole

_TIMES = (900.0, 20.0)

#: Which samples a process has: its rank; -1 for all of them.
_Mode = Callable[[int], dict[str, Any]]


def _data(rank: int, samples: int = 8) -> Sequence[tuple[Tensor, Tensor]]:
    own = range(samples) if rank < 0 else range(rank, samples, 4)
    return [
        (noise(1, 3, 8, 8, seed=100 * step + i) * (1 + time / 300), torch.tensor(time))
        for step, time in enumerate(_TIMES)
        for i in own
    ]


def _config() -> dict[str, Any]:
    """Offsets, margin, smoothing that is chosen, rounding, protection, corrections over time."""
    config = tdq.recipe("w4a4")
    config["algorithm"] |= {"progress": False, "replay_samples": 4, "correction": "per_step"}
    return config


def _model(kind: type[nn.Module] = TinyDenoiser) -> nn.Module:
    torch.manual_seed(0)
    model: Any = kind().eval()
    model.conv_in.weight.data[0] *= 8  # a channel that costs all others their codes
    return model


def _state(model: nn.Module, called: nn.Module) -> dict[str, Any]:
    """All that calibration has made of ``model``, and what ``called`` gives."""
    with torch.no_grad():
        outputs = [called(noise(2, 3, 8, 8, seed=7), torch.tensor(time)) for time in (20.0, 450.0)]
    back(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    table, correction = tdq.scale_table(model), tdq.layer_correction(model)
    assert correction is not None
    return {
        "scales": [table.timesteps, table.scale, table.offset],
        "divisors": [q.channel_divisor for q in tdq.temporal_quantizers(model).values()],
        "weights": [whole(kept(m, name)).clone() for m in model.modules() for name in m._parameters],
        "corrections": [*correction.gain.values(), *correction.bias.values()],
        "outputs": outputs,
    }


def _own_samples(rank: int, kind: type[nn.Module] = TinyDenoiser) -> dict[str, Any]:
    model = mtq.quantize(_model(kind), _config(), loop(_data(rank)))
    return _state(model, model)


def _data_parallel(rank: int) -> dict[str, Any]:
    model = _model()
    parallel = DistributedDataParallel(model)
    mtq.quantize(parallel, _config(), loop(_data(rank)))
    return _state(model, parallel)


def _sharded(rank: int) -> dict[str, Any]:
    model = _model()
    fully_shard(model)
    mtq.quantize(model, _config(), loop(_data(rank)))
    return _state(model, model)


def _sharded_later(rank: int) -> dict[str, Any]:
    """Each layer by itself: its own calls communicate."""
    config = _config()
    model = mtq.quantize(_model(), {**config, "algorithm": None})
    for layer in model.children():
        fully_shard(layer)
    fully_shard(model)
    mtq.calibrate(model, config["algorithm"], loop(_data(rank)))
    return _state(model, model)


def _device_map(rank: int) -> dict[str, Any]:
    """Each process has the whole model, spread over memory and disk."""
    from accelerate import dispatch_model

    model = _model()
    where = {name: ("cpu", "disk")[i % 2] for i, (name, _) in enumerate(model.named_children())}
    dispatch_model(model, where, main_device="cpu", offload_dir=tempfile.mkdtemp(), force_hooks=True)
    mtq.quantize(model, _config(), loop(_data(rank)))
    return _state(model, model)


_MODES: dict[str, _Mode] = {
    "own samples": _own_samples,
    "data parallel": _data_parallel,
    "sharded": _sharded,
    "quantized, then sharded": _sharded_later,
    "device map": _device_map,
}


class Experts(TinyDenoiser):
    """Some samples take one layer, the others another one; in some calls, one of them does not run."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
        h = self.conv_in(sample) * (0.2 + timestep / 1000)
        first, out = sample.mean((1, 2, 3)) > 0, torch.zeros_like(h)
        for chosen, layer in ((first, self.conv1), (~first, self.conv2)):
            if chosen.any():
                out[chosen] = layer(h[chosen])
        return self.conv_out(torch.nn.functional.silu(self.mix(out.movedim(1, -1)).movedim(-1, 1)))


class Tired(TinyDenoiser):
    """Raises at one of its calls."""

    left = 10**9

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
        self.left -= 1
        if self.left < 0:
            raise ValueError("tired")
        return super().forward(sample, timestep)


def _failing(rank: int) -> list[str]:
    """What each process says when the third one raises: in the loop, and at several places of the replay."""
    said = []
    for after in (3, 25):  # in the loop; while calls are repeated
        model = _model(Tired)
        model.left = after if rank == 2 else 10**9
        with pytest.raises((TdqError, ValueError)) as error:
            mtq.quantize(model, _config(), loop(_data(rank)))
        said.append(f"{error.type.__name__}: {error.value}")
    return said


def _after_a_call(rank: int) -> dict[str, Tensor]:
    """What becomes of a weight that is replaced when a root still has the whole weights of its last call."""
    model = _model()
    fully_shard(model)
    model(noise(1, 3, 8, 8), torch.tensor(20.0))
    at_rest(model)
    before = whole(kept(model.mix))
    replace_weight(model.mix, 2 * before)
    model.reshard()
    return {"twice": 2 * before, "found": whole(kept(model.mix))}


def _four(rank: int) -> dict[str, Any]:
    found = {name: mode(rank) for name, mode in _MODES.items()}
    return found | {"experts": _own_samples(rank, Experts), "failing": _failing(rank), "after": _after_a_call(rank)}


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results(_four, 4, tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return _own_samples(-1)


def _equal(found: Any, expected: Any) -> bool:
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(_equal, found, expected))
    return torch.equal(found, expected) if isinstance(expected, Tensor) else bool(found == expected)


def test_one_process_does_all_of_it(one: dict[str, Any]) -> None:
    plain = _model()
    assert any(divisor is not None for divisor in one["divisors"])
    assert not _equal(one["weights"], [p for m in plain.modules() for p in m._parameters.values()])


@pytest.mark.parametrize("mode", _MODES)
@pytest.mark.filterwarnings("ignore:weights that accelerate keeps on disk change")
def test_all_have_what_one_process_has(processes: list[dict[str, Any]], one: dict[str, Any], mode: str) -> None:
    for found in processes:
        for part in ("scales", "divisors", "weights"):
            assert _equal(found[mode][part], one[part]), part
        for part in ("corrections", "outputs"):
            for value, expected in zip(found[mode][part], one[part], strict=True):
                torch.testing.assert_close(value, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_layers_that_run_in_some_processes_only(processes: list[dict[str, Any]]) -> None:
    first, *others = (found["experts"] for found in processes)
    for other in others:
        for part, expected in first.items():
            assert _equal(other[part], expected), part


def test_weights_of_a_sharded_root_stay_replaced(processes: list[dict[str, Any]]) -> None:
    assert all(torch.equal(found["after"]["found"], found["after"]["twice"]) for found in processes)


def test_all_say_why_one_failed(processes: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(processes):
        reason = "ValueError: tired" if rank == 2 else "TdqError: rank = 2: this process failed, and with it all others"
        assert all(said.startswith(reason) and "tired" in said for said in found["failing"])
