"""What depends on the time alone: found by data dependence, kept in a table, looked up.

Read ``block`` first (found by ``search``, ``trace`` and ``tape``), then ``maintain``, ``table`` and ``runtime``.
"""
