"""The Hugging Face Hub: one commit with all of a compressed checkpoint."""
