"""EMLoC for diffusion models of diffusers."""
