from typing import Any

import pytest
from small_results import row

from modelopt_tdq.lab.report.verdict import verdict


def results(over_max: float, by_time: float, psnr: float = 40.0, **deployed: Any) -> dict[str, Any]:
    values = {"max": 40.0 - over_max, "static": 40.0 - by_time, "tdq": 40.0}
    return {"rows": [row(variant=v, sqnr_mean_db=db, psnr_db=psnr, **deployed) for v, db in values.items()]}


@pytest.mark.parametrize(
    ("over_max", "by_time", "begins"),
    [
        (7.2, 0.8, "Use it, at W8A8:"),
        (7.2, 0.1, "Use the recipe, at W8A8; its scales need not follow the time"),
        (0.3, 0.3, "Not worth it here: ModelOpt's static scales are at most 0.3 dB behind."),
        (-1.0, -0.5, "Not worth it here"),
    ],
)
def test_what_it_says_first(over_max: float, by_time: float, begins: str) -> None:
    found = verdict(results(over_max, by_time))
    assert found.headline.startswith(begins)
    assert f"W8A8 {over_max:+.1f} dB of the prediction" in found.facts[0]
    assert f"W8A8 {by_time:+.1f} dB of the prediction" in found.facts[1]


def test_bad_images_and_costs_are_told() -> None:
    deployed = {
        "openvino": {"milliseconds": 1.0, "speedup_over_fp32": 1.5, "time_over_static": 1.02},
        "engine": {"kernels": 170},
    }
    facts = " ".join(verdict(results(5.0, 1.0, psnr=18.0, **deployed)).facts)
    assert "Images at W8A8 stay below 25 dB" in facts
    assert "OpenVINO takes 1.02 of the time" in facts
    assert "170 kernels, 170 with static scales; built, not run" in facts
    assert "Images" not in " ".join(verdict(results(5.0, 1.0)).facts[2:])


def test_equal_to_the_last_bit_is_no_gain() -> None:
    same = {"rows": [row(variant=v, sqnr_mean_db="inf", psnr_db="inf") for v in ("max", "static", "tdq")]}
    assert verdict(same).headline.startswith("Not worth it here")


def test_one_way_alone_has_no_verdict() -> None:
    assert verdict({"rows": [row(variant="max")]}).headline.startswith("No verdict")
