"""The suite must be able to fail: every seeded bug is caught. By default three of them are run, others each day; `slow` runs all."""

from __future__ import annotations

import datetime
import os

import pytest

from lorakit.errors import LorakitError
from lorakit.testing import bugs
from lorakit.testing.bugs import BUGS, PACKAGE

DAY = int(os.environ.get("LORAKIT_SAMPLE", datetime.date.today().toordinal()))
TODAY = [list(BUGS)[(DAY * 3 + k) % len(BUGS)] for k in range(3)]


@pytest.mark.parametrize("name", BUGS)
def test_the_place_of_every_bug_is_there_once(name):
    bug = BUGS[name]
    text = (PACKAGE / bug.file).read_text(encoding="utf-8")
    assert text.count(bug.old) == 1, f"{bug.file} changed: mend the seeded bug `{name}`"
    assert bug.new != bug.old and bug.guards
    compile(text.replace(bug.old, bug.new), bug.file, "exec")


def test_there_are_enough_of_them_in_every_part():
    assert len(BUGS) >= 24
    assert {b.file.split("/")[0] for b in BUGS.values()} >= {
        "maps.py", "method.py", "methods", "sites", "stores", "host", "spec.py", "kernels", "formats", "proof.py", "api.py"}


def test_three_of_today_are_caught():
    missed = [n for n, by in bugs.run(TODAY).items() if not by]
    assert not missed, f"no test fails with: {missed}"


@pytest.mark.slow
def test_all_are_caught():
    missed = [n for n, by in bugs.run().items() if not by]
    assert not missed, f"no test fails with: {missed}"


def test_an_unknown_bug_is_named():
    with pytest.raises(LorakitError, match="no seeded bug `gain ignored`; did you mean `gain ignored in update`"):
        bugs.run(["gain ignored"])
