"""What documents for developers name is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
ADDING = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs" / "adding").glob("*.md"))]


def ids(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("document", ADDING, ids=ids)
def test_files_to_touch_exist(document):
    named = re.findall(r"`((?:llmir|tests|integration_tests|benchmarks|tools)/[\w./]+)`", document.read_text())
    missing = {path for path in named if "NAME" not in path and not (ROOT / path).exists()}
    assert named and not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\((?!http|#)([^)#]+)", document.read_text())
    assert not {link for link in links if not (document.parent / link).exists()}
