"""Several processes: the table is that of one process with all the data, and none is left waiting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
import torch.distributed as dist
from support.models import TIMES, TinyDenoiser, calls, fast_config, loop, noise, quantized
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import modelopt_tdq as tdq
from modelopt_tdq import TdqError

_CONFIGS: dict[str, dict[str, Any]] = {
    "max": {"statistic": "max"},
    "mse": {"statistic": "mse"},
    "percentile": {"statistic": "percentile", "percentile": 99.0},
    "entropy": {"statistic": "entropy"},
    "offset": {"statistic": "mse", "asymmetric": True},
    "output": {"statistic": "output", "protect_steps": True, "replay_samples": 3},
}


class Sometimes(TinyDenoiser):
    """Runs one of its layers only for samples of a large mean: one process may never see it run."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        if float(sample.mean()) > 5:
            self.conv2(torch.nn.functional.pad(sample, (0, 0, 0, 0, 0, 5)))
        return super().forward(sample, timestep)


def _share(rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Six samples at each of four times; the last time is seen by the second process alone."""
    everything = calls(samples=6, batch=2)
    first = [call for i, call in enumerate(everything) if i % 3 == 0 and float(call[1]) != TIMES[-1]]
    second = [call for call in everything if not any(call is other for other in first)]
    return {0: first, 1: second, -1: everything}[rank]


def _calibrated(rank: int, **fields: Any) -> dict[str, Any]:
    table = tdq.scale_table(quantized(data=_share(rank), **fields))
    return {"timesteps": table.timesteps, "scale": table.scale, "offset": table.offset, "names": table.names}


def _broken_in_second(rank: int) -> str:
    data = _share(rank)
    if rank == 1:
        data[1] = (torch.full_like(data[1][0], torch.nan), data[1][1])
    try:
        quantized(data=data)
    except TdqError as error:
        return error.problem
    return "calibrated"


def _layer_in_second(rank: int) -> tuple[str, ...]:
    data = _share(rank)
    if rank == 1:
        data.append((torch.full((1, 3, 8, 8), 9.0), torch.tensor(TIMES[0])))

    class Lonely(Sometimes):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            hidden = torch.nn.functional.pad(sample, (0, 0, 0, 0, 0, 5))
            return self.conv2(hidden) if float(sample.mean()) > 5 else self.conv1(hidden)

    torch.manual_seed(0)
    model = mtq.quantize(Lonely().eval(), fast_config(), loop(data))
    return tdq.scale_table(model).names


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[str, Any] = {name: _calibrated(rank, **fields) for name, fields in _CONFIGS.items()}
    found["broken in second"] = _broken_in_second(rank)
    found["layer in second"] = _layer_in_second(rank)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gloo")
    torch.multiprocessing.spawn(_process, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", _CONFIGS)
def test_two_processes_agree_with_one(processes: list[dict[str, Any]], name: str) -> None:
    expected = _calibrated(-1, **_CONFIGS[name])
    for found in processes:
        assert found[name]["names"] == expected["names"]
        for field in ("timesteps", "scale"):
            assert torch.equal(found[name][field], expected[field]), field
        offset = expected["offset"]
        assert found[name]["offset"] is None if offset is None else torch.equal(found[name]["offset"], offset)


def test_what_fails_in_one_process_fails_in_all(processes: list[dict[str, Any]]) -> None:
    assert processes[0]["broken in second"] == "calibration failed in another process"
    assert "NaN" in processes[1]["broken in second"]


def test_a_layer_that_one_process_never_runs(processes: list[dict[str, Any]]) -> None:
    assert processes[0]["layer in second"] == processes[1]["layer in second"]
    assert processes[0]["layer in second"] == ("conv1.input_quantizer", "conv2.input_quantizer")


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
