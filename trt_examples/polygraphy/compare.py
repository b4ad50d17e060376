"""For ``polygraphy run --compare-func-script``: outputs against the quantization noise, codes against rounding.

Polygraphy passes the results of the current run first, those of ``--load-outputs`` (the reference) second. It loads
this file anew for every step; what has to last is in ``data_loader.py``.
"""

from collections import OrderedDict
from collections.abc import Mapping

import data_loader  # beside this file


def compare_outputs(result: Mapping, reference: Mapping) -> OrderedDict:
    """Called once per step: name of each compared tensor to its verdict."""
    return data_loader.comparator(given=False)(reference, result)


def compare_layers(result: Mapping, reference: Mapping) -> OrderedDict:
    """The same, for a graph whose layers compute with the reference's codes."""
    return data_loader.comparator(given=True)(reference, result)
