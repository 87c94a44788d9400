from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from llmir.compare.files import check_new_folder, write_folder, write_json, write_whole
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


def test_a_folder_takes_the_place_of_an_empty_one(tmp_path: Path):
    folder = tmp_path / "new"
    folder.mkdir()
    write_folder(folder, {"a": b"1", "b": b"2"})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a": b"1", "b": b"2"}


def test_a_full_disk_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def run_out(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", run_out)
    with pytest.raises(LlmirError, match="No space left on device"):
        write_folder(tmp_path / "new", {"a": b"1"})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_other_things_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    for path, reason in ((tmp_path, "not empty"), (tmp_path / "file", "is a file")):
        with pytest.raises(LlmirError, match=reason):
            check_new_folder(path)
    check_new_folder(tmp_path / "new" / "folder")
