"""Searches: spaces, budgets, early stopping, processes that die or join, the final verdict, the answer, the report, mistakes."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import test_comparison_page
import test_experiments
import test_training
import yaml

from lorakit.errors import LorakitError
from lorakit.experiments import findings, locks, search, space, tune_page, work
from lorakit.experiments import tune as e
from lorakit.experiments.study import Study
from lorakit.training import config as c
from lorakit.training import run as r_
from lorakit.training.prepare import prepare

optuna = pytest.importorskip("optuna", reason="optuna is not installed (lorakit[tune])")
base, browser = test_training.base, test_comparison_page.browser
QUIET = {"say": lambda text: None}
SPACE = {"learning_rate": {"low": 1e-4, "high": 5e-2, "log": True}, "r": [2, 4]}


def raw(base: Path, tmp: Path, find: dict | None = None, **kw) -> dict:
    """A search of three trials of eight steps; the default learns slowly."""
    out = test_experiments.raw(base, tmp, output=str(tmp / "out"), seeds=2, budget={"steps": 8})
    out.pop("cells")
    out["train"] = {"learning_rate": 1e-4, "batch_size": 8, "threads": 1, "logging_steps": 1}
    return out | {"adapter": {"method": "lora", "lora_r": 4}, "search": {"space": SPACE, "trials": 3, "early_stopping": "none", **(find or {})}} | kw


# The space


def drawn(s: space.Space, **params) -> dict:
    return s.draw(optuna.trial.FixedTrial(params))


def test_a_draw_is_a_configuration_of_its_method(base, tmp_path):
    t = search.parse(raw(base, tmp_path, {"space": {
        "r": [2, 4], "lora_alpha": {"low": 4, "high": 16, "step": 4}, "method": ["lora", "dora", "ia3", "hra"], "adapter.init": ["kaiming", "pissa"],
        "target_modules": [["q_proj", "v_proj"], "all-linear"], "hooks": [[], [{"lora_plus": {"ratio": 8}}]],
        "train.learning_rate": {"low": "1e-5", "high": 1e-2}}}, adapter={"method": "lora", "lora_r": 4, "lora_alpha": 8}))
    assert list(t.space.axes) == ["adapter.method", "adapter.r", "adapter.alpha", "adapter.init", "adapter.targets", "hooks", "train.learning_rate"]
    some = {"adapter.r": 2, "adapter.alpha": 12, "adapter.init": "pissa", "adapter.targets": "q_proj+v_proj", "train.learning_rate": 1e-3,
            "hooks": "[{lora_plus: {ratio: 8}}]"}
    params = drawn(t.space, **some, **{"adapter.method": "lora"})
    run = t.trial(3, params).run
    assert run.adapter == {"method": "lora", "r": 2, "alpha": 12, "init": "pissa", "targets": ["q_proj", "v_proj"]}
    assert run.hooks == [{"lora_plus": {"ratio": 8}}] and run.train.learning_rate == 1e-3 and run.train.seed == 1000 and run.output.endswith("trials/0003")
    assert run.spec().method.r == 2 and run.spec().init == "pissa" and t.default.run.adapter == {"method": "lora", "r": 4, "alpha": 8}
    params = drawn(t.space, **some, **{"adapter.method": "ia3"})
    assert set(params) == {"adapter.method", "adapter.targets", "hooks", "train.learning_rate"}, "ia3 has no rank, no alpha, no such start"
    assert t.trial(4, params).run.adapter == {"method": "ia3", "targets": ["q_proj", "v_proj"]}, "nor does it inherit the default's"
    assert t.trial(5, drawn(t.space, **some, **{"adapter.method": "hra"})).run.adapter == {"method": "hra", "r": 2, "targets": ["q_proj", "v_proj"]}
    first = t.space.default(t.default.run)
    assert first == {"adapter.method": "lora", "adapter.r": 4, "adapter.alpha": 8.0, "adapter.init": None, "adapter.targets": "all-linear", "hooks": [],
                     "train.learning_rate": 1e-4}
    assert t.space.within(first) == {"adapter.method": "lora", "adapter.r": 4, "adapter.alpha": 8.0, "adapter.targets": "all-linear", "hooks": "[]",
                                     "train.learning_rate": 1e-4}


def test_whole_adapters_and_what_is_left_of_a_finite_space(base, tmp_path):
    t = search.parse(raw(base, tmp_path, {"space": {"adapter": ["ia3", {"method": "lora", "lora_r": 4}, {"method": "dora"}], "r": [4, 8]}}))
    assert t.space.size == 6
    left = t.space.left([t.space.default(t.default.run)])
    assert [(p["adapter"]["method"], p.get("adapter.r")) for p in left] == [("ia3", None), ("lora", 8), ("dora", 4), ("dora", 8)]
    assert t.trial(1, left[1]).run.adapter == {"method": "lora", "r": 8} and t.space.left([*left, t.space.default(t.default.run)]) == []
    t = search.parse(raw(base, tmp_path, {"space": {"lora_alpha": [8, 16], "method": ["lora", "dora"]}}, adapter={"method": "lora", "lora_alpha": 8}))
    assert len(t.space.left([t.space.default(t.default.run)])) == 3, "alpha 8 is alpha 8.0"
    assert search.parse(raw(base, tmp_path)).space.left([]) is None, "a continuum is never used up"
    sizes = [space.axis(v, "x").size for v in ({"low": 1, "high": 9, "step": 2}, {"low": 1, "high": 10, "step": 2}, {"low": 0.0, "high": 0.3, "step": 0.1},
                                               {"low": 2, "high": 5}, {"low": 2.0, "high": 5})]
    assert sizes == [5, 5, 4, 4, None]
    steps = space.axis({"low": 4, "high": 16, "step": 4}, "x")
    assert [steps.has(v) for v in (4, 8.0, 6, 20, "8", True)] == [True, True, False, False, False, False]


WRONG = {
    "unknown key": ({"serch": {}}, "unknown key `serch`; did you mean `search`"),
    "no search": ({"search": None}, "`search`"),
    "unknown key of search": ({"search": {"trails": 3}}, "unknown key `search.trails`; did you mean `trials`"),
    "unknown key of the space": ({"space": {"lerning_rate": [1, 2]}}, "did you mean `learning_rate`"),
    "unknown option": ({"space": {"adapter.rr": [1, 2]}}, "has no option `rr`; did you mean `r`"),
    "unknown key of train": ({"space": {"train.learnin_rate": [1, 2]}}, "did you mean `learning_rate`"),
    "data in the space": ({"space": {"data.limit": [1, 2]}}, "unknown key `data.limit`"),
    "empty space": ({"space": {}}, "the space is empty"),
    "a choice of nothing": ({"space": {"r": []}}, "search.space.r has no values"),
    "a value twice": ({"space": {"r": [2, 4, 2]}}, "stands there twice"),
    "neither list nor range": ({"space": {"r": 3}}, "a list of values or a range"),
    "low above high": ({"space": {"r": {"low": 8, "high": 4}}}, "low must be below high, not 8 and 4"),
    "low is high": ({"space": {"learning_rate": {"low": 1e-3, "high": 1e-3}}}, "low must be below high"),
    "no high": ({"space": {"r": {"low": 8}}}, "needs `high`"),
    "a word for a bound": ({"space": {"r": {"low": "few", "high": 4}}}, "a number, not 'few'"),
    "unknown key of a range": ({"space": {"r": {"low": 1, "hihg": 4}}}, "unknown key `hihg`; did you mean `high`"),
    "a logarithm of zero": ({"space": {"learning_rate": {"low": 0, "high": 1, "log": True}}}, "begins above 0"),
    "log and step": ({"space": {"r": {"low": 1, "high": 8, "log": True, "step": 2}}}, "has no step"),
    "a step back": ({"space": {"r": {"low": 1, "high": 8, "step": -2}}}, "above 0, not -2"),
    "a value of the wrong kind": ({"space": {"learning_rate": [1e-3, -1]}}, "greater than 0"),
    "a range of methods": ({"space": {"method": {"low": 1, "high": 2}}}, "a list of values, no range"),
    "unknown method": ({"space": {"method": ["lora", "dorra"]}}, "did you mean `dora`"),
    "unknown hook": ({"space": {"hooks": [[], ["lora_pluss"]]}}, "did you mean `lora_plus`"),
    "the same twice": ({"space": {"r": [1, 2], "lora_r": [3, 4]}}, "is adapter.r, which stands there twice"),
    "a group": ({"space": {"train": [{"learning_rate": 1}]}}, "a group of settings"),
    "a seed to search": ({"space": {"train.seed": [1, 2]}}, "takes this from `seeds`"),
    "a length to search": ({"space": {"train.epochs": [1, 2]}}, "takes this from `budget`"),
    "no trials": ({"search": {"trials": 0}}, "`search.trials`: input should be greater than or equal to 1, not 0"),
    "negative trials": ({"search": {"trials": -3}}, "greater than or equal to 1, not -3"),
    "no end": ({"search": {"trials": None}}, "give `trials`, or a `budget`"),
    "a budget of nothing": ({"search": {"budget": {"steps": 7}}}, "7 steps do not hold one trial of 8"),
    "unknown unit": ({"search": {"budget": {"setps": 70}}}, "did you mean `steps`"),
    "unknown sampler": ({"search": {"sampler": "tpa"}}, "`search.sampler`"),
    "unknown stopping": ({"search": {"early_stopping": "mean"}}, "`search.early_stopping`"),
    "a fraction of all": ({"search": {"fraction": 1}}, "`search.fraction`"),
    "chosen by its own luck": ({"search": {"seed": 1}}, "the seed 1 is one of `seeds`"),
    "unknown metric": ({"metric": "eval_los"}, "did you mean `eval_loss`"),
    "a metric of other data": ({"metric": "accuracy"}, "not measured on data of shape prompt_completion"),
    "a metric of the end": ({"metric": "rouge_l", "search": {"early_stopping": "median"}}, "nothing can be stopped early by it"),
    "no points to stop at": ({"budget": {"seconds": 2}, "train": {"lr_scheduler_type": "constant"}, "search": {"early_stopping": "median"}}, "eval_steps"),
    "a rate that falls": ({"budget": {"seconds": 2}}, "lr_scheduler_type: constant"),
    "no held-out data": ({"data": {"train": "rows.jsonl", "eval_fraction": 0}}, "needs held-out data"),
    "missing data": ({"data": "row.jsonl"}, "row.jsonl"),
    "its own seed": ({"train": {"seed": 3}}, "from `seeds`"),
}


def test_mistakes_on_the_command_line(base, tmp_path, monkeypatch, capsys):
    """Each is one clear line on the error stream, exit 1, and nothing run."""
    from lorakit.cli import app

    monkeypatch.chdir(tmp_path)
    for what, (change, part) in WRONG.items():
        change = copy.deepcopy(change)
        find = {"space": change.pop("space")} if "space" in change else {}
        if isinstance(change.get("search"), dict):
            find |= change.pop("search")
        (tmp_path / "t.yaml").write_text(yaml.safe_dump(raw(base, tmp_path, find, **change)))
        monkeypatch.setattr(sys, "argv", ["lorakit", "tune", "t.yaml"])
        code = app.run(app.app)
        text = " ".join(capsys.readouterr().err.split())
        assert code == 1 and part in text and "Traceback" not in text, (what, code, text)
        assert not (tmp_path / "out" / "trials").exists(), what


def test_dry_run_and_settings_on_the_command_line(base, tmp_path, monkeypatch, capsys):
    from lorakit.cli import app

    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(raw(base, tmp_path)))
    words = ["--set", "search.trials=7", "--set", "search.budget={steps: 40}", "--set", "lora_r=8", "--set", "seeds=[3, 4, 5]", "--set", "whole_budget=true"]
    monkeypatch.setattr(sys, "argv", ["lorakit", "tune", "t.yaml", "--dry-run", *words])
    assert app.run(app.app) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("learning_rate: 0.0001 to 0.05 (logarithmic); default 0.0001", "r: 2, 4; default 8, outside of it", "until 7 trials or 40 steps",
                 "each trial 8 steps", "takes 40 steps at most", "final: 9 runs", "seeds 3, 4, 5", "a continuum"):
        assert part in text, part
    assert not (tmp_path / "out").exists()
    for word, part in (("serch.trials=3", "did you mean `search`"), ("search.trials", "takes key=value"), ("search.trals=3", "did you mean `trials`")):
        monkeypatch.setattr(sys, "argv", ["lorakit", "tune", "t.yaml", "--dry-run", "--set", word])
        assert app.run(app.app) == 1 and part in capsys.readouterr().err


def test_without_optuna_the_extra_is_named(base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(LorakitError, match=r"`optuna`.*lorakit\[tune\]"):
        e.tune(search.parse(raw(base, tmp_path)), **QUIET)


# The study, which knows nothing of what is run


def told(study: Study, value: float | None = 1.0, state: str = "complete", steps: int = 8, error: str | None = None) -> dict | str:
    """Draws a trial and tells how it ended; its parameters, or why there is none."""
    with study.next(0) as (draw, why, _):
        if draw is None:
            return why
        study.tell(draw, state, value, {"steps": steps, "tokens": 0, "seconds": 0.5, "error": error})
        return draw.params


def study(base: Path, tmp: Path, find: dict | None = None, **kw) -> Study:
    t = search.parse(raw(base, tmp, find, **kw))
    return Study(t, "eval_loss", e._decides(t, "eval_loss"))


def test_a_search_that_goes_on_draws_what_it_would_have_drawn(base, tmp_path):
    def values(s, n):
        return [told(s, abs(i - 3.5)) for i in range(n)]

    whole = values(study(base, tmp_path, {"trials": 9}, output=str(tmp_path / "a")), 8)
    parts = [told(study(base, tmp_path, {"trials": 9}, output=str(tmp_path / "b")), abs(i - 3.5)) for i in range(8)]
    assert whole == parts and whole[0] == {"train.learning_rate": 1e-4, "adapter.r": 4}
    assert len({p["train.learning_rate"] for p in whole}) == 8 and {p["adapter.r"] for p in whole} == {2, 4}
    other = values(study(base, tmp_path, {"trials": 3, "seed": 1001}, output=str(tmp_path / "c")), 2)
    assert other[0] == whole[0] and other[1] != whole[1]


def test_a_trial_whose_process_is_gone_is_begun_again_and_one_that_lives_is_not(base, tmp_path):
    first, second = study(base, tmp_path), study(base, tmp_path)
    with first.next(0) as (a, _, _):
        assert a.default and a.number == 0
        with second.next(0) as (b, _, others):
            assert b.number == 1 and not b.default and others == [0]
            second.stops(b, 1, 3.0)
    with second.next(0) as (again, _, others):
        assert again.number == 0 and again.default and again.begun == 2 and others == []
        with first.next(0) as (c_, _, others):
            assert c_.number == 1 and c_.params == b.params and c_.seen == {1} and others == [0]
            first.tell(c_, "complete", 0.5, {"steps": 8})
        second.tell(again, "complete", 2.0, {"steps": 8})
    assert [(r["number"], r["state"], r["begun"], r["value"]) for r in first.rows()] == [(0, "complete", 2, 2.0), (1, "complete", 2, 0.5)]


def test_the_budget_is_that_of_all_together_with_what_is_running(base, tmp_path):
    s = study(base, tmp_path, {"trials": None, "budget": {"steps": 27}})
    told(s)
    told(s, None, "stopped", steps=2)
    with s.next(0) as (draw, _, _):
        assert draw is not None, "8 + 2 + 8 of 27"
        with study(base, tmp_path, {"trials": None, "budget": {"steps": 27}}).next(0) as (none, why, others):
            assert none is not None and others == [2], "8 + 2 + 8 + 8 of 27"
            with s.next(0) as (none, why, others):
                assert none is None and why == "the budget of 27 steps" and others == [2, 3]
    tokens = study(base, tmp_path, {"trials": None, "budget": {"seconds": 1.2}}, output=str(tmp_path / "other"))
    assert [isinstance(told(tokens), dict) for _ in range(3)] == [True, True, False], "a trial took half a second, a third would go over"


def test_a_finite_space_is_tried_once_and_no_configuration_twice(base, tmp_path):
    s = study(base, tmp_path, {"space": {"method": ["lora", "dora", "ia3"], "r": [2, 4]}, "trials": 50, "sampler": "random"})
    some = [told(s, 1.0, "failed" if n == 2 else "complete") for n in range(5)]
    assert {json.dumps(p, sort_keys=True) for p in some} == {json.dumps({"adapter.method": m, **({"adapter.r": r} if r else {})}, sort_keys=True)
                                                            for m, r in (("lora", 2), ("lora", 4), ("dora", 2), ("dora", 4), ("ia3", 0))}
    assert told(s) == "every configuration of the space was tried" and len(s.rows()) == 5


def test_ten_failures_in_a_row_are_enough(base, tmp_path):
    s = study(base, tmp_path, {"trials": None, "budget": {"steps": 100}})
    with s.next(10) as (draw, why, _):
        assert draw is None and why == "10 failures in a row"


@pytest.mark.parametrize("kind", ["median", "halving", "none"])
def test_what_lags_is_stopped_but_never_the_default(base, tmp_path, kind):
    s = study(base, tmp_path, {"early_stopping": kind, "trials": 20})
    with s.next(0) as (first, _, _):
        for n in range(6):
            with s.next(0) as (draw, _, _):
                assert not s.stops(draw, 1, 1.0 - n / 10), "the best so far"
                s.tell(draw, "complete", 1.0, {"steps": 8})
        assert first.default and not s.stops(first, 1, 9.0)
        s.tell(first, "complete", 9.0, {"steps": 8})
    with s.next(0) as (draw, _, _):
        assert s.stops(draw, 1, 5.0) == (kind != "none")
        s.tell(draw, "stopped", None, {"steps": 2})
    with s.next(0) as (draw, _, _):
        assert not s.stops(draw, 1, 0.1) and s.stops(draw, 2, float("nan")) == (kind != "none")
        s.tell(draw, "diverged", None, {"steps": 4})
    rows = s.rows()
    assert [r["state"] for r in rows[-2:]] == ["stopped", "diverged"] and rows[-2]["value"] is None and rows[-2]["course"] == [[1, 5.0]]


def test_what_was_let_pass_is_let_pass_again(base, tmp_path):
    """A trial that another process takes over is not stopped at an evaluation by those that came after it."""
    s = study(base, tmp_path, {"early_stopping": "median", "trials": 20})
    with s.next(0) as (draw, _, _):
        s.tell(draw, "complete", 1.0, {})
    with s.next(0) as (cut, _, _):
        assert not s.stops(cut, 1, 0.4)
        for _ in range(5):
            with s.next(0) as (draw, _, _):
                s.stops(draw, 1, 0.1)
                s.tell(draw, "complete", 1.0, {})
    with s.next(0) as (again, _, _):
        assert again.number == cut.number and again.params == cut.params and not s.stops(again, 1, 0.4)
        s.tell(again, "complete", 1.0, {})
    with s.next(0) as (draw, _, _):
        assert s.stops(draw, 1, 0.4), "a new one is"


def test_other_settings_in_the_folder_are_named(base, tmp_path):
    study(base, tmp_path)
    study(base, tmp_path, {"trials": 40, "sampler": "random"}, seeds=5)
    for change, part in (({"space": {"r": [2, 8]}}, "search.space.adapter.r: \"2, 4\" → \"2, 8\""), ({"fraction": 0.3}, "search.fraction: 0.1 → 0.3"),
                         ({"early_stopping": "median"}, "search.early_stopping")):
        with pytest.raises(LorakitError) as told_:
            study(base, tmp_path, change)
        assert part in str(told_.value) and "another `output`" in str(told_.value)
    with pytest.raises(LorakitError, match="train.max_steps: 8 → 9"):
        study(base, tmp_path, budget={"steps": 9})


def test_what_decides_is_found(base, tmp_path):
    s = study(base, tmp_path, {"space": {"learning_rate": {"low": 1e-4, "high": 1.0, "log": True}, "lora_dropout": {"low": 0.0, "high": 0.5}}, "trials": 20,
                               "sampler": "random"})
    assert s.importance() == {}
    for _ in range(20):
        with s.next(0) as (draw, _, _):
            s.tell(draw, "complete", abs(math.log10(draw.params["train.learning_rate"]) + 2), {})
    found = s.importance()
    assert found["train.learning_rate"] > 0.8 and abs(sum(found.values()) - 1) < 1e-6


# The verdict


@pytest.mark.parametrize("higher, gap, kind", [(False, -0.5, "better"), (False, 0.5, "worse"), (False, 0.001, "tie"), (True, 0.5, "better"),
                                               (True, -0.5, "worse")])
def test_the_verdict_says_better_worse_or_neither(higher, gap, kind):
    from lorakit.experiments import table

    noise = [0.01, -0.02, 0.015]
    some = [test_experiments._result("default", n, 2.0 + x) for n, x in enumerate(noise)]
    some += [test_experiments._result("best", n, 2.0 + gap + x * (0.9 if kind != "tie" else -1)) for n, x in enumerate(noise)]
    final = table.summarise(some, {"seeds": [0, 1, 2], "confidence": 0.95}, "eval_loss", higher)
    got = findings.verdict(final, "best", "default", "the best", "the default")
    assert got["kind"] == kind and got["difference"] == pytest.approx(gap, abs=0.02)
    words = {"better": "the best is better than the default", "worse": "the best is worse than the default", "tie": "no gain was shown"}[kind]
    assert words in got["text"] and "3 seeds" in got["text"] and "p " in got["text"]
    one = table.summarise([r for r in some if r["seed"] == 0], {"seeds": [0], "confidence": 0.95}, "eval_loss", higher)
    assert findings.verdict(one, "best", "default", "a", "b")["kind"] == "untested"
    lost = [r if r["cell"] == "default" else {"cell": "best", "seed": r["seed"], "status": "failed", "error": "boom"} for r in some]
    broken = findings.verdict(table.summarise(lost, {"seeds": [0, 1, 2], "confidence": 0.95}, "eval_loss", higher), "best", "default", "a", "b")
    assert broken["kind"] == "failed" and "boom" in broken["text"]


# Real searches


@pytest.fixture(scope="module")
def searched(base, tmp_path_factory) -> tuple[dict, Path, list[str]]:
    """A whole search, with the default trained also with all of its budget."""
    tmp, said = tmp_path_factory.mktemp("searched"), []
    record = e.tune(search.parse(raw(base, tmp, whole_budget=True)), say=said.append, command="lorakit tune t.yaml")
    return record, tmp, said


def results(out: Path) -> dict[int, dict]:
    return {r["number"]: r for f in sorted(out.glob("trials/*/result.json")) for r in [json.loads(f.read_text()) | {"number": int(f.parent.name)}]}


def test_the_answer_beats_the_default_on_data_that_the_search_did_not_see(base, searched):
    record, tmp, said = searched
    out = tmp / "out"
    rows, found = record["trials"], results(out)
    assert [r["number"] for r in rows] == [0, 1, 2] and rows[0]["default"] and rows[0]["params"] == {"train.learning_rate": 1e-4, "adapter.r": 4}
    best = min(rows, key=lambda r: r["value"])
    assert record["best"] == best["number"] != 0 and all(r["value"] == found[r["number"]]["metrics"]["after"]["eval_loss"] for r in rows)
    assert all(r["steps"] == 8 and r["tokens"] > 0 and r["seconds"] > 0 and len(r["course"]) == 4 and r["course"][-1][1] == r["value"] for r in rows)
    assert record["cost"]["steps"] == 24 and record["states"] == {"complete": 3} and record["workers"] == 1
    plain = prepare(search.parse(raw(base, tmp)).default.run)
    train, judge = ([str(json.loads(line)) for line in (out / "rows" / f).read_text().splitlines()] for f in ("train.jsonl", "judge.jsonl"))
    assert not set(map(str, plain.held)) & {*train, *judge} and sorted(train + judge) == sorted(map(str, plain.rows)) and not set(train) & set(judge)
    config = yaml.safe_load((out / "trials" / "0002" / "config.yaml").read_text())
    assert (config["data"]["train"], config["data"]["eval"]) == (str(out / "rows" / "train.jsonl"), str(out / "rows" / "judge.jsonl"))
    cells = {x["cell"]: x for x in record["final"]["cells"]}
    assert set(cells) == {"best", "default", "default-whole"} and all(x["n"] == 2 for x in cells.values())
    run = json.loads((out / "final" / "best" / "seed-1" / "run.json").read_text())["config"]
    assert run["train"]["learning_rate"] == best["params"]["train.learning_rate"] and run["adapter"]["r"] == best["params"]["adapter.r"]
    assert run["train"]["seed"] == 1 and run["data"]["train"] == str(tmp / "rows.jsonl") and run["train"]["max_steps"] == 8
    whole = json.loads((out / "final" / "default-whole" / "seed-0" / "run.json").read_text())
    assert whole["cost"]["steps"] == 24 + 8 and whole["config"]["train"]["learning_rate"] == 1e-4
    assert record["verdict"]["kind"] in ("better", "tie") and cells["best"]["mean"] < cells["default"]["mean"]
    assert record["whole"]["kind"] in ("better", "tie", "worse") and "all that the search" in record["whole"]["text"]
    assert any("trial 0 (default)" in line for line in said) and any(f"best is trial {best['number']}" in line for line in said)


def test_with_a_budget_of_tokens_the_answer_has_the_steps_that_they_came_to(base, tmp_path):
    e.tune(search.parse(raw(base, tmp_path, {"trials": 1}, budget={"tokens": 700}, seeds=[5])), **QUIET)
    final = json.loads((tmp_path / "out" / "final" / "default" / "seed-5" / "result.json").read_text())
    assert 700 <= final["tokens"] < 1400 and c.read(tmp_path / "out" / "best.yaml").train.max_steps == final["steps"] > 1


def test_the_best_is_the_first_of_the_best():
    rows = [{"number": n, "value": v} for n, v in enumerate((0.5, None, 0.7, 0.2, 0.7, 0.2))]
    assert [r["number"] for r in findings.ranked(rows, True)] == [2, 4, 0, 3, 5, 1]
    assert [r["number"] for r in findings.ranked(rows, False)] == [3, 5, 0, 2, 4, 1]


def test_best_yaml_is_a_configuration_that_trains_to_the_same(searched):
    record, tmp, _ = searched
    run = c.read(tmp / "out" / "best.yaml")
    assert run.output == str(tmp / "out" / "best") and (tmp / "out" / "best.yaml").read_text() == record["yaml"]
    again = r_.train(run, **QUIET)
    final = json.loads((tmp / "out" / "final" / "best" / "seed-0" / "run.json").read_text())
    assert again["metrics"] == final["metrics"]


def test_the_same_again_runs_nothing(base, searched):
    record, tmp, _ = searched
    was = {f: f.stat().st_mtime_ns for f in (tmp / "out").glob("*/*/**/result.json")}
    assert len(was) == 3 + 6
    said: list[str] = []
    again = e.tune(search.parse(raw(base, tmp, whole_budget=True)), say=said.append)
    assert {f: f.stat().st_mtime_ns for f in (tmp / "out").glob("*/*/**/result.json")} == was
    assert again["trials"] == record["trials"] and again["verdict"] == record["verdict"] and "3 trials begun before" in said[0]


def test_the_files_tell_what_the_record_tells(searched):
    record, tmp, _ = searched
    out = tmp / "out"
    page = (out / "tune.md").read_text()
    assert record["verdict"]["text"] in page and record["whole"]["text"] in page and "24 steps" in page and record["yaml"].strip() in page
    lines = list(csv.DictReader(io.StringIO((out / "tune.csv").read_text())))
    assert [float(x["eval_loss"]) for x in lines] == [r["value"] for r in record["trials"]]
    assert [float(x["train.learning_rate"]) for x in lines] == [r["params"]["train.learning_rate"] for r in record["trials"]]
    assert json.loads((out / "tune.json").read_text())["trials"] == record["trials"]
    assert optuna.load_study(study_name="lorakit", storage=f"sqlite:///{out / 'study.db'}").best_trial.number == record["best"]


def odd(record: dict) -> dict:
    """The record with trials that were stopped, failed, diverged, and a choice among words."""
    rec = copy.deepcopy(record)
    rec["axes"].append({"key": "adapter.targets", "name": "targets", "space": "a, b", "log": False, "range": False, "default": "a", "best": "b",
                        "importance": None})
    rec["axes"][0]["importance"] = 0.75
    for r in rec["trials"]:
        r["params"]["adapter.targets"] = ["q_proj", "v_proj"] if r["number"] % 2 else "all-linear"
    last = rec["trials"][-1]
    rec["trials"] += [last | {"number": 7, "state": "stopped", "value": None, "course": [[1, 5.0]], "begun": 2},
                      last | {"number": 8, "state": "failed", "value": None, "course": [], "params": {}, "error": test_comparison_page.EVIL},
                      last | {"number": 9, "state": "diverged", "value": None, "course": [[1, 5.0], [2, float("nan")]]}]
    return rec


def test_the_page_is_well_formed_and_loads_nothing(searched):
    rec = odd(searched[0])
    text = tune_page.html(rec)
    r = test_comparison_page.Reader(text)
    evil = test_comparison_page.EVIL
    assert "://" not in text.replace(evil.replace("<", "&lt;").replace(">", "&gt;"), "") and text.count("<script>") == 1 and evil in r.text
    ids = [v for _, k, v in r.attrs if k == "id"]
    assert len(ids) == len(set(ids)) and {i for _, k, v in r.attrs if k == "aria-labelledby" for i in v.split()} <= set(ids)
    assert text.count("<table") == text.count("<caption")
    assert all(h.get("scope") in ("col", "row") for t in r.tables for row in t for h in row if h["tag"] == "th")
    assert rec["verdict"]["text"] in r.text and rec["whole"]["text"] in r.text and "75.0 %" in r.text and "begun 2 times" in r.text
    rows = next(t for t in r.tables if t[0][0]["text"] == "trial")
    assert [int(row[0]["data-v"]) for row in rows[1:]] == [x["number"] for x in findings.ranked(rec["trials"], False)]
    assert int(rows[1][0]["data-v"]) == rec["best"]
    assert {row[-1]["data-v"] for row in rows[1:]} == {"complete", "stopped", "failed", "diverged"}
    assert [row[1]["data-v"] for row in rows[-3:]] == ["", "", ""] and "q_proj+v_proj" in r.text
    assert text.count("circle class=\"off\"") >= 3, "what was stopped is hollow"


@pytest.mark.parametrize("width", [1280, 520])
def test_in_a_browser_columns_sort_and_nothing_sticks_out(browser, searched, tmp_path, width):
    import html
    import re

    probe = test_comparison_page.PROBE.replace("table.main", "table.trials")
    (tmp_path / "r.html").write_text(tune_page.html(odd(searched[0])).replace("</body>", probe + "</body>"))
    dom = test_comparison_page._run(browser, "--dump-dom", f"--window-size={width},900", f"file://{tmp_path / 'r.html'}")
    found = json.loads(html.unescape(re.search(r'data-found="(.*?)"', dom)[1]))
    assert found["sort"] == "ascending" and list(map(float, found["up"])) == sorted(map(float, found["up"]))
    assert found["names"] == sorted(found["names"]) and found["window"] == width and found["wide"] <= width, "the page is wider than the window"


def test_stopped_early_on_the_whole_runs_schedule_failures_in_the_table_and_no_gain_said(base, tmp_path):
    """Four configurations in all: the default, one that hardly learns, two that cannot be built."""
    find = {"space": {"learning_rate": [2e-2, 1e-6], "target_modules": ["all-linear", ["q_prj"]]}, "early_stopping": "halving", "trials": 9}
    what = raw(base, tmp_path, find, seeds=[5], train={"learning_rate": 2e-2, "batch_size": 8, "threads": 1, "logging_steps": 1})
    record = e.tune(search.parse(what), **QUIET)
    assert record["why"] == "every configuration of the space was tried" and record["states"] == {"complete": 1, "stopped": 1, "failed": 2}
    lag = next(r for r in record["trials"] if r["state"] == "stopped")
    assert lag["params"] == {"train.learning_rate": 1e-6, "adapter.targets": "all-linear"} and 0 < lag["steps"] < 8 and lag["value"] is None
    assert record["cost"]["steps"] == 8 + lag["steps"]
    config = yaml.safe_load((tmp_path / "out" / "trials" / f"{lag['number']:04}" / "config.yaml").read_text())
    assert config["train"]["max_steps"] == 8, "the schedule is the whole run's"
    whole = r_.train(c.parse(config | {"output": str(tmp_path / "whole")}), **QUIET)
    losses = [h["eval_loss"] for h in whole["history"] if "eval_loss" in h]
    assert [v for _, v in lag["course"]] == losses[: len(lag["course"])] and len(losses) == 4
    bad = [r for r in record["trials"] if r["state"] == "failed"]
    assert all("did you mean `q_proj`" in r["error"] for r in bad) and "did you mean `q_proj`" in (tmp_path / "out" / "tune.md").read_text()
    assert record["best"] == 0 and record["verdict"]["kind"] == "same" and "nothing better than the default" in record["verdict"]["text"]
    assert [x["cell"] for x in record["final"]["cells"]] == ["default"] and c.read(tmp_path / "out" / "best.yaml").train.learning_rate == 2e-2


def test_three_failures_and_no_success_end_the_search(base, tmp_path):
    what = raw(base, tmp_path, {"space": {"learning_rate": {"low": 1e-4, "high": 1e-2}}, "trials": 9}, adapter={"method": "lora", "target_modules": ["q_prj"]})
    with pytest.raises(LorakitError, match="3 trials in a row failed and none succeeded.*did you mean `q_proj`"):
        e.tune(search.parse(what), **QUIET)
    assert [r["status"] for r in results(tmp_path / "out").values()] == ["failed"] * 3 and not (tmp_path / "out" / "best.yaml").exists()


def test_a_trial_whose_process_is_killed_is_a_row(base, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "one", dies)
    with pytest.raises(LorakitError, match=r"none succeeded.*signal 9 \(out of memory\?\)"):
        e.tune(search.parse(raw(base, tmp_path)), **QUIET)


def dies(trial, digest, settings, threads, line):
    os.kill(os.getpid(), signal.SIGKILL)


def test_files_of_someone_else_are_left_alone(base, tmp_path):
    (tmp_path / "out" / "trials" / "0000").mkdir(parents=True)
    (tmp_path / "out" / "trials" / "0000" / "thesis.tex").write_text("mine")
    with pytest.raises(LorakitError, match="move them away"):
        e.tune(search.parse(raw(base, tmp_path)), **QUIET)
    assert (tmp_path / "out" / "trials" / "0000" / "thesis.tex").read_text() == "mine"


def test_a_file_that_is_no_study_is_named(base, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "study.db").write_text("my diary, " * 200)
    with pytest.raises(LorakitError, match=r"study.db: .*not a database.*another `output`"):
        e.tune(search.parse(raw(base, tmp_path)), **QUIET)
    assert (tmp_path / "out" / "study.db").read_text() == "my diary, " * 200


def test_one_after_another_into_a_folder(tmp_path):
    """`turn` waits: what is counted inside it is not lost."""
    def count():
        for _ in range(20):
            with locks.turn(tmp_path):
                n = int((tmp_path / "n").read_text())
                time.sleep(0.001)
                (tmp_path / "n").write_text(str(n + 1))

    (tmp_path / "n").write_text("0")
    some = [threading.Thread(target=count) for _ in range(3)]
    for thread in some:
        thread.start()
    for thread in some:
        thread.join()
    assert (tmp_path / "n").read_text() == "60"


@pytest.mark.slow
def test_killed_in_the_middle_then_two_processes_end_it_together(base, tmp_path):
    """SIGKILL while a trial runs; then two at once: every trial has one result, the cut one is begun again under its number, both tell the same."""
    what = raw(base, tmp_path, {"trials": 7, "early_stopping": "median"}, budget={"steps": 30})
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(what))
    out, words = tmp_path / "out", [sys.executable, "-m", "lorakit", "tune", "t.yaml"]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while time.monotonic() < until and not (out / "trials" / "0002" / "config.yaml").exists():
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = results(out)
    assert set(before) == {0, 1} and not (out / "best.yaml").exists()
    two = [subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [q.communicate(timeout=300) for q in two]
    assert [q.returncode for q in two] == [0, 0], said
    record = json.loads((out / "tune.json").read_text())
    assert [r["number"] for r in record["trials"]] == list(range(7)) and record["begun_again"] == [2] and record["workers"] == 3
    assert all(results(out)[n]["train_seconds"] == r["train_seconds"] for n, r in before.items()), "what was finished was run again"
    own = [sum(line.startswith("[") and "] trial " in line for line in text.splitlines()) for text, _ in said]
    assert sum(own) == 5 and min(own) >= 1, own
    assert all(record["verdict"]["text"].split(":")[0] in " ".join(text.split()) for text, _ in said)


def test_the_benchmark_is_a_valid_search():
    t = search.read(Path(__file__).parents[1] / "benchmarks" / "tune_e2e.yaml")
    assert t.space.size is None and t.default.run.spec().method.r == 8 and t.settings.whole_budget
