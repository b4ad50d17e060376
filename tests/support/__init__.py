"""What several tests need: tiny models, inputs, calibration loops."""
