import subprocess
import sys

from llmir.ir import bindings

#: An import of a name that stands as None in sys.modules fails as if the package were not installed.
WITHOUT = """
import sys
sys.modules["torch_mlir"] = sys.modules["mlir"] = None
from llmir.errors import MissingBindingsError
try:
    import llmir.ir.bindings
except MissingBindingsError as error:
    print(error)
"""


def test_bindings_say_what_they_are():
    assert bindings.NAME in ("torch-mlir", "mlir")
    assert bindings.VERSION[0].isdigit()


def test_missing_bindings_are_said_with_the_remedy():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True)
    assert "no MLIR Python bindings can be imported" in done.stdout
    assert "pip install torch-mlir" in done.stdout
