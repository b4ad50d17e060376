"""The TensorRT plugin ``TdqScaleLookup``: from the time to all scales of a model, once per step.

Read ``kernel`` first, then ``aot`` and ``compile``.
"""

from modelopt_tdq.plugin.aot import register

__all__ = ["register"]
