from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from llmir.compare.files import write_json, write_whole
from llmir.errors import LlmirError


def test_folders_are_made(tmp_path: Path):
    path = tmp_path / "results" / "new" / "report.json"
    write_json(path, {"rows": []})
    assert json.loads(path.read_text()) == {"rows": []}


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "report.json"
    path.write_text("old")

    def run_out(partial: Path) -> None:
        partial.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(LlmirError, match="No space left on device"):
        write_whole(path, run_out)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
