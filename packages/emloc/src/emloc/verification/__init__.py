"""Proofs that a folder is what it is said to be: its tensors, and where it came from."""
