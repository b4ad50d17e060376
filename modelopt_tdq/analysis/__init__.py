"""Analysis of a model before anyone invests in quantizing it.

Read ``analyze`` first, then ``headroom``, ``sensitivity`` with ``backward``, and ``propose``.
"""

from modelopt_tdq.analysis.analyze import Analysis, analyze
from modelopt_tdq.analysis.headroom import LayerHeadroom
from modelopt_tdq.analysis.propose import Proposal
from modelopt_tdq.analysis.sensitivity import LayerSensitivity

__all__ = ["Analysis", "LayerHeadroom", "LayerSensitivity", "Proposal", "analyze"]
