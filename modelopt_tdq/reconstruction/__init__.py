"""Learning rounding and scales block by block, from samples, without the training data.

Read ``reconstruct`` first, then ``learn``; ``cache`` and ``observe`` are about its data,
``resume`` and ``fingerprint`` about interruptions.
"""
