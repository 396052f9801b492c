"""Core's use of PEFT; the only place where core imports it."""
