"""What depends on the time alone: found by data dependence, kept in a table, looked up.

Read ``block`` first. It is found by ``search`` from calls that differ (``variation``, ``varied_calls``, ``state``):
each is recorded (``trace``, ``tape``), followed (``dataflow``) and compared with the first (``numbering``,
``agreement``). ``proof`` says for which calls that holds, ``guard`` looks at others.
Then ``maintain``, ``table`` and ``runtime``.
"""
