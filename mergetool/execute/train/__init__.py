"""Training of merging coefficients on calibration data: DAM."""
