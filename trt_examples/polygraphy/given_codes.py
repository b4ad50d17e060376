"""Inputs for the run layer by layer: those of ``data_loader.py``, and the codes that the reference had at that step."""

from collections.abc import Iterator

import data_loader  # beside this file
from polygraphy.comparator import RunResults

from modelopt_tdq.compare import given_codes

REFERENCE = "reference.json"  # of --save-outputs


def load_data() -> Iterator[data_loader.Feeds]:
    """What Polygraphy calls: one mapping from input name to array per step."""
    ((_, results),) = RunResults.load(REFERENCE)
    for feeds, reference in zip(data_loader.load_data(), results, strict=True):
        yield {**feeds, **given_codes(reference)}
