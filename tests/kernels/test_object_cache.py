"""The object cache: what is in a key, and what happens to entries that cannot be trusted or stored."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import importlib.metadata
import importlib.util
import logging
import multiprocessing
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from specs import changed

from llmir.errors import KernelError, LlmirError
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.kernel_spec import CpuVariant, KernelSpec
from llmir.kernels import build_lock
from llmir.kernels.cpu import object_cache
from llmir.kernels.cpu.object_cache import ObjectCache, object_key
from llmir.kernels.source_digest import PACKAGE

KEY = "5a" * 32
OBJECT = bytes(range(256)) * 20

SIGNATURE = AttentionSpec.dense(9, 3, 64, "bf16", 128, 0.125, layout="pair")
VARIANT = CpuVariant("decode", 1, 3, 64, 4, 4, 64)
SPEC = KernelSpec(SIGNATURE, "avx512_bf16", (VARIANT,))


def no_build() -> bytes:
    raise AssertionError("built although the entry is there")


@pytest.fixture
def cache(tmp_path):
    return ObjectCache(tmp_path / "made" / "on demand")


def entry(cache: ObjectCache):
    return cache.folder / f"{KEY}.o"


def test_built_once_then_read(cache):
    assert cache.get_or_build(KEY, lambda: OBJECT) == OBJECT
    assert cache.get_or_build(KEY, no_build) == OBJECT


def test_other_key_is_other_entry(cache):
    cache.get_or_build(KEY, lambda: OBJECT)
    assert cache.get_or_build("00" * 32, lambda: b"other") == b"other"


def test_failed_build_stores_nothing(cache):
    with pytest.raises(ZeroDivisionError):
        cache.get_or_build(KEY, lambda: bytes(1 // 0))
    assert not entry(cache).exists()
    assert cache.get_or_build(KEY, lambda: OBJECT) == OBJECT


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:-1], "bytes instead of"),
        (lambda data: data + b"\0", "bytes instead of"),
        (lambda data: data[:20], "not a cached object"),
        (lambda data: b"", "not a cached object"),
        (lambda data: b"\x7fELF" + data, "not a cached object"),
        (lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:], "corrupt"),
        (lambda data: data[:12] + b"\0" * 32 + data[44:], "belongs to another key"),
        (lambda data: data[:8] + b"\xff" + data[9:], "format"),
    ],
)
def test_damaged_entry_is_noticed_and_rebuilt(cache, caplog, damage, words):
    cache.get_or_build(KEY, lambda: OBJECT)
    entry(cache).write_bytes(damage(entry(cache).read_bytes()))
    assert cache.get_or_build(KEY, lambda: OBJECT) == OBJECT
    assert [words in record.getMessage() for record in caplog.records] == [True]
    caplog.clear()
    assert cache.get_or_build(KEY, no_build) == OBJECT
    assert not caplog.records


def test_unfinished_write_of_a_killed_process_is_no_entry(cache):
    cache.folder.mkdir(parents=True)
    (cache.folder / f".{KEY}.o.0123.part").write_bytes(b"half")
    assert cache.get_or_build(KEY, lambda: OBJECT) == OBJECT
    assert cache.get_or_build(KEY, no_build) == OBJECT


def test_folder_that_cannot_be_made_costs_one_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache = ObjectCache(tmp_path / "file" / "folder")
    assert cache.get_or_build(KEY, lambda: OBJECT) == OBJECT
    assert cache.get_or_build(KEY, lambda: OBJECT) == OBJECT
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "LLMIR_CACHE" in caplog.text


def _as_nobody(folder, answers):
    if os.geteuid() == 0:
        os.setuid(65534)
    reader = ObjectCache(folder)
    answers.put(reader.get_or_build(KEY, no_build))
    answers.put(reader.get_or_build("00" * 32, lambda: b"built, not stored"))


def test_read_only_folder_is_read_and_not_written():
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is private to this user
        os.chmod(folder, 0o755)
        cache = ObjectCache(f"{folder}/cache")
        cache.get_or_build(KEY, lambda: OBJECT)
        entry(cache).chmod(0o444)  # for this user alone, unless it is said otherwise
        cache.folder.chmod(0o555)
        fork = multiprocessing.get_context("fork")
        answers = fork.Queue()
        child = fork.Process(target=_as_nobody, args=(cache.folder, answers))
        child.start()
        assert answers.get(timeout=30) == OBJECT
        assert answers.get(timeout=30) == b"built, not stored"
        child.join()
        assert not (cache.folder / f"{'00' * 32}.o").exists()
        cache.folder.chmod(0o755)


def _with_full_disk(folder, answers):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # as a full disk: the write stops half-way
    answers.put(ObjectCache(folder).get_or_build(KEY, lambda: OBJECT))


def test_full_disk_leaves_nothing_half_written(cache):
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    child = fork.Process(target=_with_full_disk, args=(cache.folder, answers))
    child.start()
    assert answers.get(timeout=30) == OBJECT
    child.join()
    assert [p.name for p in cache.folder.iterdir()] == [f"{KEY}.lock"]


def _build_and_count(folder, builds):
    def build() -> bytes:
        with builds.get_lock():
            builds.value += 1
        time.sleep(0.1)  # long enough for the others to arrive at the lock
        return OBJECT

    assert ObjectCache(folder).get_or_build(KEY, build) == OBJECT


def test_processes_at_once_build_once(cache):
    fork = multiprocessing.get_context("fork")
    builds = fork.Value("i", 0)
    children = [fork.Process(target=_build_and_count, args=(cache.folder, builds)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0] * 4
    assert builds.value == 1


# -- builds that fail, and builds inside builds


def failing() -> bytes:
    raise KernelError("no such instruction")


def first_failure(cache: ObjectCache) -> pytest.ExceptionInfo[KernelError]:
    """A failed build's error: whoever has it, has the frames and what is alive in them."""
    with pytest.raises(KernelError, match="no such instruction") as caught:
        cache.get_or_build(KEY, failing)
    return caught


def test_a_second_attempt_is_told_the_same_error(cache):
    first = first_failure(cache)
    assert str(first_failure(cache).value) == str(first.value)


def test_a_build_after_a_failed_one_is_kept(cache):
    first = first_failure(cache)
    assert cache.get_or_build(KEY, lambda: OBJECT) == OBJECT
    assert cache.get_or_build(KEY, no_build) == OBJECT
    assert first.value.__context__ is None


def test_another_process_builds_after_a_failed_build(cache):
    first = first_failure(cache)
    fork = multiprocessing.get_context("fork")
    builds = fork.Value("i", 0)
    child = fork.Process(target=_build_and_count, args=(cache.folder, builds))
    child.start()
    child.join(30)
    assert (child.exitcode, builds.value) == (0, 1), first


def test_another_process_builds_what_was_built_and_removed(cache):
    cache.get_or_build(KEY, lambda: OBJECT)
    entry(cache).unlink()
    test_another_process_builds_after_a_failed_build(cache)


def test_a_thread_that_waits_for_a_failing_build_builds(cache):
    waits = threading.Event()
    found = []

    def build_later() -> bytes:
        thread.start()
        waits.wait(10)
        return failing()

    def wait_and_build() -> None:
        waits.set()
        found.append(cache.get_or_build(KEY, lambda: OBJECT))

    thread = threading.Thread(target=wait_and_build)
    with pytest.raises(KernelError, match="no such instruction"):
        cache.get_or_build(KEY, build_later)
    thread.join(10)
    assert found == [OBJECT]


def test_an_error_where_nothing_can_be_kept_is_told_without_the_lock_s(tmp_path):
    (tmp_path / "file").write_text("")
    assert first_failure(ObjectCache(tmp_path / "file" / "folder")).value.__context__ is None


def test_a_lock_that_cannot_be_released_does_not_hide_the_build_s_error(cache, monkeypatch):
    flock = fcntl.flock

    def locks_only(file, operation):
        if operation == fcntl.LOCK_UN:
            raise OSError(errno.EIO, "input/output error")
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", locks_only)
    first_failure(cache)


def test_a_build_may_ask_for_another_key(cache):
    inner = "00" * 32
    assert cache.get_or_build(KEY, lambda: OBJECT + cache.get_or_build(inner, lambda: b"inner")) == OBJECT + b"inner"
    assert cache.get_or_build(inner, no_build) == b"inner"


@pytest.mark.parametrize("folder", ["folder", "file/folder"])
def test_a_build_that_asks_for_its_own_key_is_an_error(tmp_path, folder):
    (tmp_path / "file").write_text("")
    cache = ObjectCache(tmp_path / folder)
    with pytest.raises(LlmirError, match="asks for its own result") as first:
        cache.get_or_build(KEY, lambda: ObjectCache(cache.folder).get_or_build(KEY, no_build))
    assert cache.get_or_build(KEY, lambda: OBJECT) == OBJECT, first


def test_a_process_that_waits_for_a_failing_build_builds(cache):
    fork = multiprocessing.get_context("fork")
    builds, started = fork.Value("i", 0), fork.Event()
    child = fork.Process(target=lambda: started.wait(30) and _build_and_count(cache.folder, builds))
    child.start()

    def build_later() -> bytes:
        started.set()
        time.sleep(0.2)  # long enough for it to arrive at the lock
        return failing()

    with pytest.raises(KernelError, match="no such instruction") as first:
        cache.get_or_build(KEY, build_later)
    child.join(30)
    assert (child.exitcode, builds.value) == (0, 1), first


def test_a_child_process_that_outlives_the_build_does_not_keep_the_lock(cache):
    """It inherits the descriptor, and with it what holds the lock."""
    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=time.sleep, args=(60,))
    with pytest.raises(KernelError, match="no such instruction"):
        cache.get_or_build(KEY, lambda: child.start() or failing())
    try:
        assert cache.get_or_build(KEY, lambda: OBJECT) == OBJECT
        assert cache.get_or_build(KEY, no_build) == OBJECT
    finally:
        child.kill()


def _hold(folder, started, ended):
    def build() -> bytes:
        started.set()
        ended.wait(60)
        return OBJECT

    ObjectCache(folder).get_or_build(KEY, build)


def test_patience_with_a_build_that_hangs_ends_and_says_who_holds_which_lock(cache, monkeypatch, caplog):
    monkeypatch.setattr(build_lock, "PATIENCE", 0.2)
    fork = multiprocessing.get_context("fork")
    started, ended = fork.Event(), fork.Event()
    child = fork.Process(target=_hold, args=(cache.folder, started, ended))
    child.start()
    started.wait(30)
    first_failure(cache)
    (warning,) = (record.getMessage() for record in caplog.records)
    assert f"{cache.folder / KEY}.lock, which process {child.pid} on {socket.gethostname()} holds" in warning
    ended.set()
    child.join(30)
    assert cache.get_or_build(KEY, no_build) == OBJECT


# -- what another user may have written


@pytest.mark.parametrize("spoilt", ["folder", "entry"])
def test_what_others_may_have_written_is_built_again(cache, caplog, spoilt):
    cache.get_or_build(KEY, lambda: b"planted")
    path = cache.folder if spoilt == "folder" else entry(cache)
    path.chmod(path.stat().st_mode | 0o002)
    assert cache.get_or_build(KEY, lambda: OBJECT) == OBJECT
    (warning,) = (record.getMessage() for record in caplog.records)
    assert f"{path} can be written by others" in warning


def test_a_planted_link_is_not_followed(cache, tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"dear")
    cache.folder.mkdir(parents=True, mode=0o700)
    for name in (f"{KEY}.o", f"{KEY}.part", f"{KEY}.lock"):
        (cache.folder / name).symlink_to(victim)
    assert cache.get_or_build(KEY, lambda: OBJECT) == OBJECT
    assert victim.read_bytes() == b"dear"


# -- keys


def test_key_is_the_same_for_the_same_spec():
    assert object_key(SPEC) == object_key(KernelSpec.from_json(SPEC.to_json()))


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(SPEC, isa="avx512"),
        dataclasses.replace(SPEC, attention=dataclasses.replace(SIGNATURE, scale=0.25)),
        dataclasses.replace(SPEC, attention=changed(SIGNATURE, window=100)),
        dataclasses.replace(SPEC, variants=(dataclasses.replace(VARIANT, prefetch=2),)),
    ],
)
def test_key_holds_the_spec(other):
    assert object_key(other) != object_key(SPEC)


@pytest.mark.parametrize("what", ["closure_digest", "bindings_version"])
def test_key_holds_what_compiles(monkeypatch, what):
    before = object_key(SPEC)
    monkeypatch.setattr(object_cache, what, lambda *args: "another")
    assert object_key(SPEC) != before


def key_in(folder: Path) -> str:
    """The key of SPEC as a process makes it that imports llmir from ``folder``."""
    code = f"""
import llmir
from llmir.ir.kernel_spec import KernelSpec
from llmir.kernels.cpu.object_cache import object_key
assert llmir.__file__.startswith({str(folder)!r})
print(object_key(KernelSpec.from_json({SPEC.to_json()!r})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    return done.stdout.strip()


def test_key_holds_the_columns_of_the_work_list(tmp_path):
    package = shutil.copytree(PACKAGE, tmp_path / "llmir", ignore=shutil.ignore_patterns("__pycache__"))
    assert key_in(tmp_path) == object_key(SPEC)
    work_list = package / "kernels" / "work_list.py"
    text = work_list.read_text()
    swapped = text.replace("TOKEN = 1 ", "TOKEN = 2 ").replace("TOKENS = 2\n", "TOKENS = 1\n")
    assert len(set(text.split()) ^ set(swapped.split())) == 0 and text != swapped
    work_list.write_text(swapped)
    assert key_in(tmp_path) != object_key(SPEC)


def test_making_a_key_does_not_look_at_the_machine():
    code = f"""
import sys
from llmir.ir.kernel_spec import KernelSpec
from llmir.kernels.cpu.object_cache import object_key
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
object_key(KernelSpec.from_json({SPEC.to_json()!r}))
print(any(path.endswith("lowering.py") for path in opened), *(p for p in opened if p.startswith(("/proc", "/sys"))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_bindings_that_may_compile_are_all_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1")
    assert object_cache.bindings_version.__wrapped__() == "torch-mlir 1, mlir 1"


def test_bindings_named_as_the_ir_names_them():
    from llmir.ir import bindings

    assert bindings.VERSION in object_cache.bindings_version()


def test_needs_neither_mlir_nor_torch():
    code = """
import sys
from llmir.kernels.cpu import loader, object_cache
from llmir.ir.kernel_spec import KernelSpec
object_cache.object_key(KernelSpec.from_json(SPEC))
sys.exit(" ".join({"torch", "torch_mlir", "mlir", object_cache.GENERATOR} & set(sys.modules)) or 0)
"""
    subprocess.run([sys.executable, "-c", code.replace("SPEC", repr(SPEC.to_json()))], check=True)
