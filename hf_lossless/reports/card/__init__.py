"""Model cards: rendered from a checkpoint's plan and certificate, and never over a person's own text."""
