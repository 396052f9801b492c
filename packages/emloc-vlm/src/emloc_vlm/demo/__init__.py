"""`emloc demo --family vlm`: the whole method on a small InternVL and questions about shapes."""
