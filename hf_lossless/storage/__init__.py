"""A compressed layer: its plan, its tensors and its module in a model, and the rebuilding of models from them."""
