"""Ways to store one layer: grids (`uniform`), how weights go to their levels (`rounding`), and what is proposed."""
