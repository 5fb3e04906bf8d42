"""Ways to store one layer: grids (`uniform`), factors (`low_rank`), and what is proposed (`menu`)."""
