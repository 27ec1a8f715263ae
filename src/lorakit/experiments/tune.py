"""A search: trials are drawn, run and told to a study that several processes share; then the best is held against the default on held-out data.

    runs/search/study.db          the study (optuna, SQLite)
    runs/search/trials/<number>/  a run folder with cell.json (what it is) and result.json (how it ended); 0000 is the default configuration
    runs/search/rows/             the rows that the trials train on and are judged by
    runs/search/final/            a comparison: the best and the default, all training rows, the held-out rows, several seeds
    runs/search/best.yaml         the answer, for `lorakit train`
    runs/search/report.html  tune.md  .csv  .json
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import yaml

from lorakit.errors import LorakitError
from lorakit.experiments import compare as finals
from lorakit.experiments import config, findings, machine, tune_page
from lorakit.experiments.config import METRICS, Budget, Compare, Trial
from lorakit.experiments.rows import apart
from lorakit.experiments.runs import Say, digest, ended_with, ours, processes, settings
from lorakit.experiments.search import Tune
from lorakit.experiments.space import short, words
from lorakit.experiments.study import Draw, Study, library, readable
from lorakit.formats.files import read_json, writing
from lorakit.training.prepare import prepare

ALL_FAILED = 3  # failures in a row, with no success at all, that end the search


def tune(t: Tune, *, say: Say = print, command: str = "") -> dict[str, Any]:
    """Runs or joins the search, makes the final comparison, and returns what `tune.json` holds. A trial that fails is a row with its error."""
    library()
    p = prepare(t.default.run)
    final = config.Settings(seeds=t.settings.seeds, budget=t.settings.budget, metric=t.settings.metric, confidence=t.settings.confidence,
                            output=str(t.output / "final"))
    metric = finals.metric(Compare(final, [t.default], []), p)
    with readable(t.output):
        study = Study(t, metric, _decides(t, metric))
        change = apart(p, t.search.fraction, t.search.seed, t.output / "rows")
        why = _search(t, study, metric, change, say)
        rows = study.rows()
    best = findings.ranked(rows, METRICS[metric])[0]
    if best["value"] is None:
        raise LorakitError(f"no trial ended with a finite {metric}, so there is nothing to choose from ({why}); the trials are in {t.output / 'trials'}")
    say(f"search ended: {why}; best is trial {best['number']}" + (", the default" if best["default"] else f": {words(best['params'])}"))
    trials = _finals(t, rows, best)
    record = finals.compare(Compare(final, trials, []), again=True, say=say, command=command)
    answer = _answer(t, trials[0], best, metric)
    out = findings.summarise(t, metric, rows, best, why, record, study.importance()) | {
        "machine": machine.describe([read_json(x.folder / "result.json") for x in trials]), "command": command, "yaml": answer}
    with writing(t.output) as w:
        w.json("tune.json", out)
        w.text("tune.csv", findings.csv(out))
        w.text("tune.md", findings.markdown(out))
        w.text("report.html", tune_page.html(out))
        w.text("best.yaml", answer)
    return out


def _decides(t: Tune, metric: str) -> dict[str, Any]:
    """All that decides what a trial's result means; how many there are may change."""
    s = t.search
    space = {f"search.space.{key}": str(a) for key, a in t.space.axes.items()}
    out = settings(t.default) | space | {"metric": metric, "search.seed": s.seed, "search.fraction": s.fraction, "search.early_stopping": s.early_stopping}
    return json.loads(json.dumps(out, default=str))


def _search(t: Tune, study: Study, metric: str, change: dict[str, Any], say: Say) -> str:
    """Runs trials until there is a reason to end, and waits for those of other processes. The reason."""
    failures, told = 0, False
    before = len(study.rows())
    say(f"search over {', '.join(map(short, t.space.axes))}: {before} trials begun before" if before else f"search over {', '.join(map(short, t.space.axes))}")
    while True:
        with study.next(failures) as (draw, why, others):
            if draw is not None:
                state, error = _run(t, study, draw, metric, change, say)
                failures = failures + 1 if state == "failed" else 0
                if failures >= ALL_FAILED and all(r["state"] in ("failed", "running") for r in study.rows()):
                    raise LorakitError(f"{failures} trials in a row failed and none succeeded; the last one: {error}")
                continue
        if not others:
            return why
        if not told:
            say(f"waiting for trial {', '.join(map(str, others))} of another process")
            told = True
        time.sleep(0.3)


def _run(t: Tune, study: Study, draw: Draw, metric: str, change: dict[str, Any], say: Say) -> tuple[str, str | None]:
    """One trial, from its draw to what the study is told: (how it ended, its error)."""
    try:
        trial = (t.default if draw.default else t.trial(draw.number, draw.params)).on(change)
    except LorakitError as e:
        result = {"status": "failed", "error": str(e)}
    else:
        ours(trial.folder)
        result = _result(trial, study, draw, metric)
    state = {"ok": "complete", "stopped": "stopped"}.get(result["status"], "failed")
    value = result["metrics"]["after"][metric] if state == "complete" else draw.last
    if state != "failed" and not math.isfinite(value):
        state = "diverged"
    about = {"error": result.get("error"), "steps": result.get("steps", 0), "tokens": result.get("tokens", 0), "seconds": result.get("train_seconds", 0.0),
             "metrics": result.get("metrics", {}).get("after", {})}
    study.tell(draw, state, value, about)
    most = f"/{t.search.trials}" if t.search.trials else ""
    say(f"[{len(study.rows())}{most}] trial {draw.number}{' (default)' * draw.default}  {words(draw.params)}  "
        + findings.ended(about | {"state": state, "value": value}, metric))
    return state, about["error"]


def _result(trial: Trial, study: Study, draw: Draw, metric: str) -> dict[str, Any]:
    """What `result.json` holds in the end; the run is stopped at an evaluation where the study says so."""
    from lorakit.experiments import work

    now = settings(trial)
    key, name = digest(now), metric if metric.startswith("eval_") else f"eval_{metric}"
    result = work.outcome(trial)
    if draw.begun > 1 and result is not None and result["digest"] == key:
        return result  # only the study had not been told
    while True:
        code = _process(trial, key, now, lambda n, found: study.stops(draw, n, found[name]))
        if code:
            return {"status": "failed", "error": ended_with(code, trial)}
        result = work.outcome(trial)
        if result is not None and result["digest"] == key:
            return result
        time.sleep(0.3)  # a process that lost its parent a moment ago still has the folder


def _process(trial: Trial, key: str, now: dict[str, Any], stops: Callable[[int, dict[str, float]], bool]) -> int:
    """Runs a trial in a process of its own, answers its questions, and returns its exit code."""
    from lorakit.experiments import work

    pool = processes()
    here, there = pool.Pipe()
    process = pool.Process(target=work.one, args=(trial, key, now, None, there))
    process.start()
    there.close()
    try:
        with suppress(EOFError, OSError):  # it ended
            while True:
                n, _, found = here.recv()
                here.send(stops(n, found))
        process.join()
        return process.exitcode
    finally:
        process.kill()
        process.join()
        here.close()


def _finals(t: Tune, rows: list[dict[str, Any]], best: dict[str, Any]) -> list[Trial]:
    """The runs of the final comparison; the answer's first. The default alone where nothing better was found."""
    s, own = t.settings, next(iter(t.default.budget), "steps")
    extra = t.default.extra
    cells = {} if best["default"] else {findings.ANSWER: (best["params"], s.budget)}
    cells[findings.DEFAULT] = ({}, s.budget)
    if s.whole_budget:
        whole = sum(r[own] for r in rows) + (t.default.budget.get(own) or best[own])
        cells[findings.WHOLE] = ({}, Budget(**{own: whole}))
    return [t.final(cell, params, seed, budget, extra) for cell, (params, budget) in cells.items() for seed in s.seeds]


def _answer(t: Tune, first: Trial, best: dict[str, Any], metric: str) -> str:
    """A whole configuration for `lorakit train`, with the steps that the budget came to."""
    run, result = first.run, read_json(first.folder / "result.json")
    if t.settings.budget:
        run = run.model_copy(update={"train": run.train.model_copy(update={"max_steps": result.get("steps") or best["steps"]})})
    run = run.model_copy(update={"output": str(t.output / findings.ANSWER)})
    what = "the default configuration: nothing better was found" if best["default"] else words(best["params"])
    head = f"# Found by lorakit tune, trial {best['number']}: {what}\n# {metric} on the rows that judged: {best['value']:.6g}\n"
    return head + yaml.safe_dump(run.model_dump(), sort_keys=False, allow_unicode=True)
