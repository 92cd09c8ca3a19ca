import hashlib
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from retain.models.cache import cache_folder, digest, write_once


def test_the_environment_names_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("RETAIN_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("RETAIN_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "retain"


def test_digest_is_of_the_files_joined(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"two")
    assert digest([tmp_path / "a", tmp_path / "b"], tmp_path / "cache") == hashlib.sha256(b"onetwo").hexdigest()


def test_digest_notices_a_change_of_equal_size(tmp_path: Path):
    file, cache = tmp_path / "a", tmp_path / "cache"
    file.write_bytes(b"one")
    before = digest([file], cache)
    assert digest([file], cache) == before
    file.write_bytes(b"two")
    os.utime(file, ns=(0, 1))
    assert digest([file], cache) == hashlib.sha256(b"two").hexdigest()


def test_digest_does_not_read_an_unchanged_file_again(tmp_path: Path):
    file, cache = tmp_path / "a", tmp_path / "cache"
    file.write_bytes(b"one")
    times = file.stat().st_mtime_ns
    before = digest([file], cache)
    file.write_bytes(b"two")
    os.utime(file, ns=(times, times))
    assert digest([file], cache) == before


def test_a_write_that_fails_leaves_nothing(tmp_path: Path):
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_once(tmp_path / "x" / "model", fail)
    assert [path.name for path in (tmp_path / "x").iterdir() if path.is_dir()] == []
    write_once(tmp_path / "x" / "model", lambda folder: (folder / "whole").touch())
    assert [path.name for path in (tmp_path / "x" / "model").iterdir()] == ["whole"]


def test_the_rest_of_a_killed_process_is_not_kept(tmp_path: Path):
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "half").touch()
    write_once(tmp_path / "model", lambda folder: (folder / "whole").touch())
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["whole"]


def slow_write(folder: Path) -> None:
    with (folder.parent / "log").open("a") as log:
        log.write("written\n")
    time.sleep(0.3)
    (folder / "content").write_text("content")


def test_two_processes_write_once(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=write_once, args=(tmp_path / "model", slow_write)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert (tmp_path / "log").read_text() == "written\n"
    assert (tmp_path / "model" / "content").read_text() == "content"
