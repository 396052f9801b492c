"""Stages that are killed, or whose disk fails, at every moment: `python tools/attack_kills.py --help`."""
