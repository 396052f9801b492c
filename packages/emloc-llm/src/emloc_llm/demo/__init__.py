"""`emloc demo`: the whole method on a small real language model and a task of everyday use."""
