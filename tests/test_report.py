"""The report: figures in human units, the curve, the page with every part present, missing or not finite."""

from __future__ import annotations

import base64
import copy
import io
import json
import math
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from lorakit.errors import LorakitError
from lorakit.training import report

EVIL = '<script>alert("1")</script> & <img src=http://x.test/a.png> [/bold]'
PNG = b"\x89PNG\r\n\x1a\n"
RUN = {
    "title": "lora r=8 on pylm",
    "base": {"name": "pylm-base", "parameters": 4475648},
    "adapter": {"method": "lora", "summary": "LoRA r 8, 4 modules", "path": "runs/x/adapter", "bytes": 398336,
                "trainable": 98304},
    "data": {"train": "file.txt", "rows": 1000, "tokens": 120000, "trained_tokens": 110000, "eval_rows": 100,
             "preview": "a < b ⟦a trained part⟧ then ⟦one cut off"},
    "history": [{"step": s, "loss": 2 + 2 * math.exp(-s / 50) + 0.1 * (-1) ** s} for s in range(1, 101)]
    + [{"step": s, "eval_loss": 2.1 + 2 * math.exp(-s / 50)} for s in (25, 50, 75, 100)],
    "metrics": {"before": {"eval_loss": 4.1, "perplexity": 60.34, "exact_match": 0.0},
                "after": {"eval_loss": 3.075, "perplexity": 21.65, "exact_match": 0.34}},
    "samples": [{"prompt": "Add.", "before": "the the", "after": "a + b", "expected": "a + b"},
                {"prompt": "Sort.", "before": "os", "after": "sorted(a)", "expected": None}],
    "cost": {"train_seconds": 61.2, "tokens_per_second": 4000.0, "peak_memory_bytes": 812345678, "steps": 200,
             "threads": 1, "device": "cpu"},
    "verify": {"ok": True, "points": [{"name": "key coverage", "ok": True, "detail": "70 of 70 tensors"},
                                      {"name": "peft reads it", "ok": None, "detail": ""}]},
    "modules": [{"name": f"model.layers.{i}.{k}", "rank": 8, "delta_norm": 0.3, "share": 0.01 * (i + 1)}
                for i in range(2) for k in ("self_attn.q_proj", "mlp.up_proj")]
    + [{"name": "lm_head", "rank": 8, "share": 0.04}],
    "config": {"adapter": {"r": 8}}, "versions": {"torch": "2.13.0"}, "date": "2026-11-22T17:00:00",
}
MISSING = {
    "base": ("Setup", "Base not recorded"), "cost": ("Setup", "Time not recorded"), "data": ("Data", "not recorded"),
    "history": ("Loss", "No training loss was recorded."), "metrics": ("Metrics", "No evaluation was made."),
    "samples": ("Samples", "No samples were taken."), "verify": ("Verification", "not recorded"),
    "modules": ("Learned change", "The change of the modules was not measured."),
    "config": ("Configuration", "Not recorded."), "adapter": ("Setup", "Adapter not recorded"),
}
VOID = {"meta", "img", "rect", "br", "link", "input"}


class Page(HTMLParser):
    """Text, attributes and nesting of a page, as a browser would read them."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.stack, self.pieces, self.source = [], [], [], [], source
        self.feed(source)
        self.close()
        self.text = " ".join(" ".join(self.pieces).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, k, v or "") for k, v in attrs]
        if tag not in VOID | {"th"}:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.stack and self.stack.pop() == tag, f"</{tag}> closes nothing at {self.getpos()}"

    def handle_data(self, data):
        if "style" not in self.stack:
            self.pieces.append(data)

    def section(self, title: str) -> str:
        """The text from one heading to the next."""
        found = re.search(rf"<h2>{title}</h2>(.*?)</section>", self.source, re.S)
        assert found, f"no section {title}"
        return Page(found[1]).text


def page(run: dict) -> Page:
    made = Page(report.html(run, PNG + b"picture"))
    assert made.stack == [] and made.tags.count("html") == made.tags.count("body") == made.tags.count("h1") == 1
    return made


def plain(run: dict) -> str:
    out = Console(file=io.StringIO(), width=110, color_system=None)
    out.print(report.summary(run))
    return out.file.getvalue()


def without(*keys: str, **put) -> dict:
    return {k: v for k, v in copy.deepcopy(RUN).items() if k not in keys} | put


def pixels(history, before=None) -> np.ndarray:
    file = io.BytesIO()
    report.loss_figure(history, before).savefig(file, format="png")
    assert file.getvalue().startswith(PNG)
    return imread(io.BytesIO(file.getvalue()))[..., :3]


def words(figure) -> list[str]:
    return [t.get_text() for t in figure.axes[0].texts if t.get_text()]


@pytest.mark.parametrize(("x", "kind", "said"), [
    (0, "bytes", "0 B"), (1023, "bytes", "1,023 B"), (1024, "bytes", "1.00 KiB"), (812345678, "bytes", "775 MiB"),
    (1024 ** 2 - 1, "bytes", "1.00 MiB"), (5.5 * 2 ** 40, "bytes", "5.50 TiB"), (5000 * 2 ** 40, "bytes", "5,000 TiB"),
    (1, "count", "1"), (0.4, "count", "0.4"), (98304, "count", "98,304"), (120000, "count", "120 k"),
    (999_999, "count", "1.00 M"),
    (4475648, "count", "4.48 M"), (12_340_000, "count", "12.3 M"), (9_997_000, "count", "10.0 M"),
    (7.24e9, "count", "7.24 B"),
    (0, "seconds", "0 ms"), (0.0384, "seconds", "38 ms"), (0.9999, "seconds", "1.0 s"), (59.94, "seconds", "59.9 s"),
    (59.96, "seconds", "1 min 0 s"), (61.2, "seconds", "1 min 1 s"), (3599.4, "seconds", "59 min 59 s"),
    (3599.7, "seconds", "1 h 0 min"),
    (86_369, "seconds", "23 h 59 min"), (86_380, "seconds", "1 d 0 h"), (200_000, "seconds", "2 d 8 h"),
    (0, "share", "0.0 %"), (1, "share", "100.0 %"), (0.02196, "share", "2.20 %"), (0.0000123, "share", "0.0012 %"),
    (-0.25, "share", "−25.0 %"),
    (3, "number", "3.000"), (0, "number", "0.000"), (614.33, "number", "614.3"), (123456, "number", "123,456"),
    (2e-5, "number", "2.0e−5"),
    (1.5e12, "number", "1.5e12"), (-1.632, "number", "−1.632"),
    (None, "bytes", "—"), ("text", "count", "—"), (True, "number", "—"), ([], "share", "—"), (10 ** 400, "count", "—"),
    (math.nan, "seconds", "NaN"), ("NaN", "number", "NaN"), (math.inf, "bytes", "∞"), (-math.inf, "share", "−∞"),
])
def test_figures_in_human_units(x, kind, said):
    assert report.human(x, kind) == said


def test_page_tells_every_part():
    p = page(RUN)
    for said in ("lora r=8 on pylm", "2026-11-22T17:00:00", "verification PASS", "LoRA r 8, 4 modules · base pylm-base",
                 "4.100 → 3.075", "2.20 %", "98,304 of 4.48 M parameters", "1 min 1 s", "200 steps · 4,000 tokens/s",
                 "775 MiB", "cpu · 1 thread",
                 "runs/x/adapter · 389 KiB", "torch", "2.13.0", '"r": 8'):
        assert said in p.text, said
    assert "cpu · 1 threads" not in p.text
    assert "file.txt · 1,000 rows · 120 k tokens · 110 k trained · 100 evaluation rows" in p.section("Data")
    assert "1 of 2 checks passed key coverage pass 70 of 70 tensors peft reads it skipped" in p.section("Verification")
    assert p.section("Samples").count("Prompt") == 2 and p.section("Samples").count("Expected") == 1
    assert re.findall("<mark>(.*?)</mark>", p.source) == ["a trained part",
                                                          "one cut off"] and "a < b" in p.section("Data")
    assert p.tags.count("li") == 0, "nothing to warn about"


def test_metrics_tell_the_change_and_its_direction():
    rows = {r[0]: r[1:] for r in report._metrics(RUN)}
    assert rows == {"Evaluation loss": ("4.100", "3.075", "−1.025 (−25.0 %)", "better"),
                    "Perplexity": ("60.340", "21.650", "−38.690 (−64.1 %)", "better"),
                    "Exact match": ("0.0 %", "34.0 %", "+34.0 points", "better")}
    worse = without(metrics={"before": {"eval_loss": 2.0, "accuracy": 0.5, "tokens_seen": 10, "same_loss": 1.0,
                                        "old_loss": 1.0},
                             "after": {"eval_loss": 2.5, "accuracy": 0.25, "tokens_seen": 20, "same_loss": 1.0,
                                       "new_loss": 3.0}})
    rows = {r[0]: r[1:] for r in report._metrics(worse)}
    assert rows["Evaluation loss"] == ("2.000", "2.500", "+0.500 (+25.0 %)", "worse")
    assert rows["Accuracy"] == ("50.0 %", "25.0 %", "−25.0 points", "worse")
    assert rows["Tokens seen"][2:] == ("+10.000 (+100.0 %)", ""), "no verdict where the direction is unknown"
    assert rows["Same loss"][2:] == ("no change", "")
    assert rows["New loss"] == ("—", "3.000", "—", "") and rows["Old loss"] == ("1.000", "—", "—", "")
    assert "Accuracy is worse after training: 50.0 % → 25.0 %." in page(worse).text


def test_all_text_is_escaped_and_nothing_is_loaded():
    def poison(x):
        if isinstance(x, dict):
            return {k: poison(v) for k, v in x.items()} | {EVIL: EVIL}
        return [poison(v) for v in x] if isinstance(x, list) else EVIL if isinstance(x, str) else x

    p = page(poison(RUN))
    assert "script" not in p.tags and p.tags.count("img") == 1, "markup in the data became markup on the page"
    for title in ("Samples", "Data", "Verification", "Learned change", "Setup", "Configuration", "Metrics"):
        assert "alert(" in p.section(title), title
    assert EVIL in p.text and EVIL in plain(poison(RUN))
    assert "<i>" not in page(without(modules=[{"name": "<i>x", "share": 0.1}])).source
    for tag, name, value in p.attributes:
        assert not name.startswith("on") and (tag, name) not in {("a", "href"), ("link", "href"), ("use", "href")}
        assert "http" not in value or name == "http-equiv", (tag, name, value)
    policy = [v for t, n, v in p.attributes if (t, n) == ("meta", "http-equiv")]
    assert policy == ["Content-Security-Policy"]
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in [v for _, n,
                                                                              v in p.attributes if n == "content"]
    style = re.search("<style>(.*?)</style>", p.source, re.S)[1]
    assert not re.search(r"url\(|@import|http", style) and style.count("{") == style.count("}")
    [source] = [v for t, n, v in p.attributes if (t, n) == ("img", "src")]
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == PNG + b"picture"


def test_text_no_file_could_hold_is_shown_not_lost(tmp_path):
    odd = without(samples=[{"prompt": "a\x00b\x1b[31m", "before": "\ud800", "after": "x" * 9000, "expected": None}])
    paths = report.write_report(odd, tmp_path)
    text = Page(paths["report"].read_text(encoding="utf-8")).section("Samples")
    assert "a␀b␛[31m" in text and "(1,000 more characters)" in text and "\x1b" not in plain(without(title="\x1b[31m"))
    many = page(without(samples=[{"prompt": "p", "before": "b", "after": "a"}] * 30))
    assert "20 of 30 shown." in many.text and many.section("Samples").count("Prompt") == 20


@pytest.mark.parametrize("key", list(RUN))
@pytest.mark.parametrize("value", ["absent", None, {}, [], "text", 7])
def test_any_part_may_be_missing_or_of_another_kind(key, value):
    run = without(key) if value == "absent" else without(**{key: value})
    p = page(run)
    assert len(re.findall("<section>", p.source)) == 8
    assert plain(run).strip()
    if key in MISSING:
        heading, said = MISSING[key]
        assert said in p.section(heading) and said not in page(RUN).section(heading)


def test_empty_run(tmp_path):
    assert report.write_report({}, tmp_path / "new" / "folder")["report"].is_file()
    assert "Trained not recorded" in " ".join(plain({}).split()) and "not recorded" in page({}).section("Setup")


def test_what_is_not_finite_is_said_not_hidden():
    run = copy.deepcopy(RUN)
    for row in run["history"]:
        if row["step"] > 60:
            row |= {k: math.nan for k in ("loss", "eval_loss") if k in row}
    run["metrics"]["after"] |= {"eval_loss": math.nan, "perplexity": math.inf}
    run["modules"][0]["share"], run["modules"][1]["share"] = math.nan, 0.0
    run["verify"]["points"][0]["ok"] = False
    for text in (page(run).text, " ".join(plain(run).split())):
        for said in ("40 of 100 training losses are not finite, the first at step 61.",
                     "2 of 4 evaluation losses are not finite, the first at step 75.",
                     "Evaluation loss is not finite after training: 4.100 → NaN.",
                     "Perplexity is not finite after training: 60.340 → ∞.",
                     "1 of 5 adapted modules did not change.", "1 of 5 adapted modules are not finite.",
                     "The saved adapter failed its verification."):
            assert said in text, said
        assert "FAIL" in text and "PASS" not in text
    assert page(json.loads(json.dumps(run))).text == page(run).text, "run.json read back tells the same"
    assert "not finite" in words(report.loss_figure(run["history"]))
    assert "not finite" not in words(report.loss_figure(RUN["history"]))
    assert "no finite loss was recorded" in words(report.loss_figure([{"step": 1, "loss": math.nan}]))
    burst = report.loss_figure([{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.inf}, {"step": 3, "loss": 1.0}])
    assert 0 < burst.axes[0].get_ylim()[0] < burst.axes[0].get_ylim()[1] < 3 and "not finite" in words(burst)
    pixels([{"step": 1, "eval_loss": math.inf}], math.inf)


def test_overfitting_is_noticed():
    run = without(history=[{"step": s, "eval_loss": v} for s, v in ((10, 3.0), (20, 2.0), (30, 2.5))])
    assert "Evaluation loss was lowest (2.000) at step 20; last: 2.500." in page(run).text
    run["history"][-1]["eval_loss"] = 1.9
    assert "lowest" not in page(run).text


def test_bars_share_one_scale_and_group_by_kind():
    source = page(without(modules=RUN["modules"][::-1][1:] + RUN["modules"][-1:])).source  # not in order
    panels = re.findall(r"<figure><figcaption>(.*?)<span>(.*?)</span>.*?(<rect.*?)</svg><small>(.*?)</small>", source)
    assert [(a, b, d) for a, b, _, d in panels] == [
        ("mlp.up_proj", "max 2.00 %", "layer 0 to 1"), ("self_attn.q_proj", "max 2.00 %", "layer 0 to 1"),
        ("lm_head", "max 4.00 %", "")]
    heights = [[float(h) for h in re.findall(r' height="([\d.]+)"', c)] for _, _, c, _ in panels]
    assert heights == [[15, 30], [15, 30], [60]]
    assert "model.layers.1.mlp.up_proj: 2.00 %, rank 8" in source


def test_curve_shows_what_it_is_given():
    white = pixels([])
    drawn = pixels(RUN["history"], 4.1)
    assert drawn.shape[0] > 500 and drawn.shape[1] > 1200
    blank = (white < 0.98).any(-1).mean()
    assert (drawn < 0.98).any(-1).mean() > blank + 0.005, "the curve is blank"
    accent = np.array([0x0F, 0x6E, 0x6E]) / 255
    assert (np.abs(drawn - accent).max(-1) < 0.02).sum() > 1000 > 10 * (np.abs(white - accent).max(-1) < 0.02).sum()
    figure = report.loss_figure(RUN["history"], 4.1)
    axes = figure.axes[0]
    assert axes.get_yscale() == axes.get_xscale() == "linear"
    raw, smooth, evals, start = axes.lines
    assert list(raw.get_ydata()) == [r["loss"] for r in RUN["history"] if "loss" in r]
    assert list(evals.get_xdata()) == [25, 50, 75, 100]
    assert evals.get_marker() == "o" and start.get_linestyle() == "--" and set(start.get_ydata()) == {4.1}
    thin, thick = raw.get_ydata(), smooth.get_ydata()
    assert np.abs(np.diff(thick)).max() < 0.3 * np.abs(np.diff(thin)).max(), "the thick line is not smoother"
    trend = 2 + 2 * np.exp(-np.arange(1, 101) / 50)
    assert np.abs(thick - trend)[3:-3].max() < 0.01, "the smoothing shifts the curve"
    assert np.abs(thick - trend).max() < 0.1, "the smoothing bends the ends"
    assert [w.rsplit(" ", 1)[0] for w in words(figure)] == ["train", "eval", "eval before", "loss", "step"]


@pytest.mark.parametrize("slope", [1.0, -1.0])
def test_labels_keep_their_distance(slope):
    history = [{"step": s, "loss": slope * s, "eval_loss": slope * s} for s in (1, 2, 3)]
    axes = report.loss_figure(history, slope * 3).axes[0]
    low, high = axes.get_ylim()
    heights = sorted(t.get_position()[1] for t in axes.texts if t.get_text().startswith(("train", "eval")))
    assert len(heights) == 3 and min(np.diff(heights)) > 0.05 * (high - low)
    assert low <= heights[0] and heights[-1] <= high


def test_writes_both_files_or_none(tmp_path, monkeypatch):
    paths = report.write_report(RUN, tmp_path)
    assert paths == {"loss": tmp_path / "loss.png", "report": tmp_path / "report.html"}
    assert {f.name for f in tmp_path.iterdir()} == {"loss.png", "report.html"}, "temporary files are left"
    first = paths["loss"].read_bytes()
    assert first.startswith(PNG) and base64.b64encode(first).decode() in paths["report"].read_text(encoding="utf-8")
    monkeypatch.setattr(report, "html", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.write_report(without("history"), tmp_path)
    assert paths["loss"].read_bytes() == first and {f.name for f in tmp_path.iterdir()} == {"loss.png", "report.html"}


def test_drawing_leaves_pyplot_and_its_backend_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    had = "matplotlib.pyplot" in sys.modules
    pixels(RUN["history"])
    assert dict(matplotlib.rcParams) == before and ("matplotlib.pyplot" in sys.modules) == had


def test_without_matplotlib_the_mend_is_named(monkeypatch, tmp_path):
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(LorakitError, match=r"matplotlib.*pip install 'lorakit\[train\]'"):
        report.write_report(RUN, tmp_path)
    assert not list(tmp_path.iterdir())


def test_summary_for_the_terminal():
    text = " ".join(plain(RUN).split())
    for said in ("lora r=8 on pylm", "Base pylm-base 4.48 M parameters", "Trained 2.20 % 98,304 of 4.48 M parameters",
                 "Time 1 min 1 s 200 steps · 4,000 tokens/s", "Peak memory 775 MiB cpu · 1 thread",
                 "Verification PASS 1 of 2 checks passed", "Saved at runs/x/adapter 389 KiB",
                 "Evaluation loss 4.100 3.075 −1.025 (−25.0 %) better", "Exact match 0.0 % 34.0 % +34.0 points better"):
        assert said in text, said
    assert "!" not in text and "before" not in plain(without("metrics"))
    rows = zip(plain(RUN).splitlines()[9:12], ("before", "4.100", "60.340"), strict=True)
    ends = {line.index(w) + len(w) for line, w in rows}
    assert len(ends) == 1, "the numbers of a column do not end at one place"
