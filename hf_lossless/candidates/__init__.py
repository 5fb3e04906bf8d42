"""Ways to store a layer: grids, factors and entropy-coded grids, and the proposal of candidates (`propose`)."""
