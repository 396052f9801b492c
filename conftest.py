"""What a whole run says at its end, whichever process found it."""

import json
import os

from hypothesis import settings

from emloc.testing.pytest_plugin import freeze_libraries

# A change is judged by the same examples each time; `--hypothesis-profile=random` looks for others.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("random", deadline=None)
settings.load_profile("same")

# Stages compute on a GPU where there is one; what tests compare are numbers of the CPU.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

# Nothing that is written here has to outlive the machine, and every stage syncs all its files, which takes
# disks longer than the rest. What is synced, and when, is seen at the call (`test_durable.py`); processes of
# their own sync as ever.
os.fsync = os.fstat

KEY = "emloc/causal_lm_types"


def pytest_sessionstart(session):
    """Forget what an earlier run found."""
    if not hasattr(session.config, "workerinput") and getattr(session.config, "cache", None):
        session.config.cache.set(KEY, None)


def pytest_collection_modifyitems(items):
    """Long tests begin first: one that is left for the end has the other process wait for it."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_runtest_setup():
    """Keep collections quick in all tests, as the plugin does in those of the contract."""
    freeze_libraries()


def pytest_terminal_summary(terminalreporter, config):
    """Print it."""
    cache = getattr(config, "cache", None)
    summary = cache.get(KEY, None) if cache else None
    if summary:
        reasons = json.dumps(summary["reasons"])
        terminalreporter.write_line(f"causal LM types that are not supported: {reasons}")
        terminalreporter.write_line(json.dumps(summary["figures"]))
