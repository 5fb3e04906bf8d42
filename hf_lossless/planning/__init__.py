"""Choosing a candidate for every layer: the knapsack, the target, the check of the loss."""
