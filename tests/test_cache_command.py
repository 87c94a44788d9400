"""``llmir cache``, and what goes by itself."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_plan import PLAN

from llmir.cache import FOLDERS, KEPT_DAYS, KeptFolder
from llmir.frontends.common import plan_cache

LEFTOVERS = (".key.json.abcd", "key.part", ".key.o.0123.part", "key.lock")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with an entry of each kind, and what ended processes left."""
    monkeypatch.setenv("LLMIR_CACHE", str(tmp_path))
    for name in FOLDERS:
        for file in ("entry", *LEFTOVERS):
            KeptFolder(tmp_path / name).write(file, bytes(1000))
    made_by_triton = tmp_path / "triton" / "hash"
    made_by_triton.mkdir()
    (made_by_triton / "kernel.cubin").write_bytes(bytes(500_000))
    return tmp_path


def let_age(folder: Path, days: float) -> None:
    """Everything in ``folder`` was used so many days ago last."""
    then = time.time() - days * 86400
    for path in folder.iterdir():
        os.utime(path, (then, then))


def test_shows_where_what_is_kept(run: Callable, cache: Path) -> None:
    code, out, _ = run("cache", "show")
    assert code == 0
    assert out.splitlines()[0] == str(cache)
    assert [line.split()[:3] for line in out.splitlines()[1:]] == [
        [name, "2" if name == "triton" else "1", "entries"] for name in FOLDERS
    ]
    assert "0.5 MB" in out


def test_shows_what_is_not_used_and_why(run: Callable, cache: Path) -> None:
    (cache / "plans").chmod(0o770)
    code, out, _ = run("cache", "show")
    assert code == 0
    assert "can be written by others" in out


def test_an_empty_cache_is_shown_and_cleared(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMIR_CACHE", str(tmp_path / "none"))
    assert run("cache", "show")[0] == 0
    assert run("cache", "clear")[:2] == (0, f"removed 0 entries from {tmp_path / 'none'}\n")
    assert not (tmp_path / "none").exists()


def test_clear_removes_all(run: Callable, cache: Path) -> None:
    code, out, _ = run("cache", "clear")
    assert (code, out) == (0, f"removed {len(FOLDERS) + 1} entries from {cache}\n")
    assert [list((cache / name).iterdir()) for name in FOLDERS] == [[]] * len(FOLDERS)


def test_prune_removes_what_is_old_by_its_last_use(run: Callable, cache: Path) -> None:
    let_age(cache / "plans", 10)
    let_age(cache / "objects", 10)
    assert KeptFolder(cache / "objects").read("entry") is not None  # a use
    assert run("cache", "prune", "--days", "9")[:2] == (0, f"removed 1 entries from {cache}\n")
    assert list((cache / "plans").iterdir()) == []
    assert [path.name for path in (cache / "objects").iterdir()] == ["entry"]


def test_anothers_cache_is_not_cleared(run: Callable, cache: Path) -> None:
    (cache / "plans").chmod(0o777)
    code, _, err = run("cache", "clear")
    assert code == 1
    assert "can be written by others" in err


def test_making_a_plan_removes_what_is_old(cache: Path) -> None:
    for name in FOLDERS:
        let_age(cache / name, 2)
    let_age(cache / "objects", KEPT_DAYS + 1)
    plan_cache.get_or_make("key", lambda: PLAN, logging.getLogger("llmir.test"))
    assert list((cache / "objects").iterdir()) == []
    assert sorted(path.name for path in (cache / "plans").iterdir()) == ["entry", "key.json", "key.lock"]


def test_a_folder_that_cannot_be_pruned_does_not_stop_a_start(cache: Path) -> None:
    (cache / "objects").chmod(0o777)
    assert plan_cache.get_or_make("key", lambda: PLAN, logging.getLogger("llmir.test")) == PLAN
