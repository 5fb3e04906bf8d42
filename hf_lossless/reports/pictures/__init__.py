"""Pictures of a compression: each module makes one matplotlib Figure, which its caller saves."""
