"""What the examples share: texts, token blocks, model sizes, history and its picture."""
