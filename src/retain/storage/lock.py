"""One writer at a time: a lock that names its owner."""

import os
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import SoftFileLock, Timeout

from retain.errors import LineageError
from retain.storage.documents import read_json, write_json
from retain.storage.files import disk_errors

__all__ = ["exclusive"]

LOCK, OWNER = "lineage.lock", "lineage.owner.json"
TORN_AFTER = 10.0
"""Seconds after which a lock that is still empty was left so by a power cut."""


@contextmanager
def exclusive(folder: Path, command: str) -> Generator[str]:
    """Be the only writer of a folder while inside.

    `lineage.lock` exists while someone writes: it is created with O_EXCL, and broken where the process that it names is
    gone from this host. `lineage.owner.json` says to people who that is.

    Args:
        folder: what to lock; it exists.
        command: what the writer does, for the others to read.

    Yields:
        A note where the lock of a dead process was taken over, else an empty text.

    Raises:
        LineageError: if another process writes; it is named.
    """
    lock = SoftFileLock(folder / LOCK, timeout=0, is_singleton=False)
    owner = folder / OWNER
    with disk_errors(folder):
        _remove_torn(folder / LOCK)
        try:
            lock.acquire()
        except Timeout as error:
            raise LineageError(
                f"{folder} is being written by {_described(owner)}",
                hint=f"wait until it is done; if that process no longer exists, delete {folder / LOCK}",
            ) from error
    try:
        # Whoever leaves in good order removes this file before the lock.
        note = f"took over the lock of {_described(owner)}, which is gone" if owner.exists() else ""
        started = datetime.now(UTC).isoformat(timespec="seconds")
        facts = {"command": command, "pid": os.getpid(), "host": socket.gethostname(), "since": started}
        with disk_errors(folder):
            write_json(owner, facts)
        yield note
    finally:
        try:
            owner.unlink(missing_ok=True)
        finally:
            lock.release()


def _remove_torn(lock: Path) -> None:
    """Delete a lock that names nobody; its owner writes its name the moment after making it."""
    with suppress(FileNotFoundError):
        status = lock.stat()
        if status.st_size == 0 and time.time() - status.st_mtime > TORN_AFTER:
            lock.unlink()


def _described(owner: Path) -> str:
    """`retain train` (process 12 on vm, since 2025-01-31T12:00:00+00:00)."""
    try:
        facts = read_json(owner)
        return f"`{facts['command']}` (process {facts['pid']} on {facts['host']}, since {facts['since']})"
    except (LineageError, KeyError, TypeError):
        return "another process"  # it is just about to say who it is
