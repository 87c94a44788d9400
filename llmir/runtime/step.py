"""One step of a serving framework, as every backend hands it over."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from llmir.errors import KernelError
from llmir.runtime.runs import Int32, Int64


@dataclass(frozen=True, eq=False)
class Step:
    """A batch of requests, each with some new query tokens at the end of its sequence."""

    query_start: Int32
    """[requests + 1]: where each request's new tokens begin among the step's tokens."""
    seq_lens: Int32
    """[requests]: tokens of each request, the new ones included."""
    block_table: Int32 | None = None
    """[rows, columns], each row contiguous: the blocks of requests' caches; None where it is not known on the host, and
    then nothing is shared."""
    rows: Int64 | None = None
    """[requests]: the row of each request in the table, all different; None: request ``i`` has row ``i``."""
    unchanged: Int64 | None = None
    """[rows]: so many leading blocks of each row of the table are as they were in the step before. None: what has
    changed is not known, and has to be found by comparing."""

    def __post_init__(self) -> None:
        if self.block_table is None and not (self.rows is None and self.unchanged is None):
            raise KernelError(
                "a step says of which rows its requests are, or what has changed in them, but has no table"
            )

    def positions(self) -> Int32:
        """[tokens]: of each new token, how many are before it in its request."""
        after = np.repeat(self.seq_lens - self.query_start[1:], np.diff(self.query_start))
        return (np.arange(self.query_start[-1]) + after).astype(np.int32)

    def without_table(self) -> Step:
        """The same, in which nothing can be shared."""
        return replace(self, block_table=None, rows=None, unchanged=None)
