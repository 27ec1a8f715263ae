"""Several processes on one comparison: each trial is done by one of them, and all of them want the same comparison.

The system gives a lock back when its process ends, however it ends. A file system without locks has one process at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorakit.errors import LorakitError
from lorakit.formats.files import fcntl

LOCK, TURN = ".lorakit-compare.lock", ".lorakit-turn.lock"


@contextmanager
def shared(folder: Path, digest: str) -> Iterator[None]:
    """Holds the comparison's folder together with others of the same settings. LorakitError where one with other settings is at work."""
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the first says what is compared
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{digest} {os.getpid()}".encode(), 0)
            except BlockingIOError:
                pass
            fcntl.flock(fd, fcntl.LOCK_SH)
            theirs, _, who = os.pread(fd, 200, 0).decode().partition(" ")
            if theirs != digest:
                raise LorakitError(f"another comparison, with other settings (process {who or 'unknown'}), is writing {folder}; "
                                   "mend: wait for it, or another `output`")
        yield
    finally:
        os.close(fd)


def _file(trial: Path) -> Path:
    return trial.parent / f".{trial.name}.lock"


@contextmanager
def claimed(trial: Path) -> Iterator[bool]:
    """Whether this process may work on the trial's folder; until the block ends no other one may."""
    trial.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(_file(trial), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        mine = True
        if fcntl:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                mine = False
        yield mine
    finally:
        os.close(fd)


@contextmanager
def turn(folder: Path) -> Iterator[None]:
    """One process after another: waits until no other one is inside the block for this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder / TURN, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl:
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
