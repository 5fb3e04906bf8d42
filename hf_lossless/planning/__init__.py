"""Chooses a candidate for every layer: the knapsack, the target, and the check of the loss."""
