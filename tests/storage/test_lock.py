import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from retain.errors import LineageError
from retain.storage.documents import read_json, write_json
from retain.storage.lock import exclusive

HOLD = """
import sys, time
from pathlib import Path
from retain.storage.lock import exclusive
with exclusive(Path(sys.argv[1]), "retain train desk.yaml"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_it_says_who_writes_and_leaves_nothing(tmp_path: Path):
    with exclusive(tmp_path, "retain train") as note:
        assert note == ""
        facts = read_json(tmp_path / "lineage.owner.json")
        assert (facts["command"], facts["pid"]) == ("retain train", os.getpid())
        assert {"host", "since"} <= set(facts)
    assert list(tmp_path.iterdir()) == []


def test_it_is_left_also_by_an_error(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), exclusive(tmp_path, "retain train"):
        raise KeyboardInterrupt
    with exclusive(tmp_path, "again") as note:
        assert note == ""


def test_a_second_writer_is_refused_and_told_the_first(tmp_path: Path):
    with exclusive(tmp_path, "retain train"):
        with pytest.raises(LineageError, match=r"`retain train` \(process"), exclusive(tmp_path, "other"):
            pass
        assert read_json(tmp_path / "lineage.owner.json")["command"] == "retain train"


def test_one_process_at_a_time_also_after_a_sudden_death(tmp_path: Path, holder: subprocess.Popen[str]):
    with pytest.raises(LineageError) as caught, exclusive(tmp_path, "retain rollback"):
        pass
    assert f"`retain train desk.yaml` (process {holder.pid} on " in caught.value.message
    assert "lineage.lock" in caught.value.hint

    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with exclusive(tmp_path, "retain rollback") as note:
        assert note.startswith(f"took over the lock of `retain train desk.yaml` (process {holder.pid} on ")
    with exclusive(tmp_path, "retain rollback") as note:
        assert note == ""


def test_a_lock_of_another_host_is_never_broken(tmp_path: Path):
    """Nobody here can know whether a process lives there."""
    with exclusive(tmp_path, "x"):
        marker = (tmp_path / "lineage.lock").read_text().splitlines()
    (tmp_path / "lineage.lock").write_text("\n".join(["999999", "another-host", *marker[2:]]) + "\n")
    write_json(tmp_path / "lineage.owner.json", {"command": "c", "pid": 999999, "host": "another-host", "since": "s"})
    for _ in range(3):
        with pytest.raises(LineageError, match="another-host"), exclusive(tmp_path, "y"):
            pass


def test_an_owner_that_cannot_be_read_is_still_refused_and_taken_over(tmp_path: Path):
    with exclusive(tmp_path, "x"):
        (tmp_path / "lineage.owner.json").write_text("{")
        with pytest.raises(LineageError, match="another process"), exclusive(tmp_path, "y"):
            pass
    (tmp_path / "lineage.owner.json").write_text("{")
    with exclusive(tmp_path, "y") as note:
        assert "another process, which is gone" in note


def test_a_lock_that_a_power_cut_emptied_is_removed_after_a_while(tmp_path: Path):
    lock = tmp_path / "lineage.lock"
    lock.touch()
    with pytest.raises(LineageError), exclusive(tmp_path, "x"):  # its owner may be about to write
        pass
    os.utime(lock, (0, 0))
    with exclusive(tmp_path, "x"):
        assert lock.read_text()
