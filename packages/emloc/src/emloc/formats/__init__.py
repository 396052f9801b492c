"""Formats: the forms that a layer can take in an emulator, one file each."""
