"""``modelopt-tdq bench gpu``: what can only be seen on a GPU, in a few minutes, in parts.

Read ``command`` first, then ``part``; ``lookup``, ``products``,
``model``, ``real_size`` and ``engines`` are the parts; ``graphs`` and ``engine_uses`` belong to the last.
"""
