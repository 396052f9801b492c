"""What plugins offer: families, methods, hooks and options."""
