"""Stage 3: the mismatch of every layer, and how far to correct it."""
