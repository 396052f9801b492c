"""Bridges to libraries that core itself does not import; plugins do."""

import logging

# Where bitsandbytes is installed, PEFT imports it, and on a CPU it then warns of a kernel that is an
# extra of its own; what it falls back to computes the same.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
