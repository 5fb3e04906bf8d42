"""Entropy coding: matrices of whole numbers in as many bytes as their distribution asks for."""
