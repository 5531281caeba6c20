"""Measure: squared norms of micro-gradients and of their average, under any optimizer wrapper and any engine."""
