"""What a job will take, from a config alone; what fits a budget; and a run that keeps to it."""
