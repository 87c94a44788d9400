from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from pass_modules import module_text

from llmir.ir import text
from llmir.ir.bindings import ir
from llmir.ir.dialect import context


@pytest.fixture
def parse() -> Iterator[Callable[..., ir.Module]]:
    """``parse(heads=8, ...)``: the module of :func:`module_text`."""
    with context() as ctx, ir.Location.unknown():
        yield lambda **facts: text.parse(module_text(**facts), ctx)
