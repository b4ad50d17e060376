"""Benchmarks that ship with the package: the tables of the papers, measured here.

Read ``supplement`` first, then ``tables`` and ``qat_run``.
"""
