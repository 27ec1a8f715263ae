"""Writing a set of files so that a reader finds all of the old ones or all of the new ones, whenever the writer is killed.

Every file is first written under a temporary name and flushed. Then a journal lists the renames to come; once the journal
is there the write has happened, and whoever opens the folder next finishes the renames. Before that, nothing has changed.
A lock on the folder keeps readers out while files are renamed, where the file system has locks.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorakit.errors import LorakitError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

JOURNAL = ".lorakit-commit.json"
PREFIX = ".lorakit-tmp-"


class FolderWrite:
    """Handed out by `writing`: `path(name)` is where to write the file that will be called `name`."""

    def __init__(self, folder: Path):
        self.folder, self.names = folder, []

    def path(self, name: str) -> Path:
        self.names.append(name)
        return self.folder / f"{PREFIX}{name}"

    def text(self, name: str, text: str) -> None:
        self.path(name).write_text(text, encoding="utf-8")

    def json(self, name: str, data: object) -> None:
        write_json(self.path(name), data)


def write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _locked(folder: Path, alone: bool) -> Iterator[None]:
    """Holds the folder's lock, alone or with other readers. The system gives it back when a process is killed."""
    fd = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        with suppress(OSError):  # a file system without locks
            if fcntl:
                fcntl.flock(fd, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
    finally:
        if fd is not None:
            os.close(fd)


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Inside, the folder's files belong together: a write that was cut off is finished first, and no other one renames."""
    while True:
        if (folder / JOURNAL).is_file():
            with _locked(folder, alone=True):
                recover(folder)
        with _locked(folder, alone=False):
            if not (folder / JOURNAL).is_file():
                yield
                return


def recover(folder: Path) -> None:
    """Finishes a write that was cut off between its journal and its last rename. The caller holds the lock."""
    journal = folder / JOURNAL
    if not journal.is_file():
        return
    for name in json.loads(journal.read_text(encoding="utf-8")):
        with suppress(FileNotFoundError):  # done before, or just now by another process that opened the folder
            os.replace(folder / f"{PREFIX}{name}", folder / name)
    journal.unlink(missing_ok=True)


def _clean(folder: Path) -> None:
    if not (folder / JOURNAL).exists():
        for left in folder.glob(f"{PREFIX}*"):
            left.unlink()


@contextmanager
def writing(folder: str | Path) -> Iterator[FolderWrite]:
    """All or nothing: files written through the handle appear together when the block ends without an error.

    Raises LorakitError, naming the folder and the free space, when the disk is full or the folder cannot be written.
    """
    folder = Path(folder)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise _not_written(folder, e) from e
    with _locked(folder.parent, alone=True):  # one writer at a time, also of several processes
        yield from _written(folder, made)


def _written(folder: Path, made: bool) -> Iterator[FolderWrite]:
    try:
        folder.mkdir(exist_ok=True)  # another writer may have taken its own away
        with _locked(folder, alone=True):
            recover(folder)
            _clean(folder)
        out = FolderWrite(folder)
        yield out
        umask = os.umask(0)
        os.umask(umask)
        for name in out.names:
            (folder / f"{PREFIX}{name}").chmod(0o666 & ~umask)  # some writers make files that only their owner can read
            _flush(folder / f"{PREFIX}{name}")
        ready = folder / f"{PREFIX}journal"
        ready.write_text(json.dumps(out.names), encoding="utf-8")
        _flush(ready)
        with _locked(folder, alone=True):
            os.replace(ready, folder / JOURNAL)
            recover(folder)
        _flush(folder)
    except BaseException as e:
        _clean(folder)
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        if isinstance(e, OSError) or "No space left" in str(e):
            raise _not_written(folder, e) from e
        raise


def _not_written(folder: Path, e: BaseException) -> LorakitError:
    return LorakitError(f"could not write {folder}: {e} ({_free(folder)}); nothing that was there before is changed")


def _free(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 2**20:.1f} MiB free"


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Where to write the file that will be called `path` when the block ends without an error; else nothing is left.

    Raises LorakitError when the disk is full or the place cannot be written.
    """
    tmp = path.with_name(f"{PREFIX}{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        _flush(tmp)
        os.replace(tmp, path)
    except BaseException as e:
        with suppress(OSError):
            tmp.unlink(missing_ok=True)
        if isinstance(e, OSError) or "No space left" in str(e):
            raise _not_written(path, e) from e
        raise


def sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read_json(path: Path) -> dict:
    """A JSON object. LorakitError naming the file and the place where it breaks."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LorakitError(f"{path.parent}: there is no {path.name}{_beside(path)}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise LorakitError(f"{path} is not valid JSON (truncated?): {e}") from None
    if not isinstance(data, dict):
        raise LorakitError(f"{path} should hold a JSON object, not a {type(data).__name__}")
    return data


def _beside(path: Path) -> str:
    if not path.parent.is_dir():
        return " because that folder does not exist"
    there = sorted(p.name for p in path.parent.iterdir())[:8]
    return f"; the folder holds {', '.join(there) or 'nothing'}"


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder made under a temporary name beside `path` and renamed when the block ends without an error.

    An existing folder of that name is replaced only then. Raises LorakitError when the disk is full.
    """
    tmp = path.with_name(f"{PREFIX}{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir()
        yield tmp
        old = path.with_name(f"{PREFIX}old-{path.name}")
        if path.exists():
            os.replace(path, old)
        os.replace(tmp, path)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as e:
        shutil.rmtree(tmp, ignore_errors=True)
        if isinstance(e, OSError) or "No space left" in str(e):
            raise _not_written(path, e) from e
        raise
