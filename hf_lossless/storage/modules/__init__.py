"""What stands in a model in place of a compressed layer: packed codes, two factors, or another layer's weight."""
