"""What makes the scale of a time while it is learned: a table, an MLP, or the activation itself.

Read ``source`` first, then ``table``, ``mlp`` and ``dynamic``; ``build`` makes one of a description.
"""
