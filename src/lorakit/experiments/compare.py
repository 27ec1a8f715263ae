"""A comparison: every cell with every seed, one after another in processes of their own, then the table.

    runs/comparison/<cell>/seed-<n>/   a run folder with cell.json (what it is) and result.json (how it ended)
    runs/comparison/comparison.md  .csv  .json
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError
from lorakit.experiments import table
from lorakit.experiments.config import METRICS, Compare, Trial
from lorakit.formats.files import PREFIX, fcntl, read_json, sha256, writing
from lorakit.training.prepare import Prepared, prepare

LOCK = ".lorakit-compare.lock"
Say = Callable[[str], None]


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds the comparison's folder; a second process is refused. The system gives it back when the first is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                who = os.pread(fd, 32, 0).decode().strip()
                raise LorakitError(f"another comparison (process {who or 'unknown'}) is writing {folder}; mend: wait for it, or another `output`") from None
            os.ftruncate(fd, 0)
            os.pwrite(fd, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(fd)


def settings(trial: Trial) -> dict[str, Any]:
    """All that decides a trial's result, what local data files hold included."""
    out = trial.settings()
    for key in ("data.train", "data.eval"):
        if out[key] and Path(out[key]).is_file():
            out[f"{key} (sha256)"] = sha256(Path(out[key]))
    return out


def digest(what: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def finished(trial: Trial) -> dict[str, Any] | None:
    """The result of a trial that ended well."""
    path = trial.folder / "result.json"
    result = read_json(path) if path.is_file() else None
    return result if result and result["status"] == "ok" else None


def _changed(trial: Trial, now: dict[str, Any]) -> str:
    was = read_json(trial.folder / "cell.json")["settings"]
    keys = [k for k in dict.fromkeys([*was, *now]) if was.get(k) != now.get(k)]
    return ", ".join(f"{k}: {_short(was.get(k))} → {_short(now.get(k))}" for k in keys)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:12]}…"


def plan(c: Compare, again: bool = False) -> list[tuple[Trial, dict[str, Any], bool]]:
    """(trial, its settings, whether it is to run). LorakitError where what is finished was made with other settings."""
    out, changed = [], []
    for trial in c.trials:
        now, done = settings(trial), finished(trial)
        same = done is not None and done["digest"] == digest(now)
        if done is not None and not same and not again:
            changed.append(f"{trial.cell} seed {trial.seed} ({_changed(trial, now)})")
        _ours(trial.folder)
        out.append((trial, now, not same))
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise LorakitError(f"{c.output} holds results made with other settings: {changed[0]}{more}; mend: another `output`, or --again to run these anew")
    return out


def _ours(folder: Path) -> None:
    if folder.is_dir() and not (folder / "cell.json").is_file() and any(not f.name.startswith((PREFIX, ".")) for f in folder.iterdir()):
        raise LorakitError(f"{folder} holds files that no comparison wrote; mend: another `output`, or move them away")


def metric(c: Compare, p: Prepared) -> str:
    """The metric that is compared. LorakitError where the data does not give the one that was asked for."""
    if p.heldout is None:
        raise LorakitError("a comparison needs held-out data; mend: data.eval, or data.eval_fraction above 0")
    given = ["accuracy"] if p.labels else ["exact_match"] * ("exact_match" in p.run.eval.metrics) + ["preference_accuracy"] * (p.shape == "preference")
    given += ["eval_loss"] if p.labels else ["eval_loss", "perplexity"]
    want = c.settings.metric or given[0]
    if want not in given:
        how = "; mend: eval: {metrics: [exact_match]}" if want == "exact_match" and not p.labels and p.shape != "text" else ""
        raise LorakitError(f"metric: {want} is not measured on data of shape {p.shape}, only {', '.join(given)}{how}")
    if "tokens" in next(t.budget for t in c.trials) and p.shape == "preference":
        raise LorakitError("budget.tokens: pairs of answers are not counted in tokens; mend: a budget of steps or seconds")
    return want


def compare(c: Compare, *, again: bool = False, say: Say = print) -> dict[str, Any]:
    """Runs what is not finished and returns what `comparison.json` holds. A cell that fails is a row with its error."""
    with alone(c.output):
        todo = plan(c, again)
        name = metric(c, prepare(c.trials[0].run))
        left = sum(run for *_, run in todo)
        say(f"{len(c.cells)} cells × {len(c.settings.seeds)} seeds: {left} to run, {len(todo) - left} finished before")
        pool = multiprocessing.get_context("forkserver")
        pool.set_forkserver_preload(["lorakit.experiments.work"])
        for n, (trial, now, run) in enumerate(todo, 1):
            if run:
                result = _run(pool, trial, now)
                say(f"[{n}/{len(todo)}] {trial.cell} seed {trial.seed}  {_told(result, name)}")
        results = [read_json(t.folder / "result.json") for t in c.trials]
        record = table.summarise(results, c.settings.model_dump(), name, METRICS[name])
        with writing(c.output) as w:
            w.json("comparison.json", record)
            w.text("comparison.csv", table.csv(record))
            w.text("comparison.md", table.markdown(record))
        return record


def _run(pool: Any, trial: Trial, now: dict[str, Any]) -> dict[str, Any]:
    from lorakit.experiments import work

    out = trial.folder
    shutil.rmtree(out, ignore_errors=True)
    with writing(out) as w:
        w.json("cell.json", {"cell": trial.cell, "seed": trial.seed, "digest": digest(now), "settings": now})
    process = pool.Process(target=work.one, args=(trial, digest(now)))
    process.start()
    try:
        process.join()
    finally:
        if process.is_alive():
            process.kill()
            process.join()
    if not (out / "result.json").is_file():
        code = process.exitcode
        why = f"signal {-code}" + " (out of memory?)" * (code == -9) if code and code < 0 else f"exit code {code}"
        with writing(out) as w:
            w.json("result.json", {"cell": trial.cell, "seed": trial.seed, "digest": digest(now), "status": "failed",
                                   "error": f"the process ended with {why}; its last words are in {out / 'log.txt'}"})
    return read_json(out / "result.json")


def _told(result: dict[str, Any], name: str) -> str:
    if result["status"] != "ok":
        return f"failed: {result['error']}"
    before, after = (result["metrics"][k][name] for k in ("before", "after"))
    return f"{name} {before:.4g} → {after:.4g}, {result['train_seconds']:.1f} s"
