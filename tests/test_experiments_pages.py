"""The pages of benchmarks/pages.py and what benchmarks/hooks.py reads out of saved adapters: from a real comparison of hooks, figure by figure."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import test_training
import torch
from test_experiments import QUIET, raw, untuned

from benchmarks import hooks, overhead, pages
from lorakit.experiments import compare as e
from lorakit.experiments import config as s
from lorakit.formats.folder import Folder
from lorakit.hooks import HOOKS, build
from lorakit.inits import INITS
from lorakit.recipes import RECIPES

base = test_training.base
ROOT = Path(__file__).parents[1]
CELLS = [{"name": "base", "adapter": "none"}, {"name": "lora", "adapter": {"method": "lora", "r": 4}},
         {"name": "form", "adapter": {"method": "adalora", "r": 4}},
         {"name": "ada", "adapter": {"method": "adalora", "r": 4}, "hooks": [{"adalora": {"target_r": 1, "tinit": 2, "tfinal": 2}}]},
         {"name": "re", "adapter": {"method": "lora", "r": 4}, "hooks": [{"relora": {"every": 4, "warmup": 0}}]},
         {"name": "dy", "adapter": {"method": "lora", "r": 4}, "hooks": ["dylora"]},
         {"name": "half", "adapter": {"method": "lora", "r": 4}, "hooks": [{"sparse_adapter": {"at": 4}}]}]


@pytest.fixture(scope="module")
def compared(base, tmp_path_factory):
    """(folder, what it tells) of seven configurations after twelve steps."""
    tmp = tmp_path_factory.mktemp("pages")
    told = e.compare(s.parse(raw(base, tmp, cells=CELLS, seeds=2, budget={"steps": 12})), command="lorakit compare c.yaml", **QUIET)
    return tmp / "out", told


def table(text: str) -> dict[str, dict[str, str]]:
    """The table of a text that has one: first column -> column -> what is there."""
    lines = [[c.strip() for c in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: dict(zip(lines[0], row, strict=True)) for row in lines[2:]}


def test_a_page_says_what_the_comparison_and_the_files_say(compared):
    folder, told = compared
    text = pages.page(folder, told, pages.PAGES["hooks"])
    rows = table(text.partition("\n## ")[0])
    assert list(rows) == [c["cell"] for c in told["cells"]] and set(rows) == {c["name"] for c in CELLS}
    assert "12 of 12 saved adapters passed `verify`" in text and "{" not in text and "12\nsteps of 8 rows" in text
    for c in told["cells"]:
        assert rows[c["cell"]]["after"].startswith(f"{c['mean']:.3f} ± ") and rows[c["cell"]]["trains"] == f"{c['trainable']:,.0f}"
    by = {c["cell"]: c for c in told["cells"]}
    for name, other in (("re", "lora"), ("dy", "lora"), ("ada", "form")):
        gap = by[name]["mean"] - by[other]["mean"]
        assert rows[name]["minus without"].split(" ")[0] == f"{gap:+.3f}", "measured against the same adapter without the hook"
    assert rows["lora"]["minus without"] == rows["base"]["minus without"] == "" and rows["base"]["ranks"] == ""
    assert rows["lora"]["ranks"] == "4" and rows["re"]["ranks"] == "12" and int(rows["ada"]["ranks"].split(" – ")[-1]) >= 1
    left, whole = (int(w.replace(",", "")) for w in rows["half"]["entries not zero"].split(" of "))
    assert abs(left - whole / 2) <= 1 and rows["lora"]["entries not zero"] == f"{whole:,} of {whole:,}"


def test_adaloras_budget_is_counted_in_the_files(compared):
    folder, told = compared
    found = table(hooks.budget(folder, told))["ada"]
    files = [Folder(folder / "ada" / f"seed-{seed}" / "adapter") for seed in (0, 1)]
    targets = len(files[0].methods)
    assert (found["components at first"], found["budget"], found["left in the file"]) == (str(4 * targets), str(targets), str(targets))
    kept = sum(int(t.count_nonzero()) for k, t in files[1].tensors.items() if re.search(r"lora_E", k))
    assert int(found["left in the file"]) == kept, "the last seed's, counted in its tensors"


def test_the_rank_of_a_sum_of_rounds(compared):
    folder, told = compared
    found = table(hooks.growing(folder, told))["re"]
    ranks = [float(found[f"after round {n}"]) for n in (1, 2, 3)]
    assert 3.5 < ranks[0] <= 4 and 7.5 < ranks[1] <= 8 and 11 < ranks[2] <= 12
    g = torch.Generator().manual_seed(0)
    B, A = torch.randn(7, 3, generator=g), torch.randn(3, 9, generator=g)
    assert hooks.numerical_rank(B, A) == 3 and hooks.numerical_rank(torch.cat([B, B], 1), torch.cat([A, 2 * A])) == 3
    assert hooks.numerical_rank(B * 0, A) == 0


def test_dyloras_curve_ends_at_the_measured_loss(compared):
    folder, told = compared
    found = table(hooks.curve(folder, told))
    assert list(found) == ["dy", "lora"]
    for c in told["cells"]:
        if c["cell"] in found:
            assert float(found[c["cell"]]["rank 4"]) == pytest.approx(c["mean"], abs=6e-4), "all ranks are the whole adapter"
            assert found[c["cell"]]["rank 1"] != found[c["cell"]]["rank 4"]


def test_a_page_about_starts_reads_the_curves(compared, tmp_path, monkeypatch):
    folder, told = compared
    curves = {c["cell"]: {"eval_loss": [[10, 3.25, 3.0, 3.5], [50, 1.5, 1.4, 1.6]]} for c in told["cells"] if c["cell"] == "lora"}
    (folder / "comparison.json").write_text(json.dumps(told | {"curves": curves}))
    monkeypatch.setattr("sys.argv", ["pages", str(folder), "--page", "starts", "--out", str(tmp_path / "starts.md")])
    pages.main()
    rows = table((tmp_path / "starts.md").read_text())
    assert (rows["lora"]["after 10 steps"], rows["lora"]["after 20 steps"], rows["lora"]["after 50 steps"]) == ("3.250", "", "1.500")
    assert rows["re"]["after 10 steps"] == ""
    monkeypatch.setattr("sys.argv", ["pages", str(folder)])
    with pytest.raises(SystemExit):
        pages.main()


def test_a_hook_of_tasks_is_tuned_on_rows_with_their_tasks(base, tmp_path):
    """The trials of all cells train on the same rows; those of such a hook find the column."""
    what = untuned(base, tmp_path, seeds=1, budget={"steps": 3}, tune={"learning_rate": [1e-3, 1e-2], "budget": {"steps": 2}, "fraction": 0.2},
                   cells=[{"name": "lora", "adapter": {"r": 2}}, {"name": "parted", "adapter": {"r": 2}, "hooks": ["pcgrad"]}])
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(json.loads(line) | {"task": "ab"[n % 3 == 0]}) for n, line in enumerate(file.read_text().splitlines())))
    told = e.compare(s.parse(what), **QUIET)
    assert [c["error"] for c in told["cells"]] == [None, None] and all(not t["errors"] for t in told["tuning"])
    assert {json.loads(line)["task"] for line in (tmp_path / "out" / "tuning" / "train.jsonl").read_text().splitlines()} == {0, 1}


def test_the_benchmarks_have_every_hook_and_every_start():
    named = {build(h).name for cell in s.read(ROOT / "benchmarks" / "hooks.yaml").settings.cells for h in cell.hooks or ()}
    assert named == set(HOOKS), "benchmarks/hooks.yaml needs a cell for each"
    assert set(overhead.CASES) == set(HOOKS), "benchmarks/overhead.py needs a case for each"
    for name, case in overhead.CASES.items():
        build({name: dict(case.options)})
    assert {t.run.spec().init or "kaiming" for t in s.read(ROOT / "benchmarks" / "starts.yaml").trials if t.kind == "lorakit"} == set(INITS)


def test_the_benchmarks_have_every_recipe():
    cells = [c for name in ("family", "hooks", "starts", "quantised") for c in s.read(ROOT / "benchmarks" / f"{name}.yaml").settings.cells]
    named = {c.adapter if isinstance(c.adapter, str) else (c.adapter or {}).get("method") for c in cells}
    masks = {"roselora", "large-sparse"}  # of hooks, which are in hooks.yaml
    assert set(RECIPES) - named - set(INITS) - masks == {"bitfit"}, "benchmarks/family.yaml needs a cell; its base has no biases"


def test_why_a_step_costs_more_is_counted():
    """Gradient surgery passes twice; LoRA+ adds nothing to a step."""
    small = {**overhead.TIME, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 32, "tokens": 8}
    before, overhead.TIME = overhead.TIME, small
    try:
        plain, twice, ada = (overhead.one(name, 9) for name in ("lora_plus", "pcgrad", "adalora"))
    finally:
        overhead.TIME = before
    assert plain["with"] == plain["without"] and overhead.why(plain) == "none"
    assert (twice["without"]["forwards"], twice["with"]["forwards"]) == (1, 2) and "2 forward passes for 1" in overhead.why(twice)
    assert ada["with"]["flops"] > ada["without"]["flops"] and len(ada["acting"]) == 1 and len(ada["ordinary"]) >= 8 and not plain["acting"]
    text = overhead.page([plain, twice], 9, "it")
    assert set(table(text)) == {"lora_plus", "pcgrad"}
