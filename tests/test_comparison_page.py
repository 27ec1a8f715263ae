"""The report of a comparison: well-formed, the CSV's numbers, nothing from outside, labels apart, right in a browser and on paper."""

from __future__ import annotations

import csv
import io
import math
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lorakit.experiments import charts, machine, page, table
from lorakit.experiments.config import Settings

EVIL = "no module `q_prj` </td><script>alert(1)</script> <img src=http://x.test/a.png>"
VOID = {"meta", "br", "img"}
NAMES = ["base", "lora-r4", "lora-r8", "lora-r16", "rslora-r16", "dora-r8", "lora-fa-r8", "full", "everything-full-transformers", "bitfit",
         "peft-lora-r8", "peft-dora-r8"]
LOSS = [5.6, 1.35, 1.22, 1.15, 1.12, 1.2, 1.4, 0.64, 0.61, 2.9, 1.225, 1.21]


def record(seeds: int = 3, odd: bool = True) -> dict:
    """Twelve configurations with numbers of a real one's size, one that failed, one that diverged."""
    g, some = random.Random(0), []
    for i, name in enumerate(NAMES):
        for seed in range(seeds):
            v = LOSS[i] + g.gauss(0, 0.01) * (i > 0)
            some.append({"cell": name, "seed": seed, "kind": "none" if i == 0 else "lorakit", "status": "ok", "error": None,
                         "metrics": {"before": {"eval_loss": 5.6, "bleu": 0.1}, "after": {"eval_loss": v, "bleu": 20 * g.random()}},
                         "train_seconds": 0.0 if i == 0 else 10 + i + g.random(), "cpu_seconds": 9.0, "tokens": 40000 * (i > 0),
                         "tokens_per_second": None if i == 0 else 4000.0 + i, "peak_memory_bytes": 410_000_000 + 3_000_000 * i, "trainable": 11500 * i,
                         "saved_bytes": None if i == 0 else 30_000_000 + i, "adapter_bytes": 46000 * i, "merge_loss": 1e-7 * g.random() if i else None,
                         "elsewhere": {"before": 1.4, "after": 1.4 + 0.5 * g.random() * (i > 0)}, "threads": 1, "device": "cpu", "verify": True if i else None})
    if odd:
        some.append({"cell": "broken", "seed": 0, "status": "failed", "error": EVIL})
        lost = {"before": {"eval_loss": 5.6, "bleu": 0.0}, "after": {"eval_loss": math.nan, "bleu": 0.0}}
        some.append(some[seeds + 1] | {"cell": "diverged", "seed": 0, "metrics": lost})
    settings = Settings.model_validate({"seeds": seeds, "metrics": ["bleu"], "budget": {"steps": 200},
                                        "tune": {"learning_rate": [1e-3, 3e-3, 1e-2], "budget": {"steps": 40}}}).model_dump()
    rec = table.summarise(some, settings, "eval_loss", False)
    for c in rec["cells"]:
        c["learning_rate"] = None if c["kind"] in ("none", None) else g.choice([1e-3, 3e-3, 1e-2])
        c["rate_at_edge"] = c["learning_rate"] in (1e-3, 1e-2)
    curves = {c["cell"]: {"loss": [[k, v := c["mean"] + 3 * math.exp(-k / 30), v - 0.05, v + 0.05] for k in range(2, 200, 4)],
                          "eval_loss": [[200, c["mean"], c["mean"], c["mean"]]]} for c in rec["cells"] if c["mean"] and c["kind"] == "lorakit"}
    curves.pop("diverged", None)
    return rec | {"tuning": [{"cell": c["cell"], "values": {"0.001": 2.0, "0.003": 1.5, "0.01": None}, "rate": c["learning_rate"],
                              "edge": c["rate_at_edge"], "seconds": 20.0, "errors": {"0.01": EVIL}} for c in rec["cells"] if c["learning_rate"]],
                  "machine": machine.describe(some), "command": "lorakit compare cells.yaml", "title": "a <comparison>", "base": "stories260k", "jobs": 2,
                  "curves": curves,
                  "data": {"train": "rows.jsonl", "eval": None, "shape": "text", "rows": 4000, "eval_rows": 400}}


class Reader(HTMLParser):
    """Checks that tags close in their order; keeps the rows of tables and every attribute."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.attrs, self.tables, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.attrs += [(tag, k, v) for k, v in attrs]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append({"tag": tag, "text": "", **dict(attrs)})
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attrs += [(tag, k, v) for k, v in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.open, self.getpos())

    def handle_data(self, data):
        self.text += data if self.open and self.open[-1] not in ("style", "script") else ""
        if self.open and {"td", "th"} & set(self.open) and self.tables:
            self.tables[-1][-1][-1]["text"] += data


def test_the_page_is_well_formed_and_loads_nothing():
    text = page.html(record())
    r = Reader(text)
    assert "://" not in text.replace(EVIL.replace("<", "&lt;").replace(">", "&gt;"), ""), "a URL"
    assert not [a for a in r.attrs if a[1] in ("src", "href", "xlink:href", "action") or a[1].startswith("on")] and "@import" not in text and "url(" not in text
    assert text.count("<script>") == 1 and EVIL in r.text, "an error is shown as text"
    assert "default-src 'none'" in text and "prefers-color-scheme:dark" in text and "@media print" in text
    ids = [v for _, k, v in r.attrs if k == "id"]
    assert len(ids) == len(set(ids))
    assert {i for _, k, v in r.attrs if k == "aria-labelledby" for i in v.split()} <= set(ids)
    assert text.count("<svg") == text.count("<title") - 1 - text.count("<circle class=\"on\"") - text.count("<circle class=\"off\""), "each picture has a title"
    assert text.count("<table") == text.count("<caption")
    assert all(h.get("scope") in ("col", "row") for t in r.tables for row in t for h in row if h["tag"] == "th")
    for words in ("broken, 1 of 1 seeds: ", "diverged: eval_loss is not finite", "Not distinguishable from it: full", "lorakit compare cells.yaml",
                  "2 runs at a time", "numpy "):
        assert words in r.text, words


def test_the_numbers_are_those_of_the_csv():
    rec = record()
    main = Reader(page.html(rec)).tables[0]
    lines = {line["cell"]: line for line in csv.DictReader(io.StringIO(table.csv(rec)))}
    keys = [k for k, *_ in page._columns(rec)]
    assert [row[0]["data-v"] for row in main[1:]] == list(lines) and len(keys) > 10
    for row in main[1:]:
        line = lines[row[0]["data-v"]]
        if line["mean"] == "":
            continue
        assert [cell["data-v"] for cell in row[1:]] == [line["mean"], line["mean"], *(line[k] for k in keys)], row[0]


def test_what_is_said_agrees_with_the_tests():
    rec = record()
    ties = page.ties(rec)
    for d in rec["differences"]:
        if d["p"] is not None:
            where = next(k for k, names in ties[d["a"]].items() if d["b"] in names)
            assert where == ("tie" if not d["distinguishable"] else "better" if d["mean"] < 0 else "worse")
            assert d["a"] in ties[d["b"]][{"better": "worse", "worse": "better", "tie": "tie"}[where]]
    assert page.best(rec) == ("everything-full-transformers", ties["everything-full-transformers"]["tie"])
    up = rec | {"higher_is_better": True}
    assert page.ties(up)["base"]["better"] == ties["base"]["worse"]


@pytest.mark.parametrize("odd", [True, False])
def test_few_seeds_and_nothing_finite(odd):
    rec = record(seeds=1, odd=odd)
    assert "One seed gives no interval" in Reader(page.html(rec)).text
    for c in rec["cells"]:
        c |= {"mean": math.nan, "half": None}
    assert "No configuration ended with a finite result" in Reader(page.html(rec | {"curves": {}, "tuning": []})).text


def test_labels_of_a_plot_keep_apart():
    """Sixteen points in four clusters: no label on another, none on a point, all inside."""
    g = random.Random(3)
    places = enumerate([(120, 80), (420, 90), (200, 250), (430, 260)] * 4)
    points = [(x + g.uniform(-12, 12), y + g.uniform(-9, 9), f"configuration-{i}") for i, (x, y) in places]
    inside = (60, 10, 610, 340)
    labels = charts.place(points, inside)
    boxes = [(a, b - 6, a + len(t) * charts.LETTER, b + 6) for (a, b, _), (_, _, t) in zip(labels, points, strict=True)]
    for n, box in enumerate(boxes):
        assert all(charts._over(box, other) == 0 for other in boxes[n + 1 :]), n
        assert all(charts._over(box, (x - 4, y - 4, x + 4, y + 4)) == 0 for x, y, _ in points), n
        assert box[0] >= inside[0] - 1 and box[2] <= inside[2] + 1 and box[1] >= inside[1] - 1 and box[3] <= inside[3] + 1


def test_scales_and_ticks():
    assert charts.ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0]) and charts.ticks(3.0, 3.0) == [3.0]
    s = charts.Scale([0.0, 10.0, 12.0], 0, 100)
    assert s.zeros and not s.log and s(0.0) == 0 and 8 < s(10.0) < s(12.0) < 100 and s.ticks()[0] == (0, "0")
    s = charts.Scale([1.0, 1000.0], 0, 100)
    assert s.log and abs(s(31.6) - 50) < 0.5
    s = charts.Scale([-1.0, 1000.0], 0, 100)
    assert not s.log and not s.zeros and s(-1.0) < s(0.0)
    assert charts.Scale([5.0], 0, 100)(5.0) == pytest.approx(50)


PROBE = """<script>addEventListener('load',()=>{const t=document.querySelector('table.main'),col=n=>[...t.tBodies[0].rows].map(r=>r.cells[n].dataset.v),
heads=[...t.tHead.rows[0].cells].map(h=>h.textContent),n=heads.indexOf('time'),b=t.tHead.rows[0].cells[n].firstChild;b.click();const up=col(n),
sort=t.tHead.rows[0].cells[n].getAttribute('aria-sort');b.click();const down=col(n);t.tHead.rows[0].cells[0].firstChild.click();
document.body.dataset.found=JSON.stringify({up,down,sort,names:col(0),wide:document.documentElement.scrollWidth,window:innerWidth,
dark:matchMedia('(prefers-color-scheme:dark)').matches})})</script>"""


@pytest.fixture
def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium or Chrome is installed to look at the page with")
    return found


def _run(browser: str, *words: str) -> str:
    done = subprocess.run([browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *words], capture_output=True, text=True, timeout=90)
    if done.returncode:
        pytest.skip(f"the browser does not run here: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


@pytest.mark.parametrize("width", [1280, 520])
def test_in_a_browser_columns_sort_and_nothing_sticks_out(browser, tmp_path, width):
    import html
    import json

    (tmp_path / "r.html").write_text(page.html(record()).replace("</body>", PROBE + "</body>"))
    dom = _run(browser, "--dump-dom", f"--window-size={width},900", f"file://{tmp_path / 'r.html'}")
    found = json.loads(html.unescape(re.search(r'data-found="(.*?)"', dom)[1]))
    numbers = [float(v) for v in found["up"] if v]
    assert found["sort"] == "ascending" and numbers == sorted(numbers) and found["up"][-1] == "", "what failed stays last"
    assert [float(v) for v in found["down"] if v] == numbers[::-1] and found["down"][-1] == ""
    assert found["names"] == sorted(found["names"])
    assert found["window"] == width and found["wide"] <= width, "the page is wider than the window"


def test_on_paper_no_table_is_cut(browser, tmp_path):
    """Every cell of the main table lies on the page: its text is in the PDF, within the page's width."""
    if not shutil.which("pdftotext"):
        pytest.skip("pdftotext is not installed to read the printed page with")
    (tmp_path / "r.html").write_text(page.html(record()))
    _run(browser, "--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'r.pdf'}", f"file://{tmp_path / 'r.html'}")
    subprocess.run(["pdftotext", "-bbox", str(tmp_path / "r.pdf"), str(tmp_path / "r.txt")], check=True, timeout=60)
    text = Path(tmp_path / "r.txt").read_text()
    width = float(re.search(r'<page width="([\d.]+)"', text)[1])
    words = [(float(x), w) for x, w in re.findall(r'xMax="([\d.]+)"[^>]*>([^<]*)</word>', text)]
    assert width > 800 and sum(w == "pass" for _, w in words) == 12, "the last column is on paper"
    assert max(x for x, _ in words) <= width - 25
