"""lorakit.testing over every registered method and the probes. By default every method in float32 on four kinds of target, and a rotating sample of the rest.

LORAKIT_SAMPLE=<number> picks the sample (default: today's date, so that forty-eight days see everything); `slow` holds the whole matrix.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import zlib

import probes  # noqa: F401
import pytest
import torch

from lorakit.method import METHODS, Leaf, LowRank, kaiming, method, zeros
from lorakit.methods.lora import LoRA
from lorakit.methods.magnitude import Magnitude
from lorakit.methods.offset import Offset
from lorakit.testing import CHECKS, DTYPES, LAYERS, Case, check_method, instances
from lorakit.testing.conformance import EXCEPTIONS, label, rel

DAY = int(os.environ.get("LORAKIT_SAMPLE", datetime.date.today().toordinal()))
# what people use as it comes, and nests deeper than the two levels `instances` makes
COMMON = {"lora@default": LoRA(), "dora@default": Magnitude(LoRA()), "dora@offset": Magnitude(Offset(LoRA(3, 5.0)), detach=False),
          "rslora@r1": LoRA(1, 3.0, "rslora")}
BROAD = ("linear", "embedding", "conv2d-groups", "experts")  # every method, every day
ALWAYS = {"magnitude(lora)", "offset(lora)", "trained-bias(lora)", *COMMON}
EVERY = {label(m): m for m in instances()} | COMMON
CELLS = [(name, layer, dtype) for name, m in EVERY.items() for layer in LAYERS for dtype in DTYPES if Case(m, layer, dtype).fits]


def sampled(word: str, every: int) -> bool:
    """One in `every` words, another one each day."""
    return (zlib.crc32(word.encode()) + DAY) % every == 0


def cell(name: str, layer: str, dtype: str):
    word = f"{name}-{layer}-{dtype}"
    always = dtype == "float32" and (name in ALWAYS or ("(" not in name and (layer in BROAD or sampled(word, 4))))
    return pytest.param(name, layer, dtype, id=word, marks=() if always or sampled(word, 16 if dtype == "float32" else 48) else pytest.mark.slow)


def run(name: str, layer: str, dtype: str, checks) -> list[str]:
    """What is wrong in one cell; an exception that no longer fails is wrong too."""
    wrong = []
    for check in (n for n in checks if n in Case(EVERY[name], layer, dtype).checks):
        why = EXCEPTIONS.get((label(EVERY[name]), check))
        try:
            CHECKS[check](Case(EVERY[name], layer, dtype))
        except Exception as e:
            if not why:
                wrong.append(f"{check}: {type(e).__name__}: {e}")
        else:
            if why:
                wrong.append(f"{check}: passes, so strike it from EXCEPTIONS ({why})")
    return wrong


@pytest.mark.parametrize(("name", "layer", "dtype"), [cell(*c) for c in CELLS])
def test_conforms(name, layer, dtype):
    wrong = run(name, layer, dtype, [c for c in CHECKS if c != "compile"])
    assert not wrong, f"{name} on {layer} in {dtype}:\n" + "\n".join(wrong)


@pytest.mark.parametrize(("name", "layer"), [
    pytest.param(n, y, id=f"{n}-{y}", marks=() if sampled(f"{n}-{y}", 80) else pytest.mark.slow) for n, y, d in CELLS if d == "float32"])
def test_compiles(name, layer):
    wrong = run(name, layer, "float32", ["compile"])
    assert not wrong, wrong[0]


def test_every_registered_method_is_in_the_matrix():
    seen = set()
    for m in EVERY.values():
        while m is not None:
            seen.add(m.name)
            m = getattr(m, "inner", None)
    assert seen == set(METHODS)


def test_instances_are_off_their_defaults():
    for cls in {type(m) for m in instances()}:
        among = [m for m in instances() if type(m) is cls]
        for f in dataclasses.fields(cls):
            off = f.name == "inner" or any(getattr(m, f.name) != f.default for m in among)
            known = (cls.name, f.name) in {("full", "trains"), ("flora", "kernel"), ("loha", "kernel"), ("lokr", "kernel")}
            assert off or known, f"{cls.name}.{f.name} is at its default everywhere: a dropped field would not show"


def test_exceptions_name_methods_and_checks():
    for (who, check), why in EXCEPTIONS.items():
        assert who in EVERY and check in CHECKS and len(why) > 20, (who, check, why)


def test_the_sample_rotates_through_every_cell():
    words = [f"{n}-{y}-{d}" for n, y, d in CELLS]
    seen = {w for day in range(12) for w in words if (zlib.crc32(w.encode()) + day) % 12 == 0}
    assert seen == set(words)


@pytest.fixture
def wrong_way():
    """A method whose fast path forgets its scale."""

    @method("wrong-way", title="broken on purpose", formula="W + 2 B A", laws=("identity",))
    class WrongWay(LowRank):
        r: int = 4

        A = Leaf("r i", kaiming)
        B = Leaf("o r", zeros)

        def factors(self, p):
            return 2 * p["B"], p["A"]

        def update(self, p, x, f, site, drop):
            return site.chain(drop(x), p["B"], p["A"])

    yield WrongWay
    del METHODS["wrong-way"]


def test_check_method_names_method_layer_dtype_and_check(wrong_way):
    with pytest.raises(AssertionError) as e:
        check_method(wrong_way, layers=["linear-square"], dtypes=["float64"])
    assert str(e.value).splitlines()[0].startswith("wrong-way on linear-square in float64: two_views_agree: ")


def test_check_method_passes_a_good_method_and_counts():
    checks = ["merge", "save_and_load"]
    wraps = 6 + 5  # plain, under magnitude, offset, transposed, a trained bias, and linear; with lora_bias, all but transposed
    assert check_method(LoRA, ["linear"], ["float32"], checks) == len(checks) * wraps


def test_check_method_refuses_an_empty_check():
    """A method whose noise does not matter must not pass: the agreement of two views would say nothing."""

    @method("probe-idle", title="does nothing", formula="W", laws=("identity",))
    class Idle(LowRank):
        A = Leaf("r i", kaiming)
        B = Leaf("o r", zeros)
        r: int = 4

        def factors(self, p):
            return p["B"] * 0, p["A"]

    try:
        with pytest.raises(AssertionError, match="noise must matter"):
            check_method(Idle, ["linear"], ["float32"], ["two_views_agree"])
    finally:
        del METHODS["probe-idle"]


def test_one_generator_per_path_whatever_torch_did_before():
    """Every cell starts from its own seed, so cells do not depend on their order."""
    a, x = Case(LoRA(), "linear", "float32").make()
    torch.rand(7)
    b, _ = Case(LoRA(), "linear", "float32").make()
    assert rel(a(x), b(x)) == 0
