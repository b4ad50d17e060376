"""For ``polygraphy run --compare-func-script``: the quantization noise of each step is the tolerance.

Polygraphy passes the results of the current run first, those of ``--load-outputs`` (the reference) second.
"""

from collections import OrderedDict
from collections.abc import Mapping
from functools import cache

import data_loader  # beside this file

from modelopt_tdq.compare import StepComparator


@cache
def comparator() -> StepComparator:
    """Knows the full-precision prediction of every step."""
    return StepComparator([prediction for _, prediction in data_loader.trajectory()])


def compare_outputs(result: Mapping, reference: Mapping) -> OrderedDict:
    """What Polygraphy calls once per step: name of each compared tensor to its verdict."""
    verdicts = comparator()(reference, result)
    step = comparator().step(reference["output"])
    for name, difference in verdicts.items():
        if name == "output" or not difference or difference.differing:
            print(f"step {step} | {'passed' if difference else 'FAILED'} | {name}: {difference}")
    return verdicts
