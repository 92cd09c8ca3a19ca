import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from retain.errors import LineageError
from retain.storage.files import differences, disk_errors, file_hash, manifest, replacing, sync_tree, write_text


def test_replacing_is_all_or_nothing(tmp_path: Path):
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with suppress(RuntimeError), replacing(file) as half:
        half.write(b"ne")
        raise RuntimeError
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    with replacing(file) as whole:
        whole.write(b"new")
        whole.flush()
        assert file.read_text() == "old"  # until the end
    assert file.read_text() == "new"


def test_text_is_utf8(tmp_path: Path):
    write_text(tmp_path / "a.txt", "Hà Nội\n")
    assert (tmp_path / "a.txt").read_bytes() == "Hà Nội\n".encode()


def test_sync_tree_reaches_every_file_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("1", "a/2", "a/b/3", "a/b/.hidden"):
        (tmp_path / name).write_text(name)
    synced: set[int] = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    sync_tree(tmp_path)
    assert synced == {path.stat().st_ino for path in [tmp_path, *tmp_path.rglob("*")]}
    assert len(synced) == 7


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk full"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "disk full"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be written"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot be written"),
    ],
)
def test_what_the_disk_refuses_is_the_users_to_mend(error: Exception, message: str, tmp_path: Path):
    with pytest.raises(LineageError, match=message) as caught, disk_errors(tmp_path):
        raise error
    assert str(tmp_path) in caught.value.message
    assert caught.value.hint
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "I/O error"), SafetensorError("header too small"), ValueError("x")]
)
def test_other_errors_stay_what_they_are(error: Exception, tmp_path: Path):
    with pytest.raises(type(error)) as caught, disk_errors(tmp_path):
        raise error
    assert caught.value is error


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="only Linux has a disk that is always full")
def test_a_really_full_disk():
    with pytest.raises(LineageError, match="disk full"), disk_errors(Path("/dev/full")):
        Path("/dev/full").write_bytes(b"x")


def test_safetensors_tells_the_number_of_its_errors(tmp_path: Path):
    """`disk_errors` reads it from the text: this fails when the library changes its wording."""
    with pytest.raises(SafetensorError, match=r"os error 2\)"):
        save_file({"a": torch.zeros(1)}, tmp_path / "missing" / "a")


def test_hash_is_sha256(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"abc")  # FIPS 180-4, the first example
    assert file_hash(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_differences_name_each_file(tmp_path: Path):
    for name in ("same", "longer", "changed", "gone", "skipped"):
        (tmp_path / name).write_text(name)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "same").write_text("")
    sealed = manifest(tmp_path, skip=("skipped",))
    assert list(sealed) == ["changed", "deep/same", "gone", "longer", "same"]
    assert sealed["gone"] == {"bytes": 4, "sha256": file_hash(tmp_path / "gone")}
    assert differences(tmp_path, sealed, skip=("skipped",)) == []

    (tmp_path / "longer").write_text("longer than that")
    (tmp_path / "changed").write_text("CHANGED")
    (tmp_path / "gone").unlink()
    (tmp_path / "deep" / "new").write_text("")
    assert differences(tmp_path, sealed, skip=("skipped",)) == [
        f"{tmp_path}/changed: the content has changed since commit",
        f"{tmp_path}/deep/new: was not there at commit",
        f"{tmp_path}/gone: missing",
        f"{tmp_path}/longer: 16 bytes, was 6 at commit",
    ]
    assert len(differences(tmp_path, sealed, skip=("skipped",), sizes_only=True)) == 3
    assert differences(tmp_path, sealed, only=("same", "gone")) == [f"{tmp_path}/gone: missing"]
