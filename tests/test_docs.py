"""The documents are true: generated pages are fresh, the toy method of the guide passes the suite, commands named exist."""

from __future__ import annotations

import doctest
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_generated_pages_are_fresh():
    done = subprocess.run([sys.executable, "docs/make.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout


def test_the_guides_toy_method_passes_the_suite(tmp_path):
    """A newcomer's file, word for word from the guide."""
    from lorakit.method import METHODS
    from lorakit.testing import check_method

    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "add-a-method.md").read_text(), re.S).group(1)
    file = tmp_path / "rowscale.py"
    file.write_text(code)
    spec = importlib.util.spec_from_file_location("rowscale", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["rowscale"] = module
    try:
        spec.loader.exec_module(module)
        layers = ("linear", "hf-conv1d", "embedding", "conv2d-groups")
        assert check_method(module.RowScale, layers=layers, dtypes=("float32",)) > 3 * 4 * 15
    finally:
        METHODS.pop("rowscale", None)
        sys.modules.pop("rowscale", None)


def test_a_wrong_toy_method_is_caught():
    """The guide's method with its scale forgotten in the fast path."""
    from lorakit.method import METHODS, Leaf, LowRank, kaiming, method, zeros
    from lorakit.testing import check_method

    try:
        @method("wrong", title="wrong", formula="W + 3 B A", laws=("rank<=r", "identity"))
        class Wrong(LowRank):
            r: int = 8
            A = Leaf("r i", kaiming)
            B = Leaf("o r", zeros)

            def factors(self, p):
                return p["B"], p["A"]

            def two(self, p):
                return p["B"] * 3, p["A"]

        with pytest.raises(AssertionError, match=r"wrong on linear in float32: two_views_agree"):
            check_method(Wrong, layers=("linear",), dtypes=("float32",))
    finally:
        METHODS.pop("wrong", None)


@pytest.mark.parametrize("name", ["lorakit", "lorakit.api", "lorakit.recipes"])
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module)
    assert result.failed == 0


def test_links_between_pages_resolve():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "src/lorakit/assets/pylm/README.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} → {target}"


def test_the_page_on_targets_runs(tmp_path, monkeypatch):
    import tiny

    tiny.llama().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "targets.md").read_text(), re.S))
    exec(compile(code, "docs/targets.md", "exec"), {})


def test_readme_names_only_verbs_that_exist():
    from lorakit.cli.app import VERBS

    named = set(re.findall(r"^lorakit (\w+)", (ROOT / "README.md").read_text(), re.M))
    assert named and named <= set(VERBS)


def test_every_known_name_finds_its_entry():
    from lorakit import catalog

    every = catalog.entries()
    for e in every:
        for n in (e["name"], *e["aliases"], e["title"]):
            assert any(f["name"] == e["name"] and f["kind"] == e["kind"] for f in catalog.show(n, every)), n
        assert {"name", "kind", "title", "formula", "paper", "aliases"} <= set(e)
    for n in ("LoRA", "rsLoRA", "DoRA", "LoRA-FA", "lora_plus", "LoRA+", "2402.09353", "Asymmetric LoRA"):
        assert catalog.show(n)


def test_the_conformance_page_has_every_method_on_every_target():
    from lorakit.testing.conformance import LAYERS, label
    from lorakit.testing.matrix import rows

    lines = [line.split(" | ") for line in (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert [x.strip(" |") for x in lines[0][1:]] == list(LAYERS), "mend: python -m lorakit.testing.matrix"
    missing = {n for n in map(label, rows()) if "probe" not in n} - {line[0].strip(" |") for line in lines}  # probes are registered by other tests
    assert not missing, f"docs/conformance.md has no row for {', '.join(sorted(missing))}; mend: python -m lorakit.testing.matrix"
