"""What is kept between runs on one machine: converted models, and the digests of large files."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock

__all__ = ["cache_folder", "digest", "write_once"]


def cache_folder() -> Path:
    """$RETAIN_CACHE, else ~/.cache/retain."""
    return Path(os.environ.get("RETAIN_CACHE") or Path.home() / ".cache" / "retain").expanduser()


def digest(files: Sequence[Path], cache: Path) -> str:
    """SHA-256 of the files joined; remembered by path, size and time of change, so that the second call is quick."""
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    memory = cache / "digests" / hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:32]
    if memory.is_file():
        return memory.read_text(encoding="ascii")
    hasher = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            while block := content.read(1 << 22):
                hasher.update(block)
    memory.parent.mkdir(parents=True, exist_ok=True)
    temporary = memory.with_name(f"{memory.name}.{os.getpid()}")
    temporary.write_text(hasher.hexdigest(), encoding="ascii")
    temporary.replace(memory)
    return hasher.hexdigest()


def write_once(folder: Path, write: Callable[[Path], None]) -> Path:
    """The folder, written first where it is not there: whole or not at all, and by one process of many.

    Args:
        folder: what is wanted.
        write: fills the folder that it is given, which takes the name of `folder` at the end.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():
            return folder
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed: whoever writes holds the lock
        partial.mkdir()
        try:
            write(partial)
            for path in [*partial.rglob("*"), partial]:
                _sync(path)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        _sync(folder.parent)
    return folder


def _sync(path: Path) -> None:
    """Let a file's content or a folder's names reach the disk before a rename makes them visible."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
