"""A structure-aware fuzzer of everything that EMLoC reads: `python tools/fuzz.py --help`."""
