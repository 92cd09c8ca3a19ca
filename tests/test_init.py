"""The public names: each is there, under the name that it says."""

import subprocess
import sys

import retain


def test_every_public_name_loads() -> None:
    for name in retain.__all__:
        value = getattr(retain, name)
        assert name in (getattr(value, "__name__", name), name)


def test_the_lazy_table_holds_the_public_names_and_no_other() -> None:
    assert sorted(name for names in retain.HOMES.values() for name in names) == sorted(retain.__all__)


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, retain; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
