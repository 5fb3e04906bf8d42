"""The plug-in for transformers, and saved folders: reading, writing, loading and exporting them."""
