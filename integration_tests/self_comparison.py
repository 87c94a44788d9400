"""What holds where a framework is compared with itself, so that both sides must agree."""

import math

import pytest

from llmir.compare import Comparison


def check_every_metric(comparison: Comparison) -> None:
    """Four metrics, each measured on both sides."""
    rows = comparison.rows
    assert len(rows) == 4
    assert all(math.isfinite(value) and value > 0 for row in rows for value in (row.baseline, row.llmir, row.speedup))


def check_same_answers(comparison: Comparison) -> None:
    """Within what the size of a batch changes: requests join a step as they arrive, and it decides how sums round."""
    (quality,) = comparison.quality
    assert quality.greedy_agreement >= 0.75
    assert quality.max_logprob_difference == pytest.approx(0.0, abs=0.05)
    assert quality.perplexity_relative_difference == pytest.approx(0.0, abs=1e-3)
