"""Calibration: from one pass over the data to a table of scales."""
