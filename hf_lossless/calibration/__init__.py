"""From data to what the theories need: batches, the loss, and statistics of one forward-backward pass."""
