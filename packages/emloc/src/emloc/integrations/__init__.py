"""Bridges to libraries that core itself does not import; plugins do."""
