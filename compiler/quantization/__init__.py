"""Low-bit weights from float ones: rounding, calibration by running the IR, smoothing, second-order rounding."""
