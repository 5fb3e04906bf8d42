"""Ways to store one layer: grids (`uniform`, `feedback`), factors (`low_rank`), and what is proposed (`menu`)."""
