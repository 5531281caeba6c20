"""Measure: squared norms of micro-gradients and of their average, whatever wrapper or engine they come from."""
