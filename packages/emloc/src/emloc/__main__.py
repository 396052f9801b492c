"""`python -m emloc`."""

from emloc.cli import main

main()
