"""Other tools that make checkpoints smaller, one file for each, all behind one signature (see `problem`).

Every file has a dict METHODS: the name of a row of the comparison -> a function from the problem to the peer's model.
A row is one setting of a tool; `recipes/benchmarks/peers.py` runs them all.
"""
