"""What real vLLM reads when it is imported."""

import os
from importlib import util

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

collect_ignore_glob = [] if util.find_spec("vllm") else ["*"]
