"""Comparisons: equal budgets, cells that fail, interruption by force, two processes, changed settings, mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import test_training
import yaml

from lorakit.errors import LorakitError
from lorakit.experiments import compare as e
from lorakit.experiments import config as s
from lorakit.experiments import table, work
from lorakit.training import config as c_
from lorakit.training import run as r_
from lorakit.training.prepare import prepare

base = test_training.base
QUIET = {"say": lambda text: None}


def raw(base: Path, tmp: Path, **kw) -> dict:
    """Two cells, two seeds, four steps; rows of different lengths."""
    lines = test_training.TEXT.splitlines()
    rows = [{"prompt": f"{line[:12 + n % 9]}", "completion": " ".join([line[12 + n % 9:]] * (1 + n % 3))} for n, line in enumerate(lines)]
    if not (tmp / "rows.jsonl").exists():
        (tmp / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"base": str(base), "data": {"train": str(tmp / "rows.jsonl"), "max_length": 64, "eval_fraction": 0.2}, "eval": {"samples": 0},
            "train": {"learning_rate": 2e-2, "batch_size": 8, "threads": 1}, "seeds": 2, "budget": {"steps": 4}, "output": str(tmp / "out"),
            "cells": [{"name": "small", "adapter": {"method": "lora", "r": 2}}, {"name": "dora", "adapter": {"method": "dora", "r": 4}}]} | kw


def results(out: Path) -> dict[tuple[str, int], dict]:
    found = [json.loads(f.read_text()) for f in out.glob("*/*/result.json")]
    return {(r["cell"], r["seed"]): r for r in found}


def stamps(out: Path) -> dict[str, tuple]:
    return {str(f): (f.stat().st_ino, f.stat().st_mtime_ns) for f in out.glob("*/seed-*/*") if f.is_file()}


def test_a_whole_comparison_with_a_cell_that_fails_and_the_base(base, tmp_path):
    cells = [{"base": True}, {"adapter": "full"}, {"name": "lora", "adapter": {"r": 4}},
             {"name": "broken", "adapter": {"method": "lora", "target_modules": ["q_prj"]}}]
    said = []
    rec = e.compare(s.parse(raw(base, tmp_path, cells=cells, seeds=[3, 5], budget={"steps": 12})), say=said.append)
    by = {c["cell"]: c for c in rec["cells"]}
    assert by["broken"]["failed"] == 2 and by["broken"]["mean"] is None and "did you mean `q_proj`" in by["broken"]["error"]
    assert by["base"]["before"] == by["base"]["mean"] and by["base"]["trainable"] == 0 and by["base"]["n"] == 2
    for name in ("full", "lora"):
        assert by[name]["mean"] < by["base"]["mean"] - 0.3 and by[name]["verify"] is True and by[name]["half"] > 0
        assert abs(by[name]["before"] - by["base"]["mean"]) < 1e-4, "all cells start at the untouched base, on the same held-out rows"
        assert by[name]["train_seconds"] > 0 and by[name]["tokens_per_second"] > 0 and by[name]["peak_memory_bytes"] > 2**26
    assert by["full"]["trainable"] > by["lora"]["trainable"] > 0 and by["full"]["adapter_bytes"] > by["lora"]["adapter_bytes"] > 0
    assert "broken" not in rec["pareto"]["time"] and {d["a"] for d in rec["differences"]} <= {"base", "full", "lora"} and len(rec["differences"]) == 3
    out = tmp_path / "out"
    assert json.loads((out / "comparison.json").read_text())["cells"] == rec["cells"]
    page, lines = (out / "comparison.md").read_text(), (out / "comparison.csv").read_text().splitlines()
    assert all(f"| {c} |" in page for c in by) and "broken failed with 2 of 2 seeds" in page
    assert len(lines) == 5 and lines[0].endswith("seed_3,seed_5")
    folder = out / "lora" / "seed-3"
    assert {"run.json", "report.html", "adapter", "config.yaml", "cell.json", "result.json"} <= {f.name for f in folder.iterdir()}
    assert "before: " in (folder / "log.txt").read_text() and not list(folder.glob("checkpoint-*"))
    run = json.loads((folder / "run.json").read_text())
    assert results(out)["lora", 3]["train_seconds"] < run["cost"]["train_seconds"], "evaluation inside training is not counted"
    assert results(out)["lora", 3]["metrics"] == run["metrics"] and run["config"]["train"]["seed"] == 3
    alone = yaml.safe_load((folder / "config.yaml").read_text()) | {"output": str(tmp_path / "alone")}
    assert r_.train(c_.parse(alone), **QUIET)["metrics"] == run["metrics"], "`lorakit train` with the cell's config.yaml gives what the cell gave"
    kept = stamps(out)
    said.clear()
    again = e.compare(s.parse(raw(base, tmp_path, cells=cells, seeds=[3, 5], budget={"steps": 12})), say=said.append)
    assert "2 to run, 6 finished" in said[0] and len(said) == 3, "only what failed is tried again"
    assert again["cells"] == rec["cells"]
    assert all(stamps(out)[f] == at for f, at in kept.items() if "broken" not in f)


def test_classes_are_compared_by_accuracy(base, tmp_path):
    rows = [{"text": line, "label": line.split()[2]} for line in test_training.TEXT.splitlines()]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    what = raw(base, tmp_path, data={"train": str(tmp_path / "c.jsonl"), "eval_fraction": 0.3}, seeds=[0], budget={"steps": 80},
               cells=[{"base": True}, {"name": "lora", "adapter": "lora"}], train={"learning_rate": 1e-2, "threads": 1})
    rec = e.compare(s.parse(what), **QUIET)
    assert rec["metric"] == "accuracy" and rec["higher_is_better"] and [c["cell"] for c in rec["cells"]] == ["lora", "base"]
    assert rec["cells"][0]["before"] == rec["cells"][1]["mean"] < rec["cells"][0]["mean"], "the untouched base has the head the adapter started with"


def _result(cell: str, seed: int, value: float, seconds: float = 1.0, trained: int = 10) -> dict:
    return {"cell": cell, "seed": seed, "status": "ok", "error": None, "metrics": {"before": {"eval_loss": 2.0}, "after": {"eval_loss": value}},
            "train_seconds": seconds, "tokens": 100, "tokens_per_second": 100.0, "peak_memory_bytes": 2**30, "trainable": trained, "adapter_bytes": 40,
            "verify": True, "steps": 1}


def test_the_table_says_what_differs_what_ties_and_what_diverged():
    noise = [0.01, -0.02, 0.015, 0.0]
    some = [_result("good", n, 1.0 + x, 3.0, 30) for n, x in enumerate(noise)] + [_result("bad", n, 1.5 + 0.5 * x, 2.0, 20) for n, x in enumerate(noise)]
    some += [_result("twin", n, 1.0 + x + 1e-4 + (-1) ** n * 1e-3, 4.0, 40) for n, x in enumerate(noise)] + [_result("burst", n, float("nan")) for n in (0, 1)]
    settings = {"seeds": [0, 1, 2, 3], "confidence": 0.95}
    rec = table.summarise(some, settings, "eval_loss", False)
    text = table.markdown(rec)
    assert [c["cell"] for c in rec["cells"]] == ["good", "twin", "bad", "burst"]
    assert "good is better than bad: eval_loss −0.4" in text and "twin is better than bad" in text and "bad is better" not in text
    assert "Not distinguishable: good and twin" in text and "burst diverged: eval_loss is not finite" in text
    assert set(rec["pareto"]["time"]) == {"good", "bad"} and "3 pairs" in text
    assert table.csv(rec).splitlines()[0].endswith("seed_0,seed_1,seed_2,seed_3")
    up = table.markdown(table.summarise(some, settings, "eval_loss", True))
    assert "bad is better than good: eval_loss 0.4" in up and "good is better" not in up


def test_a_token_budget_is_equal_whatever_the_batches(base, tmp_path):
    """What was really trained on is counted in the forward pass; the steps were planned before. More than one pass over the data."""
    cells = [{"name": "a", "adapter": {"r": 2}}, {"name": "b", "adapter": {"method": "dora", "lora_dropout": 0.1}},
             {"name": "c", "adapter": {"r": 2}, "train": {"batch_size": 3, "gradient_accumulation_steps": 2}},
             {"name": "d", "adapter": {"r": 2}, "train": {"batch_size": 1}}]
    c = s.parse(raw(base, tmp_path, cells=cells, seeds=[1], budget={"tokens": 3000}))
    rows = prepare(c.trials[0].run).train.rows
    sizes = sorted(len(r["input_ids"]) for r in rows)
    assert sum(sizes) < 3000 and sizes[0] < sizes[-1], "the test should need a second pass and rows of different lengths"
    rec = e.compare(c, **QUIET)
    found = {n: r for (n, _), r in results(tmp_path / "out").items()}
    for name, rows_in_step in (("a", 8), ("b", 8), ("c", 6), ("d", 1)):
        assert 3000 <= found[name]["tokens"] < 3000 + rows_in_step * sizes[-1], (name, found[name])
    assert found["a"]["tokens"] == found["b"]["tokens"] and found["d"]["steps"] > found["a"]["steps"]
    assert any("One seed" in n for n in table.notes(rec)) and all(c["half"] is None for c in rec["cells"])


def test_a_budget_of_seconds_ends_there(base, tmp_path):
    with pytest.raises(LorakitError, match="lr_scheduler_type: constant"):
        s.parse(raw(base, tmp_path, budget={"seconds": 1}))
    steady = {"learning_rate": 1e-2, "threads": 1, "lr_scheduler_type": "constant"}
    e.compare(s.parse(raw(base, tmp_path, budget={"seconds": 0.5}, train=steady, seeds=1)), **QUIET)
    for r in results(tmp_path / "out").values():
        assert 0.5 <= r["train_seconds"] < 1.5 and r["steps"] > 3


def test_killed_in_the_middle_and_run_again(base, tmp_path):
    """SIGKILL while the second or third run is under way: what was finished is not touched, the table is whole."""
    what = raw(base, tmp_path, cells=[{"name": n, "adapter": {"r": 2}} for n in ("a", "b")], budget={"steps": 40})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(what))
    out, words = tmp_path / "out", [sys.executable, "-m", "lorakit", "compare", "c.yaml"]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 90
    while time.monotonic() < until and not (results(out) and list(out.glob("a/seed-1/config.yaml"))):
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.3)
    whole = {str(out / c / f"seed-{n}") for c, n in results(out)}
    assert 1 <= len(whole) < 4 and not (out / "comparison.json").exists()
    before, cut = stamps(out), out / "a" / "seed-1"
    time.sleep(0.7)
    if str(cut) not in whole:
        assert stamps(out) == before, "the running cell did not end with the comparison"
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"{4 - len(whole)} to run, {len(whole)} finished before" in done.stdout
    after = stamps(out)
    assert all(after[f] == at for f, at in before.items() if str(Path(f).parent) in whole), "a finished cell was run again"
    rec = json.loads((out / "comparison.json").read_text())
    assert [(c["n"], c["failed"]) for c in rec["cells"]] == [(2, 0), (2, 0)]
    assert {c["cell"]: c["values"] for c in rec["cells"]}["a"] == {c["cell"]: c["values"] for c in rec["cells"]}["b"], "equal cells, equal seeds"
    assert not rec["differences"][0]["distinguishable"] and "Not distinguishable: a and b" in done.stdout


def test_changed_settings_are_refused_and_run_anew_only_on_demand(base, tmp_path):
    what = raw(base, tmp_path, seeds=1, budget={"steps": 2})
    e.compare(s.parse(what), **QUIET)
    before = stamps(tmp_path / "out")
    what["cells"][1]["train"] = {"learning_rate": 5e-3}
    with pytest.raises(LorakitError, match=r"dora seed 0 \(train.learning_rate: 0.02 → 0.005\).*--again"):
        e.compare(s.parse(what), **QUIET)
    assert stamps(tmp_path / "out") == before, "nothing is lost"
    e.compare(s.parse(what), again=True, **QUIET)
    after = stamps(tmp_path / "out")
    assert all((after[f] == at) == ("/small/" in f) for f, at in before.items() if f.endswith("result.json"))
    with (tmp_path / "rows.jsonl").open("a") as f:
        f.write('\n{"prompt": "the old", "completion": " cat"}')
    with pytest.raises(LorakitError, match=r"data.train \(sha256\)"):
        e.compare(s.parse(what), **QUIET)
    more = s.parse(what | {"cells": [{"name": "other", "adapter": {"r": 1}}], "output": str(tmp_path / "strange")})
    (tmp_path / "strange" / "other" / "seed-0").mkdir(parents=True)
    (tmp_path / "strange" / "other" / "seed-0" / "thesis.tex").write_text("mine")
    with pytest.raises(LorakitError, match="no comparison wrote"):
        e.compare(more, **QUIET)


def test_a_second_process_in_the_folder_is_refused(base, tmp_path):
    c = s.parse(raw(base, tmp_path))
    with e.alone(c.output), pytest.raises(LorakitError, match=rf"another comparison \(process {os.getpid()}\)"):
        e.compare(c, **QUIET)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw(base, tmp_path)))
    with e.alone(c.output):
        done = subprocess.run([sys.executable, "-m", "lorakit", "compare", "c.yaml"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "is writing" in done.stderr and not results(c.output)
    with e.alone(c.output):
        pass


def dies(trial, digest):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_cell_whose_process_is_killed_is_a_row(base, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "one", dies)
    rec = e.compare(s.parse(raw(base, tmp_path, seeds=1)), **QUIET)
    assert all(c["failed"] == 1 and "signal 9 (out of memory?)" in c["error"] for c in rec["cells"])
    assert "failed" in (tmp_path / "out" / "comparison.md").read_text()


def test_a_grid_is_a_product(base, tmp_path):
    what = raw(base, tmp_path, grid={"adapter.method": ["lora", "dora"], "r": [2, 4], "train.learning_rate": [1e-3, 1e-2]}, adapter={"lora_alpha": 8})
    c = s.parse(what)
    assert c.cells == ["small", "dora", *(f"{m}-r{r}-learning_rate{lr}" for m in ("lora", "dora") for r in (2, 4) for lr in (0.001, 0.01))]
    last = c.trials[-1]
    assert (last.cell, last.seed, last.run.train.seed) == ("dora-r4-learning_rate0.01", 1, 1)
    assert last.run.adapter == {"method": "dora", "r": 4, "lora_alpha": 8} and last.run.train.learning_rate == 0.01 and last.run.train.max_steps == 4
    assert c.trials[0].run.adapter == {"method": "lora", "r": 2}, "a cell of the list states its whole adapter"


WRONG = {
    "unknown key": ({"sedes": 3}, "did you mean `seeds`"),
    "unknown key of a cell": ({"cells": [{"name": "a", "adaptor": "lora"}]}, "did you mean `adapter`"),
    "unknown key of train": ({"cells": [{"name": "a", "adapter": "lora", "train": {"lerning_rate": 1}}]}, "did you mean `learning_rate`"),
    "unknown budget": ({"budget": {"stepps": 3}}, "did you mean `steps`"),
    "two budgets": ({"budget": {"steps": 3, "tokens": 3}}, "exactly one"),
    "no budget left": ({"budget": {"steps": 0}}, "greater than or equal to 1"),
    "unknown metric": ({"metric": "acuracy"}, "did you mean `accuracy`"),
    "a metric of other data": ({"metric": "accuracy"}, "not measured on data of shape prompt_completion"),
    "a metric not asked for": ({"metric": "exact_match"}, "eval: {metrics: [exact_match]}"),
    "no seeds": ({"seeds": 0}, "at least one seed"),
    "negative seeds": ({"seeds": -2}, "at least one seed"),
    "negative seed": ({"seeds": [1, -1]}, "0 or more"),
    "a seed twice": ({"seeds": [1, 1]}, "different"),
    "a name twice": ({"cells": [{"adapter": "lora"}, {"adapter": {"r": 4}}]}, "2 cells are called `lora`"),
    "a name that leaves the folder": ({"cells": [{"name": "../x", "adapter": "lora"}]}, "cells.0.name"),
    "unknown method": ({"cells": [{"adapter": "dorra"}]}, "did you mean `dora`"),
    "unknown option": ({"cells": [{"adapter": {"method": "full", "r": 3}}]}, "no option `r`"),
    "base with an adapter": ({"cells": [{"base": True, "adapter": "lora"}]}, "takes no adapter"),
    "an empty cell": ({"cells": [{"name": "a"}]}, "needs an adapter"),
    "nothing": ({"cells": []}, "nothing to compare"),
    "its own steps": ({"cells": [{"adapter": "lora", "train": {"max_steps": 9}}]}, "from `budget`"),
    "its own seed": ({"cells": [{"adapter": "lora", "train": {"seed": 9}}]}, "from `seeds`"),
    "unknown grid key": ({"grid": {"adaptr.r": [1]}}, "did you mean `adapter`"),
    "data in a grid": ({"grid": {"data.limit": [1, 2]}}, "unknown key `data.limit`"),
    "empty grid": ({"grid": {"r": []}}, "no values"),
    "no held-out data": ({"data": {"train": "rows.jsonl", "eval_fraction": 0}}, "needs held-out data"),
    "missing data": ({"data": "row.jsonl"}, "row.jsonl"),
}


def test_mistakes_on_the_command_line(base, tmp_path, monkeypatch, capsys):
    """Each is one clear line on the error stream, exit 1, and nothing run."""
    from lorakit.cli import app

    monkeypatch.chdir(tmp_path)
    for what, (change, part) in WRONG.items():
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw(base, tmp_path, **change)))
        monkeypatch.setattr(sys, "argv", ["lorakit", "compare", "c.yaml"])
        code = app.run(app.app)
        text = " ".join(capsys.readouterr().err.split())
        assert code == 1 and part in text and "Traceback" not in text, (what, code, text)
        assert not list((tmp_path / "out").glob("*/*")), what


def test_dry_run_prints_the_cells_and_writes_nothing(base, tmp_path, monkeypatch, capsys):
    from lorakit.cli import app

    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw(base, tmp_path, cells=[{"base": True}, {"adapter": {"r": 4}}], seeds=[2, 7])))
    monkeypatch.setattr(sys, "argv", ["lorakit", "compare", "c.yaml", "--dry-run"])
    assert app.run(app.app) == 0
    text = capsys.readouterr().out
    assert "base  seeds 2, 7  the untouched base" in text and "lora  seeds 2, 7  r: 4" in text and "4 runs; budget of each: 4 steps" in text
    assert not (tmp_path / "out").exists()
