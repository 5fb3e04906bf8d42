"""What predicts how a candidate changes the loss; one file per theory."""
