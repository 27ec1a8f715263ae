"""Hooks against slow transcriptions of their formulas, tasks told by a column of the data, and starts that look at data from YAML."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tiny
import torch
from test_hooks import adapted, run, shake
from test_training import base, config  # noqa: F401

import lorakit
from lorakit import LorakitError, host
from lorakit.hooks import build
from lorakit.hooks.base import Hooks
from lorakit.hooks.ranks import lora_drop, lora_drop_spec, stratified
from lorakit.inits import INITS
from lorakit.training import data as d
from lorakit.training import run as r
from lorakit.training.prepare import prepare

SLOW = pytest.mark.slow


def quiet(said):
    pass


# HRA's orthogonality term


@pytest.mark.parametrize("squared", [False, True])
def test_hras_term_is_its_formula(squared):
    model = shake(adapted("hra", r=4, target_modules=["q_proj", "down_proj"]))
    want = 0.0
    for slot in host.slots(model).values():
        U = slot.parameters("default")["U"].detach().double()
        total = 0.0
        for a in range(4):
            for b in range(4):
                u, v = U[:, a], U[:, b]
                cos = sum(float(x) * float(y) for x, y in zip(u, v, strict=True)) / float(u.square().sum() * v.square().sum()) ** 0.5
                total += ((a == b) - cos) ** 2
        want += total if squared else total**0.5
    hook = build({"hra_orthogonality": {"weight": 0.3, "squared": squared}})
    hook.setup(model)
    assert float(hook.extra_loss(model, None).detach()) == pytest.approx(0.3 * want, rel=1e-4)


def apart(model):
    """How far the reflections are from orthogonal, over all targets."""
    out = 0.0
    for slot in host.slots(model).values():
        U = slot.parameters("default")["U"].detach()
        U = U / U.norm(dim=0)
        out += float((U.mT @ U - torch.eye(U.shape[1])).norm())
    return out


def test_hras_term_makes_reflections_orthogonal():
    free, held = (adapted("hra", r=4, begin="random") for _ in range(2))
    before = apart(free)
    run(free, [], range(8))
    run(held, [build({"hra_orthogonality": {"weight": 10.0}})], range(8))
    assert apart(held) < 0.8 * min(before, apart(free))


def test_hras_term_without_reflections_is_refused():
    for recipe, options in (("lora", {}), ("hra", {"r": 4, "gram_schmidt": True})):
        with pytest.raises(LorakitError, match="mend: method hra"):
            build("hra_orthogonality").setup(adapted(recipe, **options))
    with pytest.raises(LorakitError, match="at least 0"):
        build({"hra_orthogonality": {"weight": -1.0}})


# LoRA-drop, both phases


def first_phase(recipe="lora", **more):
    model = lorakit.adapt(tiny.llama(layers=5), recipe, **{"r": 2, "lora_alpha": 6, "lora_dropout": 0.1, "target_modules": ["q_proj", "up_proj"], **more})
    run(model, [], range(3))
    return model, [{"input_ids": tiny.ids()}]


@pytest.mark.parametrize("recipe,scope", [("lora", "name"), ("rslora", "shape")])
def test_lora_drops_second_phase_shares_what_does_not_stand_out(recipe, scope, tmp_path):
    model, data = first_phase(recipe, **({"target_modules": ["q_proj", "o_proj"]} if scope == "shape" else {}))
    plan = lora_drop(model, data, 0.5, scope)
    assert plan["share"] and plan["keep"]
    spec = lora_drop_spec(model, plan)
    second = lorakit.adapt(tiny.llama(layers=5), spec)
    slots = host.slots(second)
    assert set(slots) == set(host.slots(model)) and torch.equal(tiny.logits(second), tiny.logits(tiny.llama(layers=5)))
    of = {p: s.parameters("default") for p, s in slots.items()}
    for k in "AB":
        for group in plan["share"]:
            assert len({id(of[p][k]) for p in group}) == 1, "one pair for them all"
        own = [id(of[p][k]) for p in plan["keep"]]
        assert len(set(own)) == len(own) and not set(own) & {id(of[p][k]) for group in plan["share"] for p in group}
    one = next(iter(host.slots(model).values())).methods["default"].core
    for path, slot in slots.items():
        core, p = slot.methods["default"].core, of[path]
        p = {"A": torch.randn(2, 16), "B": torch.randn(slot.site.out, 2)}
        W = torch.zeros(slot.site.out, 16)
        assert torch.allclose(core.weight(p, W), one.s * p["B"] @ p["A"], atol=1e-5), "as strong as the first adapter"
        assert slot.dropout["default"] == 0.1
    run(second, [], range(3))
    y = tiny.logits(second.eval())
    assert float((y - tiny.logits(tiny.llama(layers=5))).abs().max()) > 1e-3
    lorakit.save(second, tmp_path)
    assert float((tiny.logits(lorakit.load(tiny.llama(layers=5), tmp_path)) - y).abs().max()) < 1e-5


def test_lora_drops_shared_gradient_is_the_sum():
    model, data = first_phase()
    plan = lora_drop(model, data, 0.3)
    second = lorakit.adapt(tiny.llama(layers=5), dataclasses.replace(lora_drop_spec(model, plan), dropout=0.0))
    apart_ = lorakit.adapt(tiny.llama(layers=5), "lora", r=2, lora_alpha=6, target_modules=["q_proj", "up_proj"])
    ours, theirs = ({p: s.parameters("default") for p, s in host.slots(m).items()} for m in (second, apart_))
    with torch.no_grad():
        for p, leaves in theirs.items():
            for k, t in leaves.items():
                ours[p][k].normal_(generator=torch.Generator().manual_seed(3), std=0.1)
                t.copy_(ours[p][k])
    for m in (second, apart_):
        m(tiny.ids(), labels=tiny.ids()).loss.backward()
    for group in plan["share"]:
        for k in "AB":
            want = sum(theirs[p][k].grad for p in group)
            assert torch.allclose(ours[group[0]][k].grad, want, atol=1e-5)


def test_lora_drops_second_phase_refuses_what_cannot_share():
    model, data = first_phase(rank_pattern={"layers.0.self_attn.q_proj": 3})
    with pytest.raises(LorakitError, match="several ranks or strengths"):
        lora_drop_spec(model, lora_drop(model, data))
    plan = lora_drop(first_phase()[0], data)
    with pytest.raises(LorakitError, match="which has no adapter"):
        lora_drop_spec(adapted(), plan)


def test_a_stratified_sample_has_its_share_of_every_kind():
    kinds = ["a"] * 50 + ["b"] * 20 + ["c"]
    places = stratified(kinds, 0.1, seed=4)
    assert [sum(kinds[n] == k for n in places) for k in "abc"] == [5, 2, 1] and places == sorted(set(places))
    assert stratified(kinds, 0.1, seed=4) == places != stratified(kinds, 0.1, seed=5)
    assert stratified(kinds, 1.0) == list(range(71))
    with pytest.raises(LorakitError, match="above 0"):
        stratified(kinds, 0.0)


# Starts that look at data, in a run


@pytest.mark.parametrize("adapter,init", [
    ({"method": "lora", "init": {"name": "corda", "mode": "kpm", "batches": 3}}, "corda"), pytest.param({"method": "corda"}, "corda", marks=SLOW),
    pytest.param({"method": "eva", "init": {"name": "eva", "rho": 1.5}}, "eva", marks=SLOW), ({"method": "lora-ga"}, "lora-ga")],
    ids=["kpm", "corda", "eva", "lora-ga"])
def test_a_run_gives_a_start_the_data_it_looks_at(adapter, init, base, tmp_path, monkeypatch):  # noqa: F811
    seen, collect = [], INITS[init].collect

    def watched(model, plan, data, options):
        data = list(data)
        seen.extend(data)
        return collect(model, plan, data, options)

    monkeypatch.setitem(INITS, init, dataclasses.replace(INITS[init], collect=watched))
    rec = r.train(config(base, tmp_path, adapter={**adapter, "r": 2}), say=quiet)
    assert rec["verify"]["ok"] and rec["metrics"]["after"]["eval_loss"] < rec["metrics"]["before"]["eval_loss"]
    assert len(seen) == adapter.get("init", {}).get("batches", len(seen)) and 1 <= len(seen) <= 8
    assert all(b["input_ids"].shape[0] == 8 and set(b) == {"input_ids", "labels", "attention_mask"} for b in seen[:-1])


# Tasks by a column


def two_tasks(tmp_path, rows=40, **more):
    """Task b's answers contradict task a's, which come first."""
    file = tmp_path / "tasks.jsonl"
    lines = [{"prompt": f"the {k % 5} cat ", "completion": "sat on the mat" if k % 2 else "looked at the sea", "kind": "ab"[k % 2]} | more for k in range(rows)]
    file.write_text("\n".join(map(json.dumps, lines)))
    return {"train": str(file), "max_length": 32, "eval_fraction": 0.2, "columns": {"task": "kind"}}


@pytest.mark.parametrize("hook", ["pcgrad", pytest.param("gradvac", marks=SLOW), pytest.param("cagrad", marks=SLOW)])
def test_a_run_trains_on_tasks_told_by_a_column(hook, base, tmp_path, monkeypatch):  # noqa: F811
    kept, keep = [], Hooks.keep
    monkeypatch.setattr(Hooks, "keep", lambda self, task: (kept.append(task), keep(self, task))[1])
    rec = r.train(config(base, tmp_path, data=two_tasks(tmp_path), hooks=[{hook: {}}]), say=quiet)
    assert set(kept) == {0, 1} and len(kept) > 12, "both tasks' gradients apart"
    assert rec["metrics"]["after"]["eval_loss"] < rec["metrics"]["before"]["eval_loss"] and rec["verify"]["ok"]


def test_tasks_are_numbered_by_their_sorted_names(base, tmp_path):  # noqa: F811
    p = prepare(config(base, tmp_path, data=two_tasks(tmp_path), hooks=[{"pcgrad": {}}]))
    at = {"".join(p.tokenizer.decode(row["input_ids"])).count("looked"): row["task"] for row in p.train.rows}
    assert at == {1: 0, 0: 1} and all("task" not in row for row in [*p.held, *p.heldout.rows])
    batch = d.Collator(0)(p.train.rows[:3])
    assert batch["task"].tolist() == [row["task"] for row in p.train.rows[:3]]
    seen = r._looked_at(p, lorakit.recipes.compose("corda"))
    assert seen and all("task" not in batch for batch in seen), "nor has a start that looks at data anything to do with tasks"
    plain = prepare(config(base, tmp_path, data=two_tasks(tmp_path)))
    assert all("task" not in row for row in plain.train.rows), "without such a hook the column means nothing"


def test_numbers_name_tasks_in_their_order(base, tmp_path):  # noqa: F811
    data = two_tasks(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "tasks.jsonl").read_text().splitlines()]
    for k, line in enumerate(lines):
        line["kind"] = (2, 10)[k % 2]
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    p = prepare(config(base, tmp_path, data=data, hooks=[{"pcgrad": {}}]))
    assert {row["task"] for row in p.rows} == {0, 1} and all((row["task"] == 0) == ("looked" in row["completion"]) for row in p.rows)


@pytest.mark.parametrize("change,message", [
    ({"hooks": [{"pcgrad": {"tasks": 3}}]}, "the data has 2 tasks"), ({"columns": {}}, "`task` is missing"),
    ({"packing": True, "eval_fraction": 0.0}, "packing joins"), ({"same": True}, "one task alone")], ids=["number", "column", "packing", "one"])
def test_what_does_not_tell_tasks_is_refused(change, message, base, tmp_path):  # noqa: F811
    hooks = change.pop("hooks", [{"pcgrad": {}}])
    data = two_tasks(tmp_path, **({"kind": "a"} if change.pop("same", False) else {})) | change
    with pytest.raises(LorakitError, match=message):
        prepare(config(base, tmp_path, data=data, hooks=hooks))
