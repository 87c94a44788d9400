import pytest

from llmir.ir.bindings import ir
from llmir.ir.dialect import context


@pytest.fixture(autouse=True)
def _in_context():
    """Every test here runs in a fresh context that knows the llm dialect."""
    with context(), ir.Location.unknown():
        yield
