"""The plug-in of transformers, and saved folders: reading, writing, loading, exporting."""
