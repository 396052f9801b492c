"""The seams for plugins: families, methods, hooks and options."""
