"""The lookup kernel under Triton's interpreter, against NumPy and against the package's own definitions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.slow import slow_but

import modelopt_tdq.plugin.kernel
from modelopt_tdq.core.schedule import row_index
from modelopt_tdq.export.lookup import reference_scale
from modelopt_tdq.export.spec import ActivationSpec

pytest.importorskip("triton")

Array = np.ndarray[Any, Any]
SMALLEST_NORMAL = np.finfo(np.float32).tiny


class Case:
    """Times [B], a table [K, Q] and its times [K]; the kernel's own block sizes unless others are given."""

    def __init__(self, timestep: Any, timesteps: Any, table: Any, blocks: tuple[int, int] = (0, 0)) -> None:
        self.timestep, self.timesteps = np.asarray(timestep, np.float32), np.asarray(timesteps, np.float32)
        self.table, self.blocks = np.ascontiguousarray(table, np.float32), np.array(blocks)

    def oracle(self) -> tuple[Array, Array]:
        """s [B, Q] and s / s_ref [B, Q]."""
        times = self.timesteps.astype(np.float64)
        rows = np.searchsorted((times[1:] + times[:-1]) / 2, self.timestep.astype(np.float64), side="left")
        least = self.table.min(0)
        power = np.ldexp(np.float32(0.5), np.frexp(least)[1])
        reference = np.where(least >= SMALLEST_NORMAL, power, np.float32(1.0))
        return self.table[rows], self.table[rows] / reference


def _times(random: np.random.Generator, rows: int, kind: int) -> Array:
    """[K] whole numbers as DDPM has them, any numbers, or log-spaced ones like sigmas."""
    if kind == 0:
        return np.sort(random.choice(1000, rows, replace=False)).astype(np.float32)
    if kind == 1:
        return np.unique(random.uniform(0, 1000, rows).astype(np.float32))
    return np.geomspace(0.002, 80, rows).astype(np.float32)


def _asked(random: np.random.Generator, timesteps: Array, count: int) -> Array:
    """[B] times that matter: random, outside, rows, half-way points and the float32 numbers next to them."""
    half = ((timesteps[1:].astype(np.float64) + timesteps[:-1]) / 2).astype(np.float32)
    near = np.concatenate([timesteps, half])
    close = np.concatenate([near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))])
    span = timesteps[-1] - timesteps[0] + 1
    spread = random.uniform(timesteps[0] - span / 4, timesteps[-1] + span / 4, count).astype(np.float32)
    return np.where(random.random(count) < 0.5, random.choice(close, count), spread)


#: Of random cases: more than 10^6 pairs of a time and a column of a table; and a quarter of that.
MILLION, QUARTER = 16, 4


def _random_cases(number: int) -> dict[str, Case]:
    cases, random = {}, np.random.default_rng(0)
    for index in range(number):
        timesteps = _times(random, int(random.integers(2, 70)), index % 3)
        shape = (len(timesteps), int(random.integers(1500, 4000)))
        table = np.exp2(random.uniform(-20, 20, shape[1]) + random.uniform(0, 4, shape))
        cases[f"random{index}"] = Case(_asked(random, timesteps, 32), timesteps, table, (64, 4096))
    return cases


def _special_cases() -> dict[str, Case]:
    random = np.random.default_rng(1)
    neighbours = np.float32(512) + np.arange(-4, 5) * np.spacing(np.float32(256))
    powers = np.float32(2.0) ** np.arange(-20, 20, dtype=np.float32)
    powers = np.concatenate([powers, np.nextafter(powers, np.float32(0)), np.nextafter(powers, np.float32(9e9))])
    columns = {
        "negative": [-3.0, -1.0, -2.0],
        "mixed": [-1.0, 2.0, 3.0],
        "zero": [0.0, 1.0, 2.0],
        "all_zero": [0.0, 0.0, 0.0],
        "denormal": [1e-40, 1.0, 2.0],
        "smallest_normal": [SMALLEST_NORMAL, 1.0, 2.0],
        "largest": [3e38, 3.1e38, 3.2e38],
        "equal": [0.75, 0.75, 0.75],
    }
    table = np.array(list(columns.values()), np.float32).T
    small = np.exp2(random.uniform(-3, 3, (37, 70)))
    times = np.sort(random.uniform(0, 1000, 37)).astype(np.float32)
    whole = np.arange(0, 1000, 50)
    return {
        "one_row": Case([-1.0, 0.0, 500.0, 1e9], [500.0], small[:1]),
        "one_sample": Case([333.0], times, small),
        "eight_samples": Case(_asked(random, times, 8), times, small),
        "one_column": Case(_asked(random, times, 8), times, small[:, :1]),
        "whole_blocks": Case(_asked(random, times[:32], 8), times[:32], random.uniform(1, 9, (32, 128))),
        "one_more_than_blocks": Case(_asked(random, times[:33], 8), times[:33], random.uniform(1, 9, (33, 65))),
        "thousand_rows": Case(_asked(random, np.arange(1000), 8), np.arange(1000), random.uniform(1, 9, (1000, 3))),
        # two rows are equally near: the earlier one
        "ties": Case(whole[:-1] + 25, whole, random.uniform(1, 9, (20, 5))),
        # half-way points that are no float32 numbers
        "adjacent_floats": Case(np.repeat(neighbours, 2), neighbours, random.uniform(1, 9, (9, 5))),
        "outside": Case([-np.inf, -1e30, 1e30, np.inf], times, small),
        "columns": Case([0.0, 1.0, 2.0], [0.0, 1.0, 2.0], table),
        "powers_of_two": Case([0.0], [0.0], powers[None]),
    }


def run_interpreted(cases: dict[str, Case], folder: Path) -> dict[str, Array]:
    """Results of the kernel, by "case/scale" and "case/ratio"."""
    arrays = {f"{name}/{key}": value for name, case in cases.items() for key, value in vars(case).items()}
    np.savez(folder / "cases.npz", **arrays)
    script = Path(__file__).with_name("interpret_kernel.py")
    files = [modelopt_tdq.plugin.kernel.__file__, str(folder / "cases.npz"), str(folder / "results.npz")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, *files], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(np.load(folder / "results.npz"))


@pytest.fixture(scope="module", params=slow_but((QUARTER, MILLION), QUARTER))
def cases(request: pytest.FixtureRequest) -> dict[str, Case]:
    return {**_random_cases(request.param), **_special_cases()}


@pytest.fixture(scope="module")
def results(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Array]:
    return run_interpreted(cases, tmp_path_factory.mktemp("kernel"))


def test_a_million_pairs() -> None:
    assert sum(len(case.timestep) * case.table.shape[1] for case in _random_cases(MILLION).values()) >= 1_000_000


@pytest.mark.parametrize("name", [*_special_cases(), "random"])
def test_kernel_equals_numpy(cases: dict[str, Case], results: dict[str, Array], name: str) -> None:
    for case in [name] if name in cases else [n for n in cases if n.startswith(name)]:
        scale, ratio = cases[case].oracle()
        np.testing.assert_array_equal(results[f"{case}/scale"], scale, err_msg=case)
        np.testing.assert_array_equal(results[f"{case}/ratio"], ratio, err_msg=case)
        for output in ("scale", "ratio"):
            assert np.isnan(results[f"{case}/{output}_past_end"]).all()


def test_row_is_that_of_the_schedule(cases: dict[str, Case], results: dict[str, Array]) -> None:
    for name, case in cases.items():
        rows = row_index(torch.from_numpy(case.timestep), torch.from_numpy(case.timesteps))
        np.testing.assert_array_equal(results[f"{name}/scale"], case.table[rows.numpy()], err_msg=name)


def test_ratio_is_that_of_the_ratio_lowering(cases: dict[str, Case], results: dict[str, Array]) -> None:
    for name in [*[n for n in cases if n.startswith("random")][:6], "powers_of_two", "whole_blocks"]:
        case = cases[name]
        reference = [reference_scale(ActivationSpec("q", 8, column)) for column in case.table.T]
        assert (case.table.min(0) / reference >= 1).all()
        expected = results[f"{name}/scale"] / np.array(reference)
        np.testing.assert_array_equal(results[f"{name}/ratio"], expected, err_msg=name)


def test_positive_scales_have_ratios_from_one_on(cases: dict[str, Case], results: dict[str, Array]) -> None:
    for name in (n for n in cases if n.startswith("random")):
        assert (results[f"{name}/ratio"] >= 1).all()
