"""What is said of bytes that are no coded matrix."""


class MalformedCode(ValueError):
    """Bytes cannot be decoded; the message says what is wrong with them, for the caller to name their place."""
