"""The stages: one module, one options model and one function each."""
