"""What produces the interval of each quantizer as a function of time, s(t), while a model learns."""
