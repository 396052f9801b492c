"""The memory planner: a job's needs from a config alone, what fits a budget, and a run that keeps to it."""
