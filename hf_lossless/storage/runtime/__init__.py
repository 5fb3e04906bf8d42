"""How compressed layers are computed once they are in memory; see README.md beside this file."""
