"""All that touches a quantized model.

Read ``timestep`` first, then ``quantizer`` and ``model_table``. ``call``, ``recording``, ``batch_axis``, ``replay``
and ``replay_ranks`` are about calls of the model; ``select``, ``full_precision``, ``snapshot``, ``learning``,
``weight_fit``, ``intact`` and ``unquantized`` about its quantizers; ``place``, ``wrapped``, ``threads``, ``exchanged``
and ``saving`` about where it lives and what is done with it.
"""
