"""Calibration: one pass over the data, then a column of the table for every quantizer.

Read ``calibrate`` first: it calls ``collect`` (what is measured), ``columns`` (which scales follow from it) and
``protect`` (which rows of them are kept). ``statistics`` is what one quantizer saw; ``weights`` and ``others`` are for
the quantizers whose scales do not follow time; ``channel_smoothing`` comes between two runs of the data.
"""
