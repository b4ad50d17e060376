"""Learning scales by quantization-aware training.

Read ``attach`` first, then ``quantizer``, ``schemes`` and ``learned``.
"""
