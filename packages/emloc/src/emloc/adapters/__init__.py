"""An adapter beside the model that it belongs to: which weights it changes, and the model with it merged."""
