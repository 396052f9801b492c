"""Formats whose kernels bitsandbytes has."""
