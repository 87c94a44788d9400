"""What is kept on disk: whole or not at all, for this user alone, and never what another user may have written."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from llmir.cache import KeptFolder, UntrustedError, UntrustedFolderError

NAME, DATA = "entry.o", b"data"
#: A user whom nothing belongs to.
NOBODY = 65534


@pytest.fixture
def kept(tmp_path: Path) -> KeptFolder:
    """A folder with one entry."""
    kept = KeptFolder(tmp_path / "made" / "on demand")
    kept.write(NAME, DATA)
    return kept


@pytest.fixture
def give_away(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Lets a path belong to somebody who is neither this user nor root."""

    def give(path: Path) -> None:
        if os.geteuid() == 0:
            os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: NOBODY)

    return give


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_written_is_read(kept: KeptFolder) -> None:
    assert kept.read(NAME) == DATA
    kept.write(NAME, b"other")
    assert kept.read(NAME) == b"other"
    assert [path.name for path in kept.path.iterdir()] == [NAME]


def test_what_is_not_there_is_none(kept: KeptFolder) -> None:
    assert kept.read("another") is None
    assert KeptFolder(kept.path / "none").read(NAME) is None
    assert KeptFolder(kept.path / NAME / "below").read(NAME) is None


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022])
def test_all_is_made_for_this_user_alone(tmp_path: Path, umask: int) -> None:
    kept = KeptFolder(tmp_path / "above" / "folder")
    before = os.umask(umask)
    try:
        kept.write(NAME, DATA)
        os.close(kept.open_lock("lock"))
    finally:
        os.umask(before)
    assert [mode(path) for path in (kept.path.parent, kept.path)] == [0o700] * 2
    assert [mode(kept.path / name) for name in (NAME, "lock")] == [0o600] * 2


@pytest.mark.parametrize("others", [0o020, 0o002])
def test_a_folder_that_others_can_write_is_refused(kept: KeptFolder, others: int) -> None:
    kept.path.chmod(0o700 | others)
    for use in (lambda: kept.read(NAME), lambda: kept.write(NAME, DATA), lambda: kept.open_lock("lock"), kept.made):
        with pytest.raises(UntrustedFolderError, match=r"on demand can be written by others .* chmod -R go-w"):
            use()


@pytest.mark.parametrize("others", [0o020, 0o002])
def test_an_entry_that_others_can_write_is_refused_and_replaced(kept: KeptFolder, others: int) -> None:
    (kept.path / NAME).chmod(0o600 | others)
    with pytest.raises(UntrustedError, match=r"entry\.o can be written by others") as caught:
        kept.read(NAME)
    assert not isinstance(caught.value, UntrustedFolderError)
    kept.write(NAME, DATA)
    assert kept.read(NAME) == DATA


def test_anothers_folder_is_refused_in_words_that_help_in_a_container(
    kept: KeptFolder, give_away: Callable[[Path], None]
) -> None:
    give_away(kept.path)
    owner = kept.path.stat()
    with pytest.raises(UntrustedFolderError) as caught:
        kept.read(NAME)
    words = str(caught.value)
    assert f"{kept.path} belongs to " in words
    assert f"docker run --user {owner.st_uid}:{owner.st_gid}" in words
    assert "set LLMIR_CACHE to a folder that" in words


def test_anothers_entry_is_refused(kept: KeptFolder, give_away: Callable[[Path], None]) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away and keep its folder")
    give_away(kept.path / NAME)
    with pytest.raises(UntrustedError, match=r"entry\.o belongs to "):
        kept.read(NAME)


def test_a_folder_above_may_be_anothers(tmp_path: Path) -> None:
    """As a volume in a container is: who can write there cannot make a folder that belongs to this user."""
    tmp_path.chmod(0o777)
    kept = KeptFolder(tmp_path / "objects")
    kept.write(NAME, DATA)
    assert kept.read(NAME) == DATA


def test_no_link_is_followed(kept: KeptFolder, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"dear")
    (kept.path / "link").symlink_to(victim)
    link = KeptFolder(tmp_path / "objects")
    link.path.symlink_to(kept.path)
    for use in (lambda: kept.read("link"), lambda: kept.open_lock("link"), lambda: link.read(NAME), link.made):
        with pytest.raises(UntrustedError, match="is a symbolic link"):
            use()
    kept.write("link", DATA)
    assert victim.read_bytes() == b"dear"
    assert kept.read("link") == DATA


def test_a_pipe_does_not_let_the_reader_wait(kept: KeptFolder) -> None:
    os.mkfifo(kept.path / "pipe", 0o600)
    with pytest.raises(UntrustedError, match="is not a file"):
        kept.read("pipe")


def test_what_cannot_be_written_leaves_nothing(kept: KeptFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **folders: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        kept.write(NAME, b"other")
    assert [path.name for path in kept.path.iterdir()] == [NAME]
    assert kept.read(NAME) == DATA


def test_a_folder_for_another_program_is_closed_to_others(kept: KeptFolder) -> None:
    kept.path.chmod(0o755)
    assert kept.made() == kept.path
    assert mode(kept.path) == 0o700
