"""Metrics as `evaluate.Metric` classes that ship with the package: `evaluate.load` would need the network."""
