"""`emloc bench`: methods × budgets × seeds × data sets, each cell in a process of its own."""
