"""Comparisons: equal budgets, cells that fail, interruption by force, two processes, changed settings, mistakes."""

from __future__ import annotations

import itertools
import json
import math
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
from lorakit.experiments import locks, measure, rates, table, work
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


@pytest.mark.slow
def test_two_processes_on_one_folder_share_the_work(base, tmp_path):
    """Each trial is done once, by one of them, and both write the same whole table."""
    what = raw(base, tmp_path, cells=[{"name": n, "adapter": {"r": 2}} for n in "abc"], budget={"steps": 30})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(what))
    words = [sys.executable, "-m", "lorakit", "compare", "c.yaml"]
    two = [subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [q.communicate(timeout=180) for q in two]
    assert [q.returncode for q in two] == [0, 0], said
    lines = [[line for line in out.splitlines() if line.startswith("[")] for out, _ in said]
    own = [sum("by another process" not in line for line in some) for some in lines]
    finished = [6 - int(out.split(" to run")[0].rpartition(" ")[2]) for out, _ in said]
    assert sum(own) == 6 and [len(some) + n for some, n in zip(lines, finished, strict=True)] == [6, 6], said
    assert min(own) >= 1, "one of them did everything"
    rec = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [(c["n"], c["failed"]) for c in rec["cells"]] == [(2, 0)] * 3


def test_another_comparison_in_the_folder_is_refused(base, tmp_path):
    c = s.parse(raw(base, tmp_path))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw(base, tmp_path, budget={"steps": 5})))
    with locks.shared(c.output, "others"):
        done = subprocess.run([sys.executable, "-m", "lorakit", "compare", "c.yaml"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and f"with other settings (process {os.getpid()})" in " ".join(done.stderr.split()) and not results(c.output)
    with locks.shared(c.output, "x"), locks.shared(c.output, "x"), pytest.raises(LorakitError, match="with other settings"):
        e.compare(c, **QUIET)


@pytest.mark.slow
def test_two_at_a_time_measure_what_one_at_a_time_measures(base, tmp_path):
    """Four cells by two processes: the same metrics to the bit, memory and time of each its own."""
    cells = [{"name": n, "adapter": {"r": r}} for n, r in (("a", 2), ("b", 4))]
    one = e.compare(s.parse(raw(base, tmp_path, cells=cells, budget={"steps": 15})), **QUIET)
    begun = time.perf_counter()
    two = e.compare(s.parse(raw(base, tmp_path, cells=cells, budget={"steps": 15}, output=str(tmp_path / "two"))), jobs=2, **QUIET)
    wall = time.perf_counter() - begun
    for name in "ab":
        x, y = (next(c for c in rec["cells"] if c["cell"] == name) for rec in (one, two))
        assert x["values"] == y["values"]
        assert abs(x["peak_memory_bytes"] / y["peak_memory_bytes"] - 1) < 0.1 and x["saved_bytes"] == y["saved_bytes"]
        assert 0 < y["train_seconds"] < wall and 0.3 < y["cpu_seconds"] / x["cpu_seconds"] < 3
    with pytest.raises(LorakitError, match="at least 1"):
        e.compare(s.parse(raw(base, tmp_path)), jobs=0, **QUIET)


def dies(trial, digest, settings, threads):
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
    "a learning rate that is tuned": ({"tune": {"learning_rate": [1e-3, 1e-2], "budget": {"steps": 2}}}, "takes this from `tune`"),
    "a grid of one": ({"tune": {"learning_rate": [1e-3], "budget": {"steps": 2}}}, "two different rates"),
    "no tuning budget": ({"tune": {"learning_rate": [1e-3, 1e-2]}}, "`tune.budget`"),
    "unknown key of tune": ({"tune": {"learning_rates": [1e-3, 1e-2], "budget": {"steps": 2}}}, "did you mean `learning_rate`"),
    "tuned by its own luck": ({"train": {}, "tune": {"learning_rate": [1e-3, 1e-2], "budget": {"steps": 2}, "seed": 1}}, "is one of `seeds`"),
    "unknown backend": ({"cells": [{"adapter": "lora", "backend": "pft"}]}, "cells.0.backend"),
    "hooks for PEFT": ({"cells": [{"adapter": "lora", "backend": "peft", "hooks": ["lora_plus"]}]}, "this cell has none"),
    "transformers alone": ({"cells": [{"adapter": "lora", "backend": "transformers"}]}, "adapter: full alone"),
    "a probe without classes": ({"cells": [{"adapter": "linear-probe"}]}, "has no classes"),
    "unknown measure": ({"metrics": ["blue"]}, "did you mean `bleu`"),
    "a measure of other data": ({"metrics": ["f1"]}, "only rouge_l, bleu"),
    "missing data to forget": ({"forgetting": "nowhere.jsonl"}, "nowhere.jsonl"),
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


PEFT = [{"name": "none", "adapter": "none"}, {"name": "ours", "adapter": {"method": "lora", "r": 4}},
        {"name": "theirs", "backend": "peft", "adapter": {"method": "lora", "r": 4}},
        {"name": "theirs-dora", "backend": "peft", "adapter": {"method": "dora", "r": 4, "lora_alpha": 16}},
        {"name": "theirs-rslora", "backend": "peft", "adapter": {"method": "rslora", "r": 4}},
        {"name": "theirs-ia3", "backend": "peft",
         "adapter": {"method": "ia3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}},
        {"name": "theirs-adalora", "backend": "peft", "adapter": {"method": "adalora", "init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 2}},
        {"name": "everything", "backend": "transformers", "adapter": "full"},
        {"name": "unknown", "backend": "peft", "adapter": {"method": "lora", "rr": 4}}]


def test_pefts_cells_and_every_weight_go_through_the_same_loop(base, tmp_path):
    """First losses are equal where nothing has been learnt yet: the same batch, the same loss. The rest is measured with the same code."""
    pytest.importorskip("peft")
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps({"text": f"{n} boats went over the green hill of {n * 7}"}) for n in range(12)))
    train = {"learning_rate": 1e-2, "batch_size": 8, "threads": 1, "logging_steps": 1}
    what = raw(base, tmp_path, cells=PEFT, seeds=[1], budget={"steps": 8}, train=train, forgetting={"data": str(other), "limit": 10})
    rec = e.compare(s.parse(what), **QUIET)
    by, found = {c["cell"]: c for c in rec["cells"]}, {n: r for (n, _), r in results(tmp_path / "out").items()}
    assert by["unknown"]["failed"] and "LoraConfig has no option `rr`; did you mean `r`" in by["unknown"]["error"]
    trained = [n for n in by if n not in ("none", "unknown")]
    assert all(not by[n]["failed"] for n in trained), [by[n]["error"] for n in trained]
    losses = {n: json.loads((tmp_path / "out" / n / "seed-1" / "run.json").read_text())["history"][0]["loss"] for n in trained}
    assert losses.pop("theirs-adalora") > losses["ours"], "its loss has a penalty of its own"
    assert all(abs(v - losses["ours"]) < 1e-4 for v in losses.values()), losses
    assert by["ours"]["trainable"] == by["theirs"]["trainable"] == by["theirs-rslora"]["trainable"] < by["theirs-dora"]["trainable"]
    assert by["theirs-ia3"]["trainable"] < by["ours"]["trainable"] < by["everything"]["trainable"]
    assert by["everything"]["adapter_bytes"] > by["theirs"]["adapter_bytes"] > 4 * by["theirs"]["trainable"]
    assert abs(by["ours"]["mean"] - by["theirs"]["mean"]) < 0.25 * (by["none"]["mean"] - by["ours"]["mean"])
    for n in trained:
        assert by[n]["tokens"] == by["ours"]["tokens"] > 0 and by[n]["train_seconds"] > 0 and by[n]["peak_memory_bytes"] > 2**26
        assert by[n]["saved_bytes"] > 0 and by[n]["mean"] < by["none"]["mean"], n
        assert abs(found[n]["elsewhere"]["before"] - found["none"]["elsewhere"]["before"]) < 1e-4
        assert by[n]["forgetting"] == found[n]["elsewhere"]["after"] - found[n]["elsewhere"]["before"] != 0
    pattern = json.loads((tmp_path / "out" / "theirs-adalora" / "seed-1" / "adapter" / "adapter_config.json").read_text())["rank_pattern"]
    assert sum(map(sum, pattern.values())) == 2 * len(pattern) > 0, "ranks were given out while training"
    for n in ("ours", "theirs", "theirs-dora"):
        assert 0 <= by[n]["merge_loss"] < 1e-4
    assert by["everything"]["merge_loss"] is None and by["none"]["forgetting"] == 0 and by["theirs"]["verify"] is None and by["ours"]["verify"]
    assert (tmp_path / "out" / "theirs" / "seed-1" / "adapter" / "adapter_config.json").is_file()


def test_without_peft_its_cells_fail_and_say_so(base, tmp_path, monkeypatch):
    import builtins

    from lorakit.experiments import plain

    real = builtins.__import__

    def without(name, *a, **k):
        if name.startswith("peft"):
            raise ImportError(name)
        return real(name, *a, **k)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(LorakitError, match="needs the package `peft`.*pip install peft"):
        plain.peft_config({"method": "lora"}, "causal-lm")


@pytest.mark.parametrize("change, part", [({"method": "lorra"}, "did you mean `lora`"), ({"method": "lora", "alpha": 3, "ranks": 1}, "no option `ranks`")])
def test_pefts_configuration_is_checked(change, part):
    pytest.importorskip("peft")
    from lorakit.experiments import plain

    with pytest.raises(LorakitError, match=part):
        plain.peft_config(change, "causal-lm")
    with pytest.raises(LorakitError, match="tokens of its own"):
        plain.peft_config({"method": "prompt-tuning", "num_virtual_tokens": 4}, "causal-lm")
    ours = plain.peft_config({"method": "dora", "alpha": 3}, "sequence-classification")
    assert ours.use_dora and ours.lora_alpha == 3 and ours.r == 8 and ours.target_modules == "all-linear" and ours.task_type == "SEQ_CLS"


def test_a_linear_probe_trains_the_head_alone_and_classes_have_f1(base, tmp_path):
    from safetensors.torch import load_file

    rows = [{"text": line, "label": line.split()[2]} for line in test_training.TEXT.splitlines()]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, rows[:9])))
    cells = [{"name": "base", "base": True}, {"adapter": "linear-probe"}, {"name": "lora", "adapter": "lora"},
             {"name": "peft", "backend": "peft", "adapter": "lora"}, {"name": "all", "backend": "transformers", "adapter": "full"}]
    what = raw(base, tmp_path, data={"train": str(tmp_path / "c.jsonl"), "eval_fraction": 0.3}, seeds=[0], budget={"steps": 40}, cells=cells,
               train={"learning_rate": 1e-2, "threads": 1}, metric="f1", forgetting=str(tmp_path / "f.jsonl"))
    rec = e.compare(s.parse(what), **QUIET)
    by = {c["cell"]: c for c in rec["cells"]}
    assert rec["metric"] == "f1" and all(not c["failed"] for c in rec["cells"]), [c["error"] for c in rec["cells"]]
    assert len({c["before"] for c in rec["cells"]}) == 1, "all start with the same head"
    assert by["linear-probe"]["trainable"] == 3 * 32 < by["lora"]["trainable"] and abs(by["lora"]["trainable"] - by["peft"]["trainable"]) <= 3 * 32
    head = load_file(tmp_path / "out" / "linear-probe" / "seed-0" / "adapter" / "head.safetensors")
    assert {k: tuple(v.shape) for k, v in head.items()} == {"score.weight": (3, 32)}
    assert by["lora"]["mean"] > by["base"]["mean"] and by["lora"]["metrics"]["accuracy"] > 0.5
    assert all(c["forgetting"] is not None for c in rec["cells"])


def test_f1_is_sklearns():
    import numpy as np

    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for _ in range(50):
        true, found = rng.integers(0, 5, 12).tolist(), rng.integers(0, 6, 12).tolist()
        assert measure.f1(true, found) == pytest.approx(metrics.f1_score(true, found, average="macro", zero_division=0))


def test_texts_are_scored_by_their_libraries_or_the_extra_is_named(base, tmp_path, monkeypatch):
    c = s.parse(raw(base, tmp_path, metric="rouge_l", metrics=["bleu"], seeds=1, cells=[{"name": "a", "adapter": {"r": 2}}]))
    assert c.trials[0].extra == ("bleu", "rouge_l")
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(LorakitError, match=r"`sacrebleu`.*lorakit\[metrics\]"):
        e.compare(c, **QUIET)
    monkeypatch.delitem(sys.modules, "sacrebleu")
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed (lorakit[metrics])")
    pytest.importorskip("rouge_score", reason="rouge-score is not installed (lorakit[metrics])")
    assert measure.rouge_l(["the cat sat", "x"], ["the cat sat", "y"]) == 0.5 and measure.bleu(["a b c d e"], ["a b c d e"]) == pytest.approx(100)
    rec = e.compare(c, **QUIET)
    assert rec["metric"] == "rouge_l" and 0 <= rec["cells"][0]["mean"] <= 1 and 0 <= rec["cells"][0]["metrics"]["bleu"] <= 100


def test_saved_bytes_of_a_step_are_exact():
    """A linear layer in front of a squared sum: its input, where W trains, and the square's input. By hand."""
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(6, 5, bias=False)

        def forward(self, x):
            return self.body(x * 1.0).square().sum()

    net = Net()
    assert measure.saved_bytes(net, {"x": torch.ones(3, 6)}) == 4 * (3 * 6 + 3 * 5)
    net.body.weight.requires_grad_(False)
    assert measure.saved_bytes(net, {"x": torch.ones(3, 6)}) == 0
    assert measure.saved_bytes(net, {"x": torch.ones(3, 6, requires_grad=True)}) == 4 * 3 * 5
    before = torch.get_rng_state()
    drop = nn.Dropout(0.5)
    drop.weight = nn.Parameter(torch.ones(1))
    measure.saved_bytes(drop, {"input": torch.ones(3, requires_grad=True)})
    assert torch.equal(before, torch.get_rng_state()) and drop.training


def test_checkpointing_saves_less_and_the_measure_sees_it(base, tmp_path):
    cells = [{"name": "plain", "adapter": {"r": 2}}, {"name": "saving", "adapter": {"r": 2}, "train": {"gradient_checkpointing": True}}]
    rec = e.compare(s.parse(raw(base, tmp_path, cells=cells, seeds=1, budget={"steps": 2})), **QUIET)
    by = {c["cell"]: c for c in rec["cells"]}
    assert by["saving"]["values"] == by["plain"]["values"] or abs(by["saving"]["mean"] - by["plain"]["mean"]) < 1e-4
    assert 0 < by["saving"]["saved_bytes"] < 0.6 * by["plain"]["saved_bytes"]


def full_disk(monkeypatch, name: str):
    """From now on, writing a file of this name finds no space."""
    real = Path.write_text

    def write(self, text, *a, **k):
        if self.name.endswith(name):
            raise OSError(28, "No space left on device")
        return real(self, text, *a, **k)

    monkeypatch.setattr(Path, "write_text", write)


@pytest.mark.slow
def test_a_full_disk_loses_nothing(base, tmp_path, monkeypatch):
    """A disk of 3 MiB in memory where it can be mounted: the run ends with one clear line, what was finished stays, and goes on with more room."""
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        what = raw(base, tmp_path, cells=[{"name": n, "adapter": {"r": 2}} for n in "abcd"], seeds=2, budget={"steps": 2}, output=str(small / "out"))
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(what))
        words = [sys.executable, "-m", "lorakit", "compare", "c.yaml"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=200)
        text = " ".join((done.stdout + done.stderr).split())
        assert done.returncode == 1 and "No space left" in text and "Traceback" not in text, text
        good = {k for k, r in results(small / "out").items() if r["status"] == "ok"}
        assert good and len(good) < 8
        kept = stamps(small / "out")
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert f"{8 - len(good)} to run, {len(good)} finished before" in done.stdout
        now = stamps(small / "out")
        assert all(now[f] == at for f, at in kept.items() if tuple(Path(f).parts[-3:-1]) in {(c, f"seed-{n}") for c, n in good})
    finally:
        subprocess.run(["umount", str(small)])


def test_a_disk_that_is_full_at_the_table_keeps_the_results(base, tmp_path, monkeypatch):
    c = s.parse(raw(base, tmp_path, cells=[{"name": "a", "adapter": {"r": 2}}], seeds=1, budget={"steps": 2}))
    with monkeypatch.context() as m:
        full_disk(m, "report.html")
        with pytest.raises(LorakitError, match="No space left.*nothing that was there before is changed"):
            e.compare(c, **QUIET)
    assert results(c.output)["a", 0]["status"] == "ok" and not (c.output / "comparison.json").exists()
    said = []
    e.compare(c, say=said.append)
    assert "0 to run, 1 finished" in said[0] and (c.output / "report.html").stat().st_size > 5000


TUNE = {"learning_rate": [1e-4, "2e-2", 5.0], "budget": {"steps": 6}, "seed": 77, "fraction": 0.25}


def untuned(base: Path, tmp: Path, **kw) -> dict:
    what = raw(base, tmp, **kw)
    what["train"].pop("learning_rate")
    return what


def test_learning_rates_are_tuned_with_an_equal_budget_on_rows_of_their_own(base, tmp_path):
    cells = [{"base": True}, {"name": "lora", "adapter": {"r": 4}}, {"name": "peft", "backend": "peft", "adapter": {"method": "lora", "r": 4}}]
    c = s.parse(untuned(base, tmp_path, cells=cells, tune=TUNE, budget={"steps": 8}))
    assert [(t.cell, t.tunes, t.seed, t.run.train.max_steps) for t in c.tuning] == [(n, lr, 77, 6) for n in ("lora", "peft") for lr in (1e-4, 2e-2, 5.0)]
    said = []
    rec = e.compare(c, say=said.append)
    out = tmp_path / "out"
    chosen = {t["cell"]: t for t in rec["tuning"]}
    assert set(chosen) == {"lora", "peft"} and all(len(t["values"]) == 3 for t in chosen.values())
    for name, t in chosen.items():
        found = {lr: json.loads((out / name / f"tune-{lr:g}" / "result.json").read_text())["metrics"]["after"]["eval_loss"] for lr in (1e-4, 2e-2, 5.0)}
        assert t["rate"] == min(found, key=found.get) == 2e-2 and not t["edge"], found
        for seed in (0, 1):
            run = json.loads((out / name / f"seed-{seed}" / "run.json").read_text())["config"]
            assert run["train"]["learning_rate"] == 2e-2 and run["train"]["max_steps"] == 8
    held = {*map(str, prepare(c.trials[0].run).held)}
    train, judge = ([str(json.loads(line)) for line in (out / "tuning" / f).read_text().splitlines()] for f in ("train.jsonl", "judge.jsonl"))
    assert not held & {*train, *judge} and not {*train} & {*judge}, "the final evaluation is not seen, nor do judging rows train"
    assert sorted(train + judge) == sorted(map(str, prepare(c.trials[0].run).rows)) and len(judge) == round(0.25 * (len(train) + len(judge)))
    config = yaml.safe_load((out / "lora" / "tune-0.02" / "config.yaml").read_text())
    assert config["data"]["train"] == str(out / "tuning" / "train.jsonl") and config["train"]["seed"] == 77
    assert "Learning rates were chosen for each cell from 0.0001, 0.02, 5 with 6 steps for each trial" in (out / "comparison.md").read_text()
    by = {r["cell"]: r for r in rec["cells"]}
    assert by["lora"]["learning_rate"] == 2e-2 and by["base"]["learning_rate"] is None
    kept = stamps(out) | {str(f): (f.stat().st_ino, f.stat().st_mtime_ns) for f in out.glob("*/tune-*/*")}
    said.clear()
    (out / "lora" / "seed-1" / "result.json").unlink()
    (out / "peft" / "tune-5" / "result.json").unlink()
    again = e.compare(s.parse(untuned(base, tmp_path, cells=cells, tune=TUNE, budget={"steps": 8})), say=said.append)
    assert "1 to run, 5 finished" in said[0] and any("1 to run, 5 finished" in line for line in said[1:]), said
    assert [r["values"] for r in again["cells"]] == [r["values"] for r in rec["cells"]]
    now = stamps(out) | {str(f): (f.stat().st_ino, f.stat().st_mtime_ns) for f in out.glob("*/tune-*/*")}
    assert all(now[f] == at for f, at in kept.items() if "/lora/seed-1/" not in f and "/peft/tune-5/" not in f)


def test_the_choice_of_a_learning_rate():
    def result(value, loss=1.0, status="ok"):
        return {"status": status, "error": "boom", "metrics": {"after": {"accuracy": value, "eval_loss": loss}}, "train_seconds": 2.0}

    def told(some, higher=True):
        one = rates.choose("a", some, "accuracy", higher)
        return one["rate"], one["edge"]

    assert told({1.0: result(0.5), 2.0: result(0.7), 3.0: result(0.6)}) == (2.0, False)
    assert told({1.0: result(0.5), 2.0: result(0.7), 3.0: result(0.9)}) == (3.0, True)
    assert told({1.0: result(0.5), 2.0: result(0.7), 3.0: result(0.9)}, higher=False) == (1.0, True)
    assert told({1.0: result(0.7, 0.9), 2.0: result(0.7, 0.5), 3.0: result(0.7, 0.5)}) == (2.0, False), "equal: the lower loss, then the lower rate"
    assert told({1.0: result(0.2), 2.0: result(math.nan), 3.0: result(0.9, status="failed")}) == (1.0, True), "what diverged or failed is not chosen"
    none = rates.choose("a", {1.0: result(math.nan), 2.0: result(0.9, status="failed")}, "accuracy", True)
    assert none["rate"] is None and none["errors"] == {"2": "boom"} and none["seconds"] == 4.0


def tuning_stamps(out: Path) -> dict[str, int]:
    return {f.parent.name: f.stat().st_mtime_ns for f in out.glob("*/tune-*/result.json")}


def test_a_grid_that_ends_too_early_goes_on_until_the_best_is_inside(base, tmp_path):
    """Stopped between two trials past the grid: what is finished stays, and the answer is that of a run in one go."""
    tune = TUNE | {"learning_rate": [1e-4, 1e-3], "extend": 4}
    what = untuned(base, tmp_path, cells=[{"name": "lora", "adapter": {"r": 4}}], tune=tune, seeds=1)
    out = tmp_path / "out"

    def killed(text):
        if text.startswith("[") and "learning rate 0.01 " in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        e.compare(s.parse(what), say=killed)
    before = tuning_stamps(out)
    assert set(before) == {"tune-0.0001", "tune-0.001", "tune-0.01"} and not (out / "comparison.json").exists() and ("lora", 0) not in results(out)
    said = []
    rec = e.compare(s.parse(what), say=said.append)
    now = tuning_stamps(out)
    assert len(now) > len(before) and all(now[k] == at for k, at in before.items()), "a finished trial was run again"
    (one,), (row,) = rec["tuning"], rec["cells"]
    rates = [float(r) for r in one["values"]]
    assert rates[:3] == [1e-4, 1e-3, 1e-2] and 4 <= len(rates) <= 6 and all(b / a == pytest.approx(10) for a, b in itertools.pairwise(rates))
    assert one["rate"] == min(rates, key=lambda r: one["values"][f"{r:g}"]) > 1e-3 and rates[-1] > one["rate"] and not one["edge"]
    assert row["rates_tried"] == len(rates) and row["learning_rate"] == one["rate"] and row["rate_at_edge"] is False
    text, lines = (out / "comparison.md").read_text(), (out / "comparison.csv").read_text().splitlines()
    assert "at most 4 further for each cell" in text and f"lora {one['rate']:g} ({len(rates)} tried)" in text and "| lr | tried |" in text
    assert dict(zip(*(line.split(",") for line in lines[:2]), strict=False))["rates_tried"] == str(len(rates))
    said.clear()
    assert e.compare(s.parse(what), say=said.append)["cells"] == rec["cells"] and not [line for line in said if line.startswith("[")], "nothing is run again"
    straight = e.compare(s.parse(what | {"output": str(tmp_path / "straight")}), **QUIET)
    assert [t["values"] for t in straight["tuning"]] == [t["values"] for t in rec["tuning"]]
    assert [c["values"] for c in straight["cells"]] == [c["values"] for c in rec["cells"]]


def test_no_cell_has_more_trials_than_its_share_and_an_edge_that_stays_is_said(base, tmp_path):
    what = untuned(base, tmp_path, cells=[{"name": "lora", "adapter": {"r": 4}}], tune=TUNE | {"learning_rate": [1e-6, 1e-5], "extend": 1}, seeds=1)
    rec = e.compare(s.parse(what), **QUIET)
    assert list(rec["tuning"][0]["values"]) == ["1e-06", "1e-05", "0.0001"] and rec["cells"][0]["rate_at_edge"]
    assert "0.0001 is at the edge of the 3 rates tried" in (tmp_path / "out" / "comparison.md").read_text()
    kept = tuning_stamps(tmp_path / "out")
    alone = e.compare(s.parse(what | {"tune": what["tune"] | {"extend": 0}, "output": str(tmp_path / "plain")}), **QUIET)
    assert alone["tuning"][0]["values"] == {k: v for k, v in rec["tuning"][0]["values"].items() if k != "0.0001"} and "extend" not in str(alone["tuning"])
    assert "| lr | seeds" not in (md := (tmp_path / "plain" / "comparison.md").read_text()) and "tried" not in md.split("\n\n")[1]
    with pytest.raises(LorakitError, match=r"lora seed 0 \(train.learning_rate: 0.0001 → 0.001\).*--again"):
        e.compare(s.parse(what | {"tune": what["tune"] | {"extend": 2}}), **QUIET)
    assert all(tuning_stamps(tmp_path / "out")[k] == at for k, at in kept.items()), "a longer walk begins where the shorter one ended"


def test_the_next_rate_keeps_the_ratio(base, tmp_path):
    """Down as well as up, from either end's own ratio, and not where the best is inside, has failed, or nothing is left."""
    c = s.parse(untuned(base, tmp_path, cells=[{"name": "a", "adapter": "lora"}], tune=TUNE | {"learning_rate": [1e-3, 4e-3, 4e-2], "extend": 1}))

    def onward(*values):
        for t, v in zip(c.tuning, values, strict=True):
            t.folder.mkdir(parents=True, exist_ok=True)
            result = {"status": "ok", "metrics": {"after": {"eval_loss": v}}} if v is not None else {"status": "failed", "error": "boom"}
            (t.folder / "result.json").write_text(json.dumps(result))
        return [(t.tunes, t.run.train.learning_rate, t.folder.name) for t in rates.onward(c, c.tuning, "eval_loss")]

    assert onward(3.0, 2.0, 1.0) == [(0.4, 0.4, "tune-0.4")] and onward(1.0, 2.0, 3.0) == [(2.5e-4, 2.5e-4, "tune-0.00025")]
    assert onward(3.0, 1.0, 2.0) == onward(3.0, 1.0, None) == onward(None, None, None) == []
    assert c.tuning[0].trying(0.4).settings() == c.tuning[-1].settings() | {"train.learning_rate": 0.4}


def test_a_cell_that_cannot_be_tuned_is_a_row_and_an_edge_is_said(base, tmp_path):
    cells = [{"name": "lora", "adapter": {"r": 4}}, {"name": "broken", "adapter": {"target_modules": ["q_prj"]}}]
    rec = e.compare(s.parse(untuned(base, tmp_path, cells=cells, tune=TUNE | {"learning_rate": [1e-5, 1e-2]}, budget={"steps": 4}, seeds=1)), **QUIET)
    by = {c["cell"]: c for c in rec["cells"]}
    assert by["broken"]["failed"] == 1 and by["broken"]["error"].startswith("no learning rate of the grid could be trained: ")
    assert by["lora"]["rate_at_edge"] and "0.01 is at the edge of the grid" in (tmp_path / "out" / "comparison.md").read_text()
    assert '<span class="tag" title="the first or last' in (tmp_path / "out" / "report.html").read_text()


def test_the_held_out_part_stays_while_the_seed_moves(base, tmp_path):
    c = s.parse(raw(base, tmp_path, seeds=[4, 9]))
    first, second = (prepare(t.run) for t in c.trials[:2])
    assert first.held == second.held and first.run.train.seed != second.run.train.seed
    moved = raw(base, tmp_path)
    moved["data"]["split_seed"] = 5
    assert prepare(s.parse(moved).trials[0].run).held != first.held
    run = c_.parse({"base": str(base), "data": moved["data"] | {"split_seed": None}, "train": {"seed": 5}})
    assert prepare(run).held == prepare(s.parse(moved).trials[0].run).held, "by default the split is the training seed's, as ever"


def test_dry_run_prints_the_cells_and_writes_nothing(base, tmp_path, monkeypatch, capsys):
    from lorakit.cli import app

    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw(base, tmp_path, cells=[{"base": True}, {"adapter": {"r": 4}}], seeds=[2, 7])))
    monkeypatch.setattr(sys, "argv", ["lorakit", "compare", "c.yaml", "--dry-run"])
    assert app.run(app.app) == 0
    text = capsys.readouterr().out
    assert "base  seeds 2, 7  the untouched base" in text and "lora  seeds 2, 7  r: 4" in text and "4 runs; budget of each: 4 steps" in text
    assert not (tmp_path / "out").exists()


def test_the_benchmark_is_a_valid_comparison():
    c = s.read(Path(__file__).parents[1] / "benchmarks" / "compare_lora_family.yaml")
    assert len(c.cells) == 12 and len(c.trials) == 36 and len(c.tuning) == 44 and sum(t.kind == "peft" for t in c.trials) == 6
