"""The parts that the plugins' demos share: the four ways that are compared, their table and picture."""
