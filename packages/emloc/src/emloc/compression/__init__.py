"""Stage 1: which layers become what, the pass over the base, and the emulator's folder."""
