"""EMLoC as a method beside those that it is compared with, and what all of them share."""
