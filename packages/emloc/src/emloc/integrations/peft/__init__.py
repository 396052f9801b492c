"""What core offers to PEFT; the only place where core imports it."""
