"""Parts of information_limit.py."""
