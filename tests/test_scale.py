"""What adapters cost grows with the layers and not with the adapters that are there: shown by counting calls, on tiny layers."""

from __future__ import annotations

import gc
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import lorakit
from lorakit import host, spec

NAMES = ["q_proj", "v_proj", "up_proj", "down_proj"]
FEW, MANY = 32, 64  # blocks
_bench = importlib.util.spec_from_file_location("scale", Path(__file__).resolve().parents[1] / "benchmarks" / "scale.py")
scale = importlib.util.module_from_spec(_bench)
_bench.loader.exec_module(scale)


def model(blocks: int, device: str = "cpu", adapters: int = 0) -> nn.Module:
    out = scale.build(4 * blocks, device)
    for n in range(adapters):
        lorakit.adapt(out, r=2, name=f"a{n}", target_modules=NAMES)
    return out


def calls(run: Callable[[], object]) -> int:
    """How many functions are called, Python's and C's."""
    count = 0

    def see(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()
    sys.setprofile(see)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def saved(m: nn.Module, folder: Path) -> Path:
    return lorakit.save(m, folder / str(id(m)), "a0")


@pytest.fixture(autouse=True, scope="module")
def warm(tmp_path_factory):
    """What is done once in a process is done."""
    m = model(2, adapters=2)
    lorakit.load(m, saved(m, tmp_path_factory.mktemp("warm")), "b")
    lorakit.adapt(m, "dora", name="c", r=2)
    lorakit.detach(m)


ATTACH = {
    "names": lambda m: lorakit.adapt(m, r=2, name="new", target_modules=NAMES),
    "all-linear": lambda m: lorakit.adapt(m, r=2, name="new"),
    "attention": lambda m: lorakit.adapt(m, r=2, name="new", target_modules="attention"),
    "expression": lambda m: lorakit.adapt(m, r=2, name="new", target_modules=r".*\.(q|v)_proj"),
    "paths": lambda m: lorakit.adapt(m, r=2, name="new", target_modules=[n for n, k in m.named_modules() if n.endswith("q_proj")]),
    "dora": lambda m: lorakit.adapt(m, "dora", r=2, name="new", target_modules=NAMES),
    "nonzero": lambda m: lorakit.adapt(m, "lora-nonzero", r=2, name="new", target_modules=NAMES),
    "full": lambda m: lorakit.adapt(m, "full", name="new", target_modules=NAMES),
    "modules_to_save": lambda m: lorakit.adapt(m, r=2, name="new", target_modules=["q_proj"], modules_to_save=["v_proj", "norm"]),
    "layers": lambda m: lorakit.adapt(m, r=2, name="new", target_modules=NAMES, layers_to_transform=list(range(len(m.model.layers)))),
    "ranks": lambda m: lorakit.adapt(m, r=2, name="new", target_modules=NAMES, rank_pattern={
        f"layers.{k}.self_attn.q_proj": 3 for k in range(len(m.model.layers))}),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("how", list(ATTACH))
def test_attaching_is_linear_in_the_layers(how, device):
    few, many = (calls(lambda m=model(n, device): ATTACH[how](m)) for n in (FEW, MANY))
    assert 1.5 < many / few <= 2.1, f"{few} calls for {FEW} blocks, {many} for {MANY}"


@pytest.mark.parametrize("how", ["names", "dora"])
def test_the_second_attach_costs_no_more_than_the_first(how):
    first = calls(lambda m=model(FEW): ATTACH[how](m))
    assert calls(lambda m=model(FEW, adapters=1): ATTACH[how](m)) <= first


VERBS = {
    "delete": lambda m, path: lorakit.delete(m, "a0"),
    "detach": lambda m, path: lorakit.detach(m),
    "freeze": lambda m, path: lorakit.freeze(m, "a0"),
    "save": lambda m, path: lorakit.save(m, path, "a0"),
    "load": lambda m, path: lorakit.load(m, path, "b"),
    "merge": lambda m, path: lorakit.merge(m),
    "unmerge": lambda m, path: lorakit.unmerge(lorakit.merge(m)),
}


@pytest.mark.parametrize("verb", list(VERBS))
def test_verbs_are_linear_in_the_layers(verb, tmp_path):
    got = []
    for n in (FEW, MANY):
        m = model(n, adapters=2)
        path = saved(m, tmp_path)
        got.append(calls(lambda m=m, path=path: VERBS[verb](m, path)))
    assert 1.5 < got[1] / got[0] <= 2.1, got


@pytest.mark.parametrize("verb", ["attach", *(v for v in VERBS if v != "detach")])
def test_adapters_that_are_there_cost_nothing(verb, tmp_path):
    got = []
    for there in (1, 20):
        m = model(12, adapters=there)
        run = VERBS.get(verb) or (lambda m, path: ATTACH["names"](m))
        path = saved(m, tmp_path)
        lorakit.activate(m, "a0")
        if verb == "delete":  # of the last one, which would give the base back
            lorakit.adapt(m, r=2, name="b", target_modules=NAMES)
        got.append(calls(lambda m=m, run=run, path=path: run(m, path)))
    assert got[1] <= 1.1 * got[0], got


def test_switching_costs_the_same_for_every_size():
    got = []
    for n, there in ((4, 2), (MANY, 2), (4, 20)):
        m = model(n, adapters=there)

        def switch(m=m):
            lorakit.activate(m, "a0")
            lorakit.activate(m, "a0", "a1", weights=[1.0, 0.5])
            with lorakit.disabled(m):
                pass

        got.append(calls(switch))
    assert len(set(got)) == 1 and got[0] < 600, got


def test_one_state_and_no_module_for_each_adapter():
    """A new adapter adds tensors to what is there: no slot, no module, no class."""
    m = model(4, adapters=1)
    slots, modules = host.slots(m), len(list(m.modules()))
    kinds = {type(k) for k in m.modules()}
    for n in range(1, 20):
        lorakit.adapt(m, r=2, name=f"a{n}", target_modules=NAMES)
    assert len(list(m.modules())) == modules and {type(k) for k in m.modules()} == kinds
    assert all(host.slots(m)[p] is s for p, s in slots.items()) and len({id(s.state) for s in slots.values()}) == 1


def test_patterns_for_every_layer_are_looked_up_not_tried_one_after_the_other(monkeypatch):
    work = 0

    class Counted:
        """A compiled expression that counts the alternatives it may have to try."""

        def __init__(self, pattern, *flags):
            self.real, self.size = re.compile(pattern, *flags), pattern.count("|") + 1

        def __getattr__(self, name):
            def run(*args):
                nonlocal work
                work += self.size
                return getattr(self.real, name)(*args)

            return run

    class Shim:
        error = re.error
        compile = staticmethod(Counted)

        @staticmethod
        def match(pattern, text):
            return Counted(pattern).match(text)

    paths = [f"model.layers.{k}.self_attn.{n}" for k in range(200) for n in NAMES]
    monkeypatch.setattr(spec, "re", Shim)
    got = spec.matched("rank_pattern", {f"layers.{k}.self_attn.q_proj": k for k in range(200)} | {r".*\.v_(proj)": 7}, paths)
    assert got == {p: int(p.split(".")[2]) if "q_proj" in p else 7 for p in paths if "q_proj" in p or "v_proj" in p}
    assert work <= 4 * len(paths), f"{work} alternatives for {len(paths)} paths and 200 patterns"


# The benchmark


@pytest.mark.parametrize(("library", "device"), [("lorakit", "cpu"), ("lorakit", "meta"), ("peft", "cpu")])
def test_the_benchmark_measures_everything(library, device, capsys):
    scale.measure(library, 8, device)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert {r["op"] for r in rows} == set(scale.OPS) - (set(scale.VALUES) if device == "meta" else set()) and all(r["seconds"] > 0 for r in rows)


def test_what_a_limit_cut_off_is_shown_as_such(monkeypatch):
    monkeypatch.setattr(scale, "one", lambda library, n, device, limit: {"attach 1st": 0.5} if library == "peft" else dict.fromkeys(scale.OPS, 2e-6))
    lines = scale.table([8], 60.0, "cpu", lambda line: None)
    assert lines[0] == "| | 8 lorakit | 8 peft |" and lines[2] == "| attach the 1st adapter | 2 µs | 500 ms |" and lines[-1].endswith("| 2 µs | not in 60 s |")
    assert torch.get_num_threads() == 1
