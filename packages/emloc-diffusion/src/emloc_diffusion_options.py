"""Options of the stages that only diffusion models have; imports nothing heavy."""
