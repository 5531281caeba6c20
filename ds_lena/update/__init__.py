"""Move: the base rule on all pieces of a flat tensor, with a learning rate for each piece."""
