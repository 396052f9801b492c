"""Code that the plugins for transformers models (LLM, VLM) share. Needs `emloc[transformers]`."""
