"""Modules that replace compressed layers in a model: packed or coded weights, two factors, or a shared weight."""
