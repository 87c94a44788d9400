"""A causal decoder served as an embedding model: SGLang's embeddings."""

from pathlib import Path

import numpy as np
from engines import ask

ARGUMENTS = {"is_embedding": True, "dtype": "float32", "max_total_tokens": 4096, "page_size": 16}


def test_embeddings_are_sglangs(smollm2: str, tmp_path: Path) -> None:
    made = []
    for backend in ("llmir", "torch_native"):
        (folder := tmp_path / backend).mkdir()
        cache = str(tmp_path / "cache")
        answers = ask(smollm2, "embeddings", {"attention_backend": backend} | ARGUMENTS, folder, LLMIR_CACHE=cache)
        assert answers.jobs["server"]["attention_backend"] == backend
        made.append(answers.jobs["embeddings"])
    np.testing.assert_allclose(*made, atol=1e-4)
