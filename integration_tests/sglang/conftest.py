"""What real SGLang reads when it is imported, and llmir registered with it."""

import os
from importlib import util

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

# This folder alone would be found as a module without an origin.
installed = getattr(util.find_spec("sglang"), "origin", None)
collect_ignore_glob = [] if installed else ["*"]


@pytest.fixture(scope="session", autouse=True)
def plugins() -> None:
    """SGLang's plugins, loaded as its launcher and its Engine do before they read any argument."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
