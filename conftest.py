"""What a whole run says at its end, whichever process found it."""

import json
import os

# Stages compute on a GPU where there is one; what tests compare are numbers of the CPU.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

KEY = "emloc/causal_lm_types"


def pytest_sessionstart(session):
    """Forget what an earlier run found."""
    if not hasattr(session.config, "workerinput") and session.config.cache:
        session.config.cache.set(KEY, None)


def pytest_collection_modifyitems(items):
    """Long tests begin first: one that is left for the end has the other process wait for it."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_terminal_summary(terminalreporter, config):
    """Print it."""
    found = config.cache.get(KEY, None) if config.cache else None
    if found:
        reasons = json.dumps(found["reasons"])
        terminalreporter.write_line(f"causal LM types that are not supported: {reasons}")
        terminalreporter.write_line(json.dumps(found["figures"]))
