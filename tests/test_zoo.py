"""What the zoo makes of two sides' answers; that it serves them is seen by running it."""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import zoo
import zoo_markdown
from zoo_sides import Answer


def row(**values):
    return zoo.Row("TinyForCausalLM", "vllm", "", **values)


def test_other_tokens_are_a_difference_and_what_follows_them_is_not_compared():
    nats, words = zoo.difference(Answer([1, 2, 3], [-1.0, -2.0, -9.0]), Answer([1, 4, 3], [-1.5, -7.0, -3.0]))
    assert (nats, words) == (0.5, "other tokens from 1 on")


def test_prompts_count_and_nan_is_no_small_difference():
    assert zoo.difference(Answer([1], [-1.0], [-2.0]), Answer([1], [-1.0], [-2.25])) == (0.25, "")
    assert zoo.difference(Answer([1], [math.nan]), Answer([1], [-1.0]))[0] == math.inf


@pytest.mark.parametrize(("off", "outcome"), [(0.001, zoo.SAME), (0.01, zoo.DIFFERENT)])
def test_outcome(off, outcome):
    theirs = [Answer([1], [-1.0])] * 2
    made = zoo.compare(row(), [Answer([1], [-1.0 + off])] * 2, theirs)
    assert made.outcome == outcome and made.own == 0.0


def test_a_framework_that_differs_from_itself_is_not_held_to_less():
    theirs = [Answer([1], [-1.0]), Answer([1], [-1.1])]
    assert zoo.compare(row(), [Answer([1], [-1.05])] * 2, theirs).outcome == zoo.SAME


def test_rows_of_other_architectures_stay():
    kept = [{"framework": "vllm", "architecture": name, "outcome": "same"} for name in ("B", "A")]
    new = [{"framework": "vllm", "architecture": "B", "outcome": "refused"}]
    assert [made["outcome"] for made in zoo.merged(kept, new)] == ["same", "refused"]


def test_a_table_has_no_machine_paths_and_keeps_the_other_frameworks(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo_markdown, "_packages", lambda framework: ())
    path = tmp_path / "models.md"
    path.write_text(zoo_markdown.TITLE + "\n## sglang\n\nkept\n")
    words = "the model '/tmp/x/model' has a | in it (/tmp/layers.py:7): check the name"
    zoo_markdown.write_table(path, [zoo.asdict(row(words=words, opaque={"a.A": 1, "aten.b": 2}))])
    text = path.read_text()
    assert (
        "kept" in text
        and "2 aten.b, 1 A" in text
        and "/tmp" not in text
        and "the model has a / in it (layers.py:7) |" in text
    )
