"""What the results of a demo come to: use it or not, and why, a line per fact."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["Verdict", "verdict"]

#: dB of the prediction over ModelOpt's static scales from which on it is worth a change.
_WORTH_DB = 1.0

#: dB that time itself has to add, everything else alike, so that the table is worth having.
_TIME_DB = 0.5

#: dB of the images below which they are others than those of full precision.
_IMAGES_DB = 25.0


@dataclass(frozen=True)
class Verdict:
    """A sentence, and the facts behind it."""

    headline: str
    facts: tuple[str, ...]


def verdict(results: dict[str, Any]) -> Verdict:
    """Of the rows of all recipes that have the three ways of choosing scales.

    Args:
        results: Of the demo.
    """
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for row in results["rows"]:
        groups.setdefault(row["label"], {})[row["variant"]] = row
    full = {label: group for label, group in groups.items() if {"max", "static", "tdq"} <= set(group)}
    if not full:
        return Verdict("No verdict: no recipe was calibrated in all three ways.", ())
    over_max = {label: _gain(group, "max", "sqnr_mean_db") for label, group in full.items()}
    by_time = {label: _gain(group, "static", "sqnr_mean_db") for label, group in full.items()}
    worth = [label for label, gain in over_max.items() if gain >= _WORTH_DB]
    moving = [label for label, gain in by_time.items() if gain >= _TIME_DB]
    if worth and moving:
        headline = (
            f"Use it, at {_listed(worth)}: scales over time and what comes with them beat ModelOpt's static ones."
        )
    elif worth:
        headline = (
            f'Use the recipe, at {_listed(worth)}; its scales need not follow the time ("bins": 1), '
            f"which adds less than {_TIME_DB:g} dB here."
        )
    else:
        headline = f"Not worth it here: ModelOpt's static scales are at most {max(over_max.values()):.1f} dB behind."
    facts = [
        f"Over ModelOpt's static scales: {_each(over_max)} dB of the prediction, "
        f"{_each({k: _gain(g, 'max', 'psnr_db') for k, g in full.items()})} dB of the images.",
        f"Time by itself, everything else alike: {_each(by_time)} dB of the prediction, "
        f"{_each({k: _gain(g, 'static', 'psnr_db') for k, g in full.items()})} dB of the images.",
    ]
    poor = [label for label, group in full.items() if float(group["tdq"]["psnr_db"]) < _IMAGES_DB]
    if poor:
        facts.append(
            f"Images at {_listed(poor)} stay below {_IMAGES_DB:g} dB: other ones than full precision's. Train."
        )
    facts += _costs(full.values())
    return Verdict(headline, tuple(facts))


def _gain(group: dict[str, dict[str, Any]], variant: str, key: str) -> float:
    ours, other = float(group["tdq"][key]), float(group[variant][key])
    return 0.0 if ours == other else ours - other  # both may be infinite


def _each(gains: dict[str, float]) -> str:
    return ", ".join(f"{label} {gain:+.1f}" for label, gain in gains.items())


def _listed(labels: list[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{', '.join(labels[:-1])} and {labels[-1]}"


def _costs(groups: Iterable[dict[str, dict[str, Any]]]) -> list[str]:
    """Of the one that was deployed."""
    found = []
    for group in groups:
        ours, static = group["tdq"], group["max"]
        if ours["openvino"] and static["openvino"]:
            found.append(
                f"OpenVINO takes {ours['openvino']['time_over_static']:.2f} of the time of the static graph, and is "
                f"{ours['openvino']['speedup_over_fp32']:.1f} times as fast as full precision."
            )
        if ours["engine"] and static["engine"]:
            found.append(
                f"TensorRT-RTX launches {ours['engine']['kernels']} kernels, {static['engine']['kernels']} with static "
                "scales; built, not run."
            )
    return found
