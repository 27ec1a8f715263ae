"""Many runs, each in a folder and a process of its own: what is finished stays, what another process has is waited for, what dies is told.

    <folder>/cell.json    what it is: the settings and their digest
    <folder>/result.json  how it ended
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import connection
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError
from lorakit.experiments.config import Trial
from lorakit.experiments.locks import claimed
from lorakit.formats.files import PREFIX, read_json, sha256, writing

Say = Callable[[str], None]
Todo = list[tuple[Trial, dict[str, Any], bool]]


def settings(trial: Trial) -> dict[str, Any]:
    """All that decides a trial's result, what local data files hold included."""
    out = trial.settings()
    for key in ("data.train", "data.eval", "forgetting.data"):
        if out.get(key) and Path(out[key]).is_file():
            out[f"{key} (sha256)"] = sha256(Path(out[key]))
    return out


def digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two settings, in a line."""
    keys = [k for k in dict.fromkeys([*was, *now]) if was.get(k) != now.get(k)]
    return ", ".join(f"{k}: {_short(was.get(k))} → {_short(now.get(k))}" for k in keys)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:12]}…"


def plan(trials: Sequence[Trial], again: bool = False) -> Todo:
    """(trial, its settings, whether it is to run). LorakitError where what is finished was made with other settings."""
    from lorakit.experiments import work

    out, changed = [], []
    for trial in trials:
        now, done = settings(trial), work.finished(trial)
        same = done is not None and done["digest"] == digest(now)
        if done is not None and not same and not again:
            was = read_json(trial.folder / "cell.json")["settings"]
            changed.append(f"{trial.name} ({changes(was, now)})")
        ours(trial.folder)
        out.append((trial, now, not same))
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise LorakitError(f"{trials[0].folder.parents[1]} holds results made with other settings: {changed[0]}{more}; mend: another `output`, or --again "
                           "to run these anew")
    return out


def ours(folder: Path) -> None:
    """LorakitError where a folder that is to be written holds what no experiment made."""
    if folder.is_dir() and not (folder / "cell.json").is_file() and any(not f.name.startswith((PREFIX, ".")) for f in folder.iterdir()):
        raise LorakitError(f"{folder} holds files that no comparison wrote; mend: another `output`, or move them away")


def run_all(todo: Todo, jobs: int, begun: float, say: Say, name: str) -> None:
    """Runs what is to run, so many at once, and waits for what other processes have claimed."""
    from lorakit.experiments import work

    pool = processes()
    pending = [(n, trial, now) for n, (trial, now, run) in enumerate(todo, 1) if run]
    running: dict[Any, tuple[int, Trial, dict[str, Any]]] = {}
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else None

    def told(n: int, trial: Trial, whose: str = "") -> None:
        say(f"[{n}/{len(todo)}] {trial.name}  {_told(read_json(trial.folder / 'result.json'), name)}{whose}")

    try:
        while pending or running:
            for process in [q for q in running if not q.is_alive()]:
                n, trial, now = running.pop(process)
                process.join()
                if _ended(trial, now, begun) or (process.exitcode and failed(trial, now, ended_with(process.exitcode, trial), begun)):
                    told(n, trial)
                else:  # another process took it first
                    pending.append((n, trial, now))
            for one in list(pending):
                n, trial, now = one
                if len(running) >= jobs:
                    break
                if _ended(trial, now, begun):
                    pending.remove(one)
                    told(n, trial, ", by another process")
                elif _free(trial):
                    pending.remove(one)
                    process = pool.Process(target=work.one, args=(trial, digest(now), now, threads))
                    process.start()
                    running[process] = one
            if running:
                connection.wait([q.sentinel for q in running], timeout=0.5)
            elif pending:
                time.sleep(0.3)
    finally:
        for process in running:
            process.kill()
            process.join()


def processes() -> Any:
    """A context whose processes begin with the libraries loaded."""
    pool = multiprocessing.get_context("forkserver")
    pool.set_forkserver_preload(["lorakit.experiments.work"])
    return pool


def _free(trial: Trial) -> bool:
    with claimed(trial.folder) as mine:
        return mine


def _ended(trial: Trial, now: dict[str, Any], begun: float) -> bool:
    """Whether the trial has a result with these settings: a good one, or a failure since this comparison began."""
    from lorakit.experiments import work

    result = work.outcome(trial)
    if result is None or result["digest"] != digest(now):
        return False
    with suppress(FileNotFoundError):
        return result["status"] == "ok" or (trial.folder / "result.json").stat().st_mtime >= begun
    return False


def ended_with(code: int | None, trial: Trial) -> str:
    """Why a process left no result."""
    why = f"signal {-code}" + " (out of memory?)" * (code == -9) if code and code < 0 else f"exit code {code}"
    last = trial.folder / "log.txt"
    return f"the process ended with {why}" + (f"; its last words are in {last}" if last.is_file() else "")


def failed(trial: Trial, now: dict[str, Any], error: str, begun: float) -> bool:
    """Writes a failure that a process could not write itself; False where another process has the trial."""
    with claimed(trial.folder) as mine:
        if not mine or _ended(trial, now, begun):
            return _ended(trial, now, begun)
        head = trial.head(digest(now))
        if not (trial.folder / "cell.json").is_file() or read_json(trial.folder / "cell.json")["digest"] != head["digest"]:
            shutil.rmtree(trial.folder, ignore_errors=True)
        with writing(trial.folder) as w:
            w.json("cell.json", head | {"settings": now})
            w.json("result.json", head | {"status": "failed", "error": error})
    return True


def _told(result: dict[str, Any], name: str) -> str:
    if result["status"] != "ok":
        return f"failed: {result['error']}"
    before, after = (result["metrics"][k][name] for k in ("before", "after"))
    return f"{name} {before:.4g} → {after:.4g}, {result['train_seconds']:.1f} s"
