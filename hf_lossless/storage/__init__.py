"""What a compressed layer is: its plan, its tensors, its module in a model, and how a model is rebuilt from them."""
