"""The shape of the house, read from the source: who may import whom, what a plain import costs, no branches on names."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import lorakit
from lorakit.inits import INITS
from lorakit.method import METHODS
from lorakit.recipes import RECIPES
from lorakit.sites import SITES
from lorakit.stores import STORES

ROOT = Path(lorakit.__file__).parent
FILES = sorted(p for p in ROOT.rglob("*.py") if "assets" not in p.parts)
CORE = {"errors", "maps", "kernels", "method", "methods", "stores", "sites", "inits", "host", "targets", "spec", "recipes", "formats", "models", "prompts",
        "merges", "proof", "api", "quantized"}
MAY = {  # unit -> units of lorakit it may import, besides itself and errors
    "errors": set(), "maps": {"kernels"}, "kernels": set(), "models": {"quantized"},
    "stores": {"kernels"}, "sites": {"stores"},
    "method": {"kernels", "maps"}, "methods": {"kernels", "maps", "method", "prompts"}, "prompts": {"maps", "method"},
    "inits": {"kernels", "method"}, "quantized": {"host", "sites", "stores", "targets"},
    "host": {"kernels", "maps", "method", "sites", "stores"},
    "targets": {"host", "sites"},
    "spec": {"host", "inits", "method", "methods", "sites", "targets"},
    "recipes": {"inits", "method", "methods", "spec"},
    "formats": {"quantized", "host", "kernels", "maps", "method", "methods", "sites", "spec", "stores"},
    "merges": {"formats", "host", "kernels", "maps", "method", "methods", "proof", "recipes", "sites", "spec", "targets"},
    "proof": {"formats", "host", "method", "models", "sites"},
    "api": CORE, "__init__": CORE,
}
LAZY = {"quantized/hub.py": {"transformers"}, "kernels/fused_triton.py": {"triton"}}  # what is made of a library's own; imported where that is at hand
LIGHT = {"torch", "safetensors", "numpy"} | set(sys.stdlib_module_names)
NEVER = {"compat"}  # nothing but itself imports it


def unit(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, everywhere: bool) -> list[tuple[int, str]]:
    """(line, dotted name) of what a file imports: at its top, or also inside functions; not what is only for type checkers."""
    out, todo = [], list(tree(path).body)
    while todo:
        node = todo.pop(0)
        if isinstance(node, ast.Import):
            out += [(node.lineno, a.name) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            out += [(node.lineno, f"{node.module}.{a.name}" if node.module == "lorakit" else node.module) for a in node.names]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        elif everywhere or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            todo += list(ast.iter_child_nodes(node))
    return out


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [p for p in FILES if unit(p) in MAY], ids=ids)
def test_the_core_imports_in_one_direction(path):
    may = MAY[unit(path)] | {unit(path), "errors"}
    for line, name in imports(path, everywhere=True):
        if name.split(".")[0] == "lorakit":
            to = (name.split(".") + ["__init__"])[1]
            assert to in may, f"{ids(path)}:{line} imports {name}; {unit(path)} may import {', '.join(sorted(may))}"


def test_the_table_has_every_unit_of_the_core_and_no_circle():
    assert CORE | {"__init__"} == set(MAY)
    order: list[str] = []

    def visit(u, above):
        assert u not in above, f"a circle: {' -> '.join([*above, u])}"
        if u not in order:
            for v in MAY[u] - {u} if u != "api" else ():
                visit(v, [*above, u])
            order.append(u)

    for u in MAY:
        if u != "__init__":
            visit(u, [])


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_what_is_outside_the_core_is_not_imported_by_it(path):
    for line, name in imports(path, everywhere=True):
        parts = name.split(".")
        if parts[0] != "lorakit" or len(parts) < 2:
            continue
        assert parts[1] not in NEVER or unit(path) in NEVER, f"{ids(path)}:{line}: nothing imports {name}"
        assert parts[1] != "cli" or unit(path) in ("cli", "__main__"), f"{ids(path)}:{line}: only the command line imports {name}"
        assert parts[1] != "testing" or unit(path) == "testing", f"{ids(path)}:{line}: only tests import {name}"


@pytest.mark.parametrize("path", [p for p in FILES if unit(p) in CORE | {"__init__"}], ids=ids)
def test_the_core_needs_torch_and_little_else_to_be_imported(path):
    for line, name in imports(path, everywhere=False):
        root = name.split(".")[0]
        light = root == "lorakit" or root in LIGHT | LAZY.get(ids(path), set())
        assert light, f"{ids(path)}:{line} imports {name} at its top: import it where it is used"


def test_import_lorakit_loads_no_heavy_library():
    code = ("import sys, lorakit; heavy = {'transformers', 'peft', 'accelerate', 'datasets', 'matplotlib', 'pydantic', 'typer', 'rich', 'yaml', 'trl'}; "
            "print(sorted(heavy & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", f"`import lorakit` loads {done.stdout}"


@pytest.mark.parametrize("folder", ["inits"])
def test_every_file_of_a_folder_is_imported_by_it(folder):
    """A file that is not imported registers nothing, and nobody notices (methods/ imports all it has)."""
    inside = {p.stem for p in (ROOT / folder).glob("*.py")} - {"__init__", "base"}
    named = {a.name for node in ast.walk(tree(ROOT / folder / "__init__.py")) if isinstance(node, ast.ImportFrom) for a in node.names}
    assert inside <= named, f"{folder}/__init__.py does not import {', '.join(sorted(inside - named))}"


def test_every_file_registers_what_it_is_named_for():
    for folder, table in (("methods", METHODS), ("inits", INITS)):
        for path in (ROOT / folder).glob("*.py"):
            if path.stem not in ("__init__", "base"):
                assert path.stem.replace("_", "-") in table, f"{ids(path)} registers no `{path.stem.replace('_', '-')}`"


# No branch on a name

NAMES = set(METHODS) | set(INITS) | set(STORES) | set(RECIPES) | {n.rsplit(".", 1)[1] for n in SITES}
HOME = {"recipes.py"}  # rows of names
ALLOWED = {  # (file, word) -> why it is not a branch on a method's name
    ("formats/folder.py", "lora"): "a form to save in, beside `auto` and `native`",
    ("methods/oft.py", "orthogonal"): "a law of the conformance suite, not the start of that name",
    ("methods/lora.py", "rslora"): "a scaling, which is this method's own field",
}


def compared(path: Path) -> list[tuple[int, str]]:
    """(line, word) of every string that is compared with ==, in, or a case."""
    out = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Compare) and any(isinstance(op, (ast.Eq, ast.NotEq, ast.In, ast.NotIn)) for op in node.ops):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            sides = [node.value]
        else:
            continue
        for side in sides:
            parts = side.elts if isinstance(side, (ast.Tuple, ast.List, ast.Set)) else side.keys if isinstance(side, ast.Dict) else [side]
            out += [(node.lineno, p.value) for p in parts if isinstance(p, ast.Constant) and isinstance(p.value, str)]
    return out


@pytest.mark.parametrize("path", [p for p in FILES if unit(p) in CORE], ids=ids)
def test_no_branch_on_the_name_of_a_method_layer_or_store(path):
    own = {path.stem, path.stem.replace("_", "-")} if unit(path) in ("methods", "inits", "stores") else set()
    for line, word in compared(path):
        if word in NAMES - own and ids(path) not in HOME:
            assert (ids(path), word) in ALLOWED, f"{ids(path)}:{line} compares with the name `{word}`: that belongs into its own file"


def test_the_allowed_comparisons_are_still_there():
    for (file, word), why in ALLOWED.items():
        assert word in {w for _, w in compared(ROOT / file)} and len(why) > 20, f"strike ({file}, {word}) from ALLOWED"


def test_the_search_for_comparisons_finds_them(tmp_path):
    path = tmp_path / "x.py"
    path.write_text('a = m == "lora"\nb = m.name in ("dora", "x")\nc = "offset" != m\nmatch m:\n    case "full":\n        pass\n')
    assert sorted(w for _, w in compared(path)) == ["dora", "full", "lora", "offset", "x"]


# Size


def code_lines(path: Path) -> int:
    """Lines that are neither blank, comment nor docstring."""
    text, gone = path.read_text(encoding="utf-8"), set()
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            gone |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return sum(1 for n, line in enumerate(text.splitlines(), 1) if line.strip() and not line.strip().startswith("#") and n not in gone)


@pytest.mark.parametrize("path", [p for p in FILES if unit(p) in ("methods", "inits", "kernels", "stores")], ids=ids)
def test_a_choice_on_an_axis_is_a_short_file(path):
    assert code_lines(path) <= 120, f"{ids(path)} has {code_lines(path)} lines of code"


@pytest.mark.parametrize("path", [p for p in FILES if unit(p) in CORE], ids=ids)
def test_no_file_of_the_core_outgrows_a_reader(path):
    assert code_lines(path) <= 500, f"{ids(path)} has {code_lines(path)} lines of code"


@pytest.mark.parametrize("path", [p for p in FILES if unit(p) in CORE], ids=ids)
def test_every_file_of_the_core_says_what_it_is(path):
    assert ast.get_docstring(tree(path)), f"{ids(path)} has no docstring"
