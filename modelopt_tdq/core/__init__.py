"""Plain tensors, no ModelOpt: the arithmetic, the table of scales, what is measured, what is written.

Read ``fake_quant`` first, then ``scales``, ``schedule`` and ``table``. ``together`` and ``distributed`` are about
several processes.
"""
