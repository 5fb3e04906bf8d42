"""Model cards, rendered from a checkpoint's plan and certificate; a person's own text is never overwritten."""
