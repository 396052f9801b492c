"""The diffusion demo and its model: a small Stable Diffusion that draws simple shapes."""
