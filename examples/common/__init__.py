"""What the examples share: command line, texts, token blocks, model sizes, the run, its history and picture."""
