"""One forward-backward pass over the calibration data, and the statistics that the theories need."""
