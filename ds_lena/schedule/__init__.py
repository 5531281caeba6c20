"""Decide: from the statistics of an update to the factor of each layer. Vectors go in, vectors come out."""
