"""Files that are there whole or not at all, that survive a power cut, and that can prove what they hold."""

import errno
import hashlib
import os
import re
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from retain.errors import LineageError

__all__ = ["differences", "disk_errors", "file_hash", "manifest", "replacing", "sync", "sync_tree", "write_text"]

FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def disk_errors(path: Path) -> Generator[None]:
    """What the disk refuses inside becomes an error that the user can act on.

    Raises:
        LineageError: the disk is full, or `path` may not be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors tells the number of its own I/O errors only in the text.
        inner = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else int(inner.group(1)) if inner else None
        if number in FULL:
            raise LineageError(
                f"disk full while writing to {path}",
                problems=[str(error)],
                hint="free some space and run the same command again; every committed stage is untouched",
            ) from error
        if number in FORBIDDEN:
            raise LineageError(
                f"{path} cannot be written", problems=[str(error)], hint="check who owns the folder and its permissions"
            ) from error
        raise


def sync(path: Path) -> None:
    """Make a file's content, or a folder's list of names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make all that a folder holds survive a power cut."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


@contextmanager
def replacing(path: Path) -> Generator[BinaryIO]:
    """A file to write that takes the place of `path` at the end, at once and durably; `path` is never half written."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def file_hash(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files_below(folder: Path, skip: Collection[str]) -> dict[str, Path]:
    """Every file below a folder by its relative name, but those whose first part is in `skip`."""
    paths = sorted(path for path in folder.rglob("*") if not path.is_dir())
    names = [path.relative_to(folder) for path in paths]
    return {name.as_posix(): path for name, path in zip(names, paths, strict=True) if name.parts[0] not in skip}


def manifest(folder: Path, *, skip: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Size and hash of every file below a folder: `{"weights/a.bin": {"bytes": 12, "sha256": "..."}}`."""
    files = _files_below(folder, skip)
    return {name: {"bytes": path.stat().st_size, "sha256": file_hash(path)} for name, path in files.items()}


def differences(
    folder: Path,
    expected: Mapping[str, Mapping[str, Any]],
    *,
    skip: Collection[str] = (),
    only: Collection[str] | None = None,
    sizes_only: bool = False,
) -> list[str]:
    """How a folder differs from its manifest, or `only` some of its files do: one line a file."""
    files = _files_below(folder, skip)
    problems: list[str] = []
    for name in sorted({*files, *expected} if only is None else only):
        path = folder / name
        if name not in files:
            problems.append(f"{path}: missing")
        elif name not in expected:
            problems.append(f"{path}: was not there at commit")
        elif (size := path.stat().st_size) != expected[name]["bytes"]:
            problems.append(f"{path}: {size} bytes, was {expected[name]['bytes']} at commit")
        elif not sizes_only and file_hash(path) != expected[name]["sha256"]:
            problems.append(f"{path}: the content has changed since commit")
    return problems
