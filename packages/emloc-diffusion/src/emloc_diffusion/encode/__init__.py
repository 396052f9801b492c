"""Pictures and prompts as the denoiser takes them, made once and before it is loaded."""
