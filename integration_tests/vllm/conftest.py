"""What real vLLM reads when it is imported."""

import os
from importlib import util

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

# This folder alone would be found as a module without an origin.
installed = getattr(util.find_spec("vllm"), "origin", None)
collect_ignore_glob = [] if installed else ["*"]
