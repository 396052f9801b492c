"""What the diffusion demo is run on: a small Stable Diffusion that draws simple shapes."""
