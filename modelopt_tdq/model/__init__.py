"""All that touches a quantized model.

Read ``timestep`` first, then ``quantizer`` and ``model_table``. ``call``, ``recording``, ``replay`` and
``replay_ranks`` are about calls of the model; ``select``, ``full_precision``, ``snapshot`` and ``learning``, about
its quantizers.
"""
