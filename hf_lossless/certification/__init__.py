"""Tests on held-out data whether the compressed model is worse: the tests, the walk, the certificate."""
