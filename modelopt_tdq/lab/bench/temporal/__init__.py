"""``modelopt-tdq bench temporal-features``: what maintaining the temporal features is worth.

Read ``run`` first, then ``measure``.
"""
