"""Benchmarks that ship with the package: the tables of the papers, measured here."""
