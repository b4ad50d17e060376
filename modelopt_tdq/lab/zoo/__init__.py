"""The zoo: a tiny model of every class of diffusers that takes a time, to be quantized in a second.

Read ``classes`` first, then ``entry`` with ``inputs``; the files of entries follow, and ``catalogue`` has them all.
"""
