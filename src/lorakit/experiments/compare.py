"""A comparison: learning rates are tuned, then every cell runs with every seed, each in a process of its own; then the table.

    runs/comparison/<cell>/seed-<n>/      a run folder with cell.json (what it is) and result.json (how it ended)
    runs/comparison/<cell>/tune-<rate>/   the same, of a trial that chooses the learning rate
    runs/comparison/tuning/               the rows that these trials train on and are judged by
    runs/comparison/report.html  comparison.md  .csv  .json

Each trial is claimed by a lock, so several processes on one folder share the work.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import connection
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError
from lorakit.experiments import machine, page, table
from lorakit.experiments.config import METRICS, Compare, Trial
from lorakit.experiments.locks import claimed, shared
from lorakit.formats.files import PREFIX, read_json, sha256, writing
from lorakit.training.prepare import Prepared, _hold_out, prepare

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


def _changed(trial: Trial, now: dict[str, Any]) -> str:
    was = read_json(trial.folder / "cell.json")["settings"]
    keys = [k for k in dict.fromkeys([*was, *now]) if was.get(k) != now.get(k)]
    return ", ".join(f"{k}: {_short(was.get(k))} → {_short(now.get(k))}" for k in keys)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:12]}…"


def plan(c: Compare, trials: Sequence[Trial], again: bool = False) -> Todo:
    """(trial, its settings, whether it is to run). LorakitError where what is finished was made with other settings."""
    from lorakit.experiments import work

    out, changed = [], []
    for trial in trials:
        now, done = settings(trial), work.finished(trial)
        same = done is not None and done["digest"] == digest(now)
        if done is not None and not same and not again:
            changed.append(f"{trial.name} ({_changed(trial, now)})")
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
    from lorakit.experiments import measure

    if p.heldout is None:
        raise LorakitError("a comparison needs held-out data; mend: data.eval, or data.eval_fraction above 0")
    given = ["accuracy"] if p.labels else ["exact_match"] * ("exact_match" in p.run.eval.metrics) + ["preference_accuracy"] * (p.shape == "preference")
    given += ["eval_loss"] if p.labels else ["eval_loss", "perplexity"]
    given += measure.given(p)
    want = c.settings.metric or given[0]
    if want not in given:
        how = "; mend: eval: {metrics: [exact_match]}" if want == "exact_match" and not p.labels and p.shape != "text" else ""
        raise LorakitError(f"metric: {want} is not measured on data of shape {p.shape}, only {', '.join(given)}{how}")
    measure.check(c.trials[0].extra, p)
    kinds = {t.cell: t.kind for t in c.trials}
    if not p.labels and "probe" in kinds.values():
        raise LorakitError(f"cell `{next(k for k, v in kinds.items() if v == 'probe')}`: a linear probe trains a classifier's head, and data of shape "
                           f"{p.shape} has no classes")
    if "tokens" in {k for t in [*c.trials, *c.tuning] for k in t.budget} and p.shape == "preference":
        raise LorakitError("budget.tokens: pairs of answers are not counted in tokens; mend: a budget of steps or seconds")
    if c.settings.forgetting:
        measure.Elsewhere(p.run, c.settings.forgetting.model_dump(), p)
    return want


def tuning_rows(c: Compare, p: Prepared) -> list[Trial]:
    """The tuning trials on rows of their own: the training rows of the comparison, a part of them held out. The final evaluation is not seen."""
    t = c.settings.tune
    run = p.run.model_copy(update={"data": p.run.data.model_copy(update={"eval_fraction": t.fraction, "split_seed": t.seed})})
    rows, held = _hold_out(p.rows, p.shape, run)
    if p.labels:  # a class that only the judging rows have could not be learnt
        known = {row["label"] for row in rows}
        rows, held = rows + [row for row in held if row["label"] not in known], [row for row in held if row["label"] in known]
    folder = c.output / "tuning"
    texts = {name: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some) for name, some in (("train.jsonl", rows), ("judge.jsonl", held))}
    if any(not (folder / n).is_file() or (folder / n).read_text(encoding="utf-8") != text for n, text in texts.items()):
        with writing(folder) as w:
            for n, text in texts.items():
                w.text(n, text)
    shape = {"sharegpt": "messages", "alpaca": "prompt_completion"}.get(p.shape, p.shape)
    change = {"train": str(folder / "train.jsonl"), "eval": str(folder / "judge.jsonl"), "shape": shape, "columns": {}, "split": None, "eval_split": None,
              "limit": None, "eval_limit": None, "eval_fraction": 0.1, "split_seed": None}
    return [dataclasses.replace(one, run=one.run.model_copy(update={"data": one.run.data.model_copy(update=change)})) for one in c.tuning]


def choose(cell: str, tried: dict[float, dict[str, Any]], name: str, higher: bool) -> dict[str, Any]:
    """The learning rate of a cell from its trials' results: the best metric, the lower loss where two are equal, then the lower rate."""
    values, best = {}, []
    for rate, result in sorted(tried.items()):
        after = result["metrics"]["after"] if result["status"] == "ok" else {}
        value, loss = after.get(name, math.nan), after.get("eval_loss", 0.0)
        values[f"{rate:g}"] = value if math.isfinite(value) else None
        if math.isfinite(value):
            best.append((-value if higher else value, loss if math.isfinite(loss) else math.inf, rate))
    rate = min(best)[2] if best else None
    return {"cell": cell, "values": values, "rate": rate, "edge": rate is not None and rate in (min(tried), max(tried)),
            "seconds": sum(r.get("train_seconds") or 0.0 for r in tried.values()),
            "errors": {f"{k:g}": r["error"] for k, r in sorted(tried.items()) if r["status"] != "ok"}}


def _choices(c: Compare, trials: Sequence[Trial], name: str) -> dict[str, dict[str, Any]]:
    out = {}
    for cell in dict.fromkeys(t.cell for t in trials):
        tried = {t.tunes: read_json(t.folder / "result.json") for t in trials if t.cell == cell}
        out[cell] = choose(cell, tried, name, METRICS[name])
    return out


def compare(c: Compare, *, again: bool = False, jobs: int = 1, say: Say = print, command: str = "") -> dict[str, Any]:
    """Runs what is not finished and returns what `comparison.json` holds. A cell that fails is a row with its error."""
    if jobs < 1:
        raise LorakitError(f"--jobs must be at least 1, not {jobs}")
    with shared(c.output, digest([t.settings() for t in [*c.tuning, *c.trials]])):
        p = prepare(c.trials[0].run)
        name = metric(c, p)
        begun, choices = time.time(), {}
        if c.tuning:
            trials = tuning_rows(c, p)
            todo = plan(c, trials, again)
            early = _early(c, trials, todo, name)
            plan(c, early, again)
            left = sum(run for *_, run in todo)
            say(f"tuning: {len({t.cell for t in trials})} cells × {len(c.settings.tune.learning_rate)} learning rates: {left} to run, "
                f"{len(todo) - left} finished before")
            _all(todo, jobs, begun, say, name)
            choices = _choices(c, trials, name)
            for one in choices.values():
                say(f"{one['cell']}: learning rate " + (f"{one['rate']:g}" + ", at the edge of the grid" * one["edge"] if one["rate"] else "not found"))
        finals = [t.rated(choices[t.cell]["rate"]) if choices.get(t.cell, {}).get("rate") else t for t in c.trials]
        todo = plan(c, finals, again)
        stuck = {cell for cell, one in choices.items() if one["rate"] is None}
        left = sum(run for *_, run in todo)
        say(f"{len(c.cells)} cells × {len(c.settings.seeds)} seeds: {left} to run, {len(todo) - left} finished before")
        for trial, now, run in todo:
            if run and trial.cell in stuck:
                errors = choices[trial.cell]["errors"]
                _failed(trial, now, "no learning rate of the grid could be trained: " + (next(iter(errors.values())) if errors else "all diverged"), begun)
        _all([one for one in todo if one[0].cell not in stuck], jobs, begun, say, name)
        results = [read_json(t.folder / "result.json") for t in finals]
        record = table.summarise(results, c.settings.model_dump(), name, METRICS[name])
        record |= {"tuning": list(choices.values()), "machine": machine.describe(results), "command": command, "jobs": jobs, "title": c.output.name,
                   "base": p.run.base.path, "data": {"train": p.run.data.train, "eval": p.run.data.eval, "shape": p.shape, "rows": len(p.rows),
                                                     "eval_rows": len(p.held)},
                   "curves": table.curves(c.output, record["cells"])}
        for row in record["cells"]:
            one = choices.get(row["cell"])
            row |= {"learning_rate": next(t.run.train.learning_rate for t in finals if t.cell == row["cell"]) if row["kind"] != "none" else None,
                    "rate_at_edge": one["edge"] if one else None}
        with writing(c.output) as w:
            w.json("comparison.json", record)
            w.text("comparison.csv", table.csv(record))
            w.text("comparison.md", table.markdown(record))
            w.text("report.html", page.html(record))
        return record


def _early(c: Compare, trials: Sequence[Trial], todo: Todo, name: str) -> list[Trial]:
    """The runs that count of the cells whose rate is chosen already: what was made with other settings is refused before anything runs."""
    ready = {t.cell for t in trials} - {t.cell for t, _, run in todo if run}
    chosen = _choices(c, [t for t in trials if t.cell in ready], name)
    return [t.rated(chosen[t.cell]["rate"]) for t in c.trials if t.cell in ready and chosen[t.cell]["rate"]]


def _all(todo: Todo, jobs: int, begun: float, say: Say, name: str) -> None:
    """Runs what is to run, so many at once, and waits for what other processes have claimed."""
    from lorakit.experiments import work

    pool = multiprocessing.get_context("forkserver")
    pool.set_forkserver_preload(["lorakit.experiments.work"])
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
                if _ended(trial, now, begun) or (process.exitcode and _failed(trial, now, _why(process.exitcode, trial), begun)):
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


def _why(code: int | None, trial: Trial) -> str:
    why = f"signal {-code}" + " (out of memory?)" * (code == -9) if code and code < 0 else f"exit code {code}"
    last = trial.folder / "log.txt"
    return f"the process ended with {why}" + (f"; its last words are in {last}" if last.is_file() else "")


def _failed(trial: Trial, now: dict[str, Any], error: str, begun: float) -> bool:
    """Writes a failure that a process could not write itself; False where another process has the trial."""
    with claimed(trial.folder) as mine:
        if not mine or _ended(trial, now, begun):
            return _ended(trial, now, begun)
        head = {"cell": trial.cell, "seed": trial.seed, "tunes": trial.tunes, "digest": digest(now)}
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
