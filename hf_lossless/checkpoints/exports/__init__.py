"""Compressed checkpoints written in formats that stock transformers loads, without this package."""
