"""What a model is judged on: rows, batches, splits, processes, and the tasks that read them."""
