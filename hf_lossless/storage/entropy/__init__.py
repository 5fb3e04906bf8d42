"""Entropy coding: matrices of whole numbers in as many bytes as the entropy of their distribution."""
