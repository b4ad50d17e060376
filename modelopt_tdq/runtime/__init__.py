"""Running exported models: sessions, engine builds, and what this machine can do.

Read ``sessions`` first, then ``build``; ``doctor`` examines the machine.
"""
