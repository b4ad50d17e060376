"""The TensorRT plugin ``TdqScaleLookup``: from the time to all scales of a model, once per step."""
