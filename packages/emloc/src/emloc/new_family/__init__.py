"""A plugin package to begin with: what `emloc new-family NAME` writes, and the writing."""
