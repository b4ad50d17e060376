"""The laboratory: demo, benchmarks, report, image metrics; only the command line and the examples use it.

Read ``trajectories`` and ``judge`` first, then ``demo.stages``.
"""
