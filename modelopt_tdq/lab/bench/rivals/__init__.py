"""``modelopt-tdq bench rivals``: the quality of what people deploy today beside ours.

Read ``setting`` first: what all rows of a table share. Then ``rows``: the rows, each with its one function, from
``others`` or ``ours``; ``run`` makes, judges and keeps them, ``present`` writes the tables and the plot.
"""
