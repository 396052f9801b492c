"""Code that plugins for diffusers models share. Needs `emloc[diffusers]`."""
