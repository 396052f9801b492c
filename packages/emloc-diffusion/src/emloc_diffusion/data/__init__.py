"""Pictures and their captions: what a diffusion model is fine-tuned on."""
