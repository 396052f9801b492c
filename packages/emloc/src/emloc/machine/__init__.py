"""The machine that a stage runs on: its memory, devices and terminal."""
