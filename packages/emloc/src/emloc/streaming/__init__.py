"""A model that is never held: its own forward runs while one unit at a time has weights."""
