"""Move: the base rule on all pieces of a flat tensor, each with a learning rate of its own."""
