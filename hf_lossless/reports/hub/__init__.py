"""Pushes a compressed checkpoint to the Hugging Face Hub in one commit."""
