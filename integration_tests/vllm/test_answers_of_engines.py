"""Random models beyond the window, through layers that llmir does not know, and from a cached prefix: vLLM's answers.

Queries and keys are large enough that attention picks out few tokens: where a window ends shows.
"""

import random
from pathlib import Path

import pytest
from same_answers import check_same_answers
from tiny_models import FAMILIES, WriteModel

WINDOW = FAMILIES["gemma2"]["sliding_window"]
#: A prompt of more than two windows, and how many tokens it goes on with the second time: of a window's cache vLLM
#: keeps the end.
LENGTH, MORE = 2 * WINDOW + 45, 60


def prompts(vocabulary: int) -> list[list[int]]:
    drawn = random.Random(0)
    tokens = [drawn.randrange(3, vocabulary) for _ in range(LENGTH + MORE)]
    return [tokens[:LENGTH], tokens]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *(("gemma2", {}), ("mixtral", {}), ("qwen3_moe", {}), ("opt", {}), ("bloom", {}), ("gpt_oss", {})),
        ("llama", {"head_dim": 112}),
    ],
    ids=lambda given: given if isinstance(given, str) else "".join(f"{name}={size}" for name, size in given.items()),
)
def test_answers_are_vllms(with_weights: WriteModel, tmp_path: Path, family: str, changes: dict[str, int]) -> None:
    ours = check_same_answers(with_weights(family, **changes), prompts(FAMILIES[family]["vocab_size"]), tmp_path)
    assert ours[1]["cached"] >= WINDOW
