"""Whether held-out data can tell the compressed model from the original: the tests, the walk, the certificate."""
