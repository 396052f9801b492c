"""Options as text: what is typed on a command line, in an override or in a file means the same."""
