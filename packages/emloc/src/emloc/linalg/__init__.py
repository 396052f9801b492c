"""The mathematics: moments, eigenproblems, factors, corrections and merges of single weights."""
