"""Rank policies, pruning, freezing: each against its formula written out slowly, and what it refuses (stopped and resumed in test_hooks.py)."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from test_distributed import together
from test_hooks import adapted, batch, run, sgd, shake, steps
from test_training import ROWS, StopAt, arguments, base, config, same_state  # noqa: F401
from tiny import logits

import lorakit
from lorakit import LorakitError, host
from lorakit.hooks import build, hooked
from lorakit.hooks.dylora import at_rank
from lorakit.hooks.ranks import importance, ladder, lora_drop, rank_by_importance, rank_ladder

# AdaLoRA


def leaves(model, adapter="default"):
    """Path -> the adapter's leaves."""
    return {p: s.parameters(adapter) for p, s in host.slots(model, adapter).items()}


class Slow:
    """AdaLoRA's allocator in plain loops over entries of the model's leaves."""

    def __init__(self, model, target, ti, tf, dt, T, b1, b2):
        self.p = leaves(model)
        self.I = {(m, k): torch.zeros_like(t, dtype=torch.float64) for m, p in self.p.items() for k, t in p.items()}
        self.U = {k: t.clone() for k, t in self.I.items()}
        self.target, self.ti, self.tf, self.dt, self.T, self.b1, self.b2 = target, ti, tf, dt, T, b1, b2
        self.b0, self.bT, self.dead = sum(len(p["E"]) for p in self.p.values()), target * len(self.p), None

    def budget(self, t):
        if t <= self.ti:
            return self.b0
        if t >= self.T - self.tf:
            return self.bT
        return int(self.bT + (self.b0 - self.bT) * (1 - (t - self.ti) / (self.T - self.tf - self.ti)) ** 3)

    def update(self, t):
        """After step t; t counts from 1."""
        if t < self.T - self.tf:
            for (m, k), old in self.I.items():
                p = self.p[m][k]
                for at in torch.cartesian_prod(*(torch.arange(n) for n in p.shape)).tolist():
                    at = tuple(at)
                    now = abs(float(p.detach()[at]) * float(p.grad[at]))
                    old[at] = self.b1 * old[at] + (1 - self.b1) * now
                    self.U[m, k][at] = self.b2 * self.U[m, k][at] + (1 - self.b2) * abs(now - old[at])
        if not (t >= self.T - self.tf or (t > self.ti and t % self.dt == 0)):
            return None
        if self.dead is None or t <= self.T - self.tf:
            S = []
            for m, p in self.p.items():
                s = {k: self.I[m, k] * self.U[m, k] for k in "EPQ"}
                S += [(float(s["E"][k, 0] + s["Q"][k].mean() + s["P"][:, k].mean()), m, k) for k in range(len(p["E"]))]
            self.dead = [(m, k) for _, m, k in sorted(S, key=lambda c: c[0])[: self.b0 - self.budget(t)]]
        return self.dead


@pytest.mark.parametrize(("ti", "tf", "dt"), [(0, 0, 1), (2, 3, 2)])
def test_adalora_prunes_what_the_formula_says(ti, tf, dt):
    T, model = 10, adapted("adalora", r=7, target_modules=["q_proj", "v_proj"])
    hook = build({"adalora": {"target_r": 2, "tinit": ti, "tfinal": tf, "delta_t": dt, "beta1": 0.8, "beta2": 0.7, "orth_weight": 0.1}})
    slow, after, seen = Slow(model, 2, ti, tf, dt, T, 0.8, 0.7), hook.after_step, []

    def both(m, optimizer, step):
        before = {p: q["E"].detach().clone() for p, q in slow.p.items()}
        dead = slow.update(step + 1)
        after(m, optimizer, step)
        for k, t in hook.averages.spread.items():
            path, _, leaf = k.split()
            assert torch.allclose(t.double(), slow.U[path, leaf], rtol=1e-4, atol=1e-12)
        for path, k in dead or ():
            before[path][k] = 0
        for path, q in slow.p.items():
            assert torch.equal(q["E"], before[path]), (step, path)
        if dead is not None:
            live = sum(int((q["E"] != 0).sum()) for q in slow.p.values())
            assert live == slow.budget(step + 1) == hook.budget(step + 1)
            seen.append(live)

    hook.after_step = both
    run(model, [hook], range(T), total=T)
    assert seen[-1] == 8 and seen == sorted(seen, reverse=True) and len(set(seen)) > (tf < 1)
    assert sum(hook.ranks().values()) == 8 and len(set(hook.ranks().values())) > 1, "the budget did not move between layers"


@pytest.mark.parametrize("squared", [False, True])
def test_adaloras_orthogonality_term(squared):
    model = shake(adapted("adalora", r=3))
    hook = build({"adalora": {"orth_weight": 0.4, "squared": squared, "target_r": 1}})
    hook.setup(model)
    norms = []
    for p in leaves(model).values():
        for M in (p["P"].mT @ p["P"], p["Q"] @ p["Q"].mT):
            n = sum((float(M[a, b].detach()) - (a == b)) ** 2 for a in range(3) for b in range(3))
            norms.append(n if squared else n ** 0.5)
    assert float(hook.extra_loss(model, None).detach()) == pytest.approx(0.4 * sum(norms) / len(norms), rel=1e-5)


@pytest.mark.parametrize(("form", "kind"), [("auto", "ADALORA"), ("lora", "LORA")])
def test_adalora_in_a_file_has_the_ranks_found(form, kind, tmp_path):
    model = adapted("adalora", r=3, target_modules=["q_proj", "v_proj", "up_proj"])
    hook = build({"adalora": {"target_r": 1, "orth_weight": 0.0}})
    run(model, [hook], range(6), total=6)
    ranks = hook.ranks()
    assert sum(ranks.values()) == 6
    lorakit.save(model, tmp_path, form=form)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == kind
    again = lorakit.load(tiny.llama(), tmp_path)
    assert torch.allclose(logits(again), logits(model.eval()), atol=1e-5)
    for path, slot in host.slots(again).items():
        m = slot.methods["default"]
        assert (m.r if form == "lora" else slot.params("default")["E"].shape[0]) == (ranks[path] or 3)
    peft = pytest.importorskip("peft").PeftModel.from_pretrained(tiny.llama(), str(tmp_path)).eval()
    assert torch.allclose(logits(peft), logits(model), atol=1e-5)


def test_adalora_on_an_equal_budget_prunes_nothing():
    model = adapted("adalora", r=2)
    hook = build({"adalora": {"target_r": 2}})
    run(model, [hook], range(3), total=3)
    assert set(hook.ranks().values()) == {2}


@pytest.mark.parametrize("recipe", ["sora", "trilora"])
def test_adalora_takes_any_method_with_gated_components(recipe):
    hook = build({"adalora": {"target_r": 1}})
    run(adapted(recipe, r=3), [hook], range(4), total=4)
    assert sum(hook.ranks().values()) == len(hook.ranks())




@pytest.mark.parametrize(("options", "recipe", "total", "word"), [
    ({}, "lora", 4, "mend: a method like adalora"), ({"target_r": 5}, "adalora", 4, "mend: a lower target_r"), ({"target_r": 1}, "adalora", None, "total=N"),
    ({"target_r": 1, "tinit": 2, "tfinal": 2}, "adalora", 4, "mend: smaller ones"), ({"target_r": 1, "total_step": 9}, "adalora", 4, "leave total_step out")])
def test_what_adalora_refuses(options, recipe, total, word):
    with pytest.raises(LorakitError, match=word):
        run(adapted(recipe, r=3), [build({"adalora": options})], total=total)


def test_adalora_takes_total_step_without_a_trainers():
    hook = build({"adalora": {"target_r": 1, "total_step": 4}})
    run(adapted("adalora", r=3), [hook], range(4))
    assert set(hook.ranks()) and sum(hook.ranks().values()) == len(hook.ranks())


def _two(folder):
    """One process of two: each sees other rows."""
    rank = torch.distributed.get_rank()
    model = adapted("adalora", r=3)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    hook = build({"adalora": {"target_r": 1}})
    with hooked(wrapped, torch.optim.AdamW, [hook], lr=1e-2, total=5) as step:
        for k in range(5):
            x = batch(2 * k + rank)
            y = wrapped(input_ids=x, labels=x)
            (y.loss + step.extra_loss(y)).backward()
            step()
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad} | {"ranks": hook.ranks()}


def test_two_processes_prune_alike(tmp_path):
    a, b = together(_two, tmp_path)
    assert a.pop("ranks") == b.pop("ranks") and all(torch.equal(t, b[k]) for k, t in a.items()) and len(a) > 10


# SoRA


def prox(g, xi, mode):
    """One number after the proximal step."""
    if mode == "official":  # in the public code's order
        if g > xi:
            g = g - xi
        elif g < -xi:
            g = g + xi
        return 0.0 if abs(g) < xi else g
    return 0.0 if abs(g) <= xi else g - xi if g > 0 else g + xi


@pytest.mark.parametrize("mode", ["soft", "official"])
def test_soras_step(mode):
    model = adapted("sora", r=4)
    hook = build({"sora": {"xi": 0.3, "mode": mode, "levels": 3, "l1": 0.7}})
    before = []
    with hooked(model, sgd, [hook], lr=1e-2, total=6) as step:
        for t in range(6):
            prox_of = hook.after_step
            xi = [0, 0, 0.15, 0.15, 0.3, 0.3][t]

            def checked(m, o, s, prox_of=prox_of, xi=xi):
                want = [[prox(float(g), xi, mode) for g in p["g"].detach().flatten()] for p in leaves(m).values()]
                prox_of(m, o, s)
                got = [p["g"].flatten().tolist() for p in leaves(m).values()]
                assert torch.allclose(torch.tensor(got), torch.tensor(want), atol=1e-6)
                before.append(sum(g == 0 for row in got for g in row))

            hook.after_step = checked
            gates = [p["g"].detach().clone() for p in leaves(model).values()]
            assert float(hook.extra_loss(model, None).detach()) == pytest.approx(0.7 * float(torch.cat(gates).abs().mean()), rel=1e-5)
            steps(model, step, [t])
            hook.after_step = prox_of
    assert before[0] == 0 and before[-1] > before[2] > 0


def test_soft_and_official_differ_between_one_and_two_xi():
    xi, g = 0.25, torch.linspace(-1, 1, 32 * 2 + 1)
    out = {}
    for mode in ("soft", "official"):
        model = adapted("sora", r=65, target_modules=["q_proj"], layers_to_transform=0)
        hook = build({"sora": {"xi": xi, "mode": mode}})
        hook.setup(model)
        hook.start(model, None, None)
        with torch.no_grad():
            hook.of[0].gate.copy_(g)
        hook.after_step(model, None, 0)
        out[mode] = hook.of[0].gate.detach().flatten()
    assert torch.equal(out["soft"] != out["official"], (g.abs() > xi) & (g.abs() < 2 * xi))
    assert torch.equal(out["soft"] == 0, g.abs() <= xi)


def test_soras_gates_have_no_decay_and_closed_ones_are_cut_off(tmp_path):
    model = shake(adapted("sora", r=5))
    hook = build({"sora": {"xi": 0.2, "lr": 0.5}})
    with hooked(model, torch.optim.AdamW, [hook], lr=1e-2, weight_decay=0.1) as step:
        rest, gates = step.optimizer.param_groups
        assert {id(p) for p in gates["params"]} == {id(p["g"]) for p in leaves(model).values()}
        assert gates["weight_decay"] == 0 and gates["lr"] == 0.5 and rest["weight_decay"] == 0.1 and rest["lr"] == 1e-2
        hook.after_step(model, step.optimizer, 0)
    lorakit.save(model, tmp_path)
    again = lorakit.load(tiny.llama(), tmp_path)
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
    ranks = {p: s.methods["default"].r for p, s in host.slots(again).items()}
    assert ranks == {p: r or 5 for p, r in hook.ranks().items()} and min(ranks.values()) < 5


def test_sora_refuses_a_method_without_gates():
    with pytest.raises(LorakitError, match="mend: a method like adalora, sora"):
        run(adapted(), [build("sora")])


# DyLoRA


@pytest.mark.parametrize("recipe", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("frozen", [True, False])
def test_dyloras_forward_and_gradients_are_those_of_rank_b(recipe, frozen):
    r, kw = 4, {"target_modules": ["q_proj", "embed_tokens", "up_proj"]}
    model = shake(adapted(recipe, r=r, lora_alpha=6, **kw))
    hook = build({"dylora": {"frozen": frozen, "seed": 5}})
    drawn = set()
    with hooked(model, torch.optim.AdamW, [hook], lr=1e-2, weight_decay=0.3) as step:
        for t in range(5):
            b, x = hook.rank(t), batch(t)
            drawn.add(b)
            small = adapted(recipe, r=b, lora_alpha=6, **kw)  # the very model at rank b
            for path, p in leaves(small).items():
                for k, q in p.items():
                    q.data.copy_(leaves(model)[path][k][tuple(slice(n) for n in q.shape)])
            want = small(input_ids=x, labels=x)
            want.loss.backward()
            before = {(path, k): (q.detach().clone(), q.grad) for path, p in leaves(model).items() for k, q in p.items()}
            model.train()
            y = model(input_ids=x, labels=x)
            assert torch.allclose(y.logits, want.logits, atol=1e-5)
            y.loss.backward()
            for path, p in leaves(small).items():
                for k in "AB":
                    g, h = leaves(model)[path][k].grad, p[k].grad
                    g, h = (g, h) if k == "A" else (g.mT, h.mT)
                    assert not g[b:].any(), "beyond b"
                    assert torch.allclose(g[b - 1], h[b - 1], atol=1e-6)
                    assert not g[: b - 1].any() if frozen else torch.allclose(g[:b], h, atol=1e-6)
            kept = {(path, k): step.optimizer.state[p[k]]["exp_avg"].clone() for path, p in leaves(model).items() for k in "AB" if t}
            step()
            for (path, k), m in kept.items():
                new = step.optimizer.state[leaves(model)[path][k]]["exp_avg"]
                m, new = (m, new) if k == "A" else (m.mT, new.mT)
                still = [n for n in range(r) if n != b - 1] if frozen else range(b, r)
                assert torch.equal(m[list(still)], new[list(still)]), "the memory of a row that stands still moved"
            for path, p in leaves(model).items():
                for k in "AB":
                    was, now = before[path, k][0], p[k].detach()
                    was, now = (was, now) if k == "A" else (was.mT, now.mT)
                    moved = {n for n in range(r) if not torch.equal(was[n], now[n])}
                    assert moved == ({b - 1} if frozen else set(range(b))), (path, k)
    assert len(drawn) > 2


def test_dyloras_draws_are_uniform_and_geometric():
    for sampling, share in (("uniform", [1 / 4] * 4), ("geometric", [8 / 15, 4 / 15, 2 / 15, 1 / 15])):
        hook = build({"dylora": {"sampling": sampling}})
        hook.setup(adapted(r=4))
        n = torch.bincount(torch.tensor([hook.rank(t) for t in range(2000)]), minlength=5) / 2000
        assert n[0] == 0 and torch.allclose(n[1:], torch.tensor(share), atol=0.04)


@pytest.mark.parametrize("recipe", ["lora", "rslora", "dora"])
def test_any_rank_comes_out_of_dylora(recipe, tmp_path):
    model = shake(adapted(recipe, r=4, lora_alpha=6))
    y = logits(model)
    at_rank(model, "default", 4, "all")
    at_rank(model, "default", 2, "two")
    assert torch.equal(logits(model), y) and lorakit.active(model) == {"default": 1.0}
    assert torch.allclose(logits(lorakit.activate(model, "all")), y, atol=1e-6)
    want = adapted(recipe, r=2, lora_alpha=6)
    for path, p in leaves(want).items():
        for k, q in p.items():
            q.data.copy_(leaves(model)[path][k][tuple(slice(n) for n in q.shape)])
    assert torch.allclose(logits(lorakit.activate(model, "two")), logits(want), atol=1e-6)
    lorakit.save(model, tmp_path, "two")
    assert torch.allclose(logits(lorakit.load(tiny.llama(), tmp_path)), logits(want), atol=1e-6)
    with pytest.raises(LorakitError, match="ranks 1 to 4, not 5"):
        at_rank(model, "default", 5, "five")


def test_dylora_refuses_what_has_no_first_ranks():
    with pytest.raises(LorakitError, match="mend: lora"):
        run(adapted("sora"), [build("dylora")])


# PRILoRA


def test_priloras_ladder():
    assert ladder(12, 4, 12) == [4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12] and sum(ladder(12, 4, 12)) == 96
    assert ladder(3, 1, 2) == [1, 2, 2], "halves go up"
    pattern = rank_ladder(tiny.llama(layers=3), 2, 4, ["q_proj", "lm_head"])
    model = lorakit.adapt(tiny.llama(layers=3), r=7, target_modules=["q_proj", "lm_head"], rank_pattern=pattern)
    assert [s.methods["default"].r for s in host.slots(model).values()] == [2, 3, 4, 7]
    with pytest.raises(LorakitError, match="a ladder needs two"):
        rank_ladder(tiny.llama(layers=1))


def test_prilora_zeroes_half_of_each_row(tmp_path):
    model = adapted(r=3, target_modules=["q_proj", "down_proj"])
    hook, mean, inputs = build({"prilora": {"every": 2, "share": 0.4, "beta": 0.7}}), {}, {}
    after = hook.after_step
    for path, slot in host.slots(model).items():
        mean[path] = [0.0] * slot.site.in_
        slot.module.register_forward_pre_hook(lambda m, args, path=path: inputs.update({path: args[0].detach()}) if m.training else None)

    def checked(m, optimizer, step):
        want = {}
        for path, p in leaves(model).items():
            x = inputs[path]
            for j in range(x.shape[-1]):
                norm = sum(float(x[b, t, j]) ** 2 for b in range(3) for t in range(7) if mask[b, t]) ** 0.5
                mean[path][j] = 0.7 * mean[path][j] + 0.3 * norm
            want[path] = A = p["A"].detach().clone()
            for row in A if step in (1, 3, 4) else ():
                order = sorted(range(len(row)), key=lambda j: abs(float(row[j])) * mean[path][j])
                row[order[: int(0.4 * len(row))]] = 0
        after(m, optimizer, step)
        for path, p in leaves(model).items():
            assert torch.equal(p["A"], want[path]), (path, step)

    hook.after_step = checked
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 4:] = 0
    with hooked(model, torch.optim.AdamW, [hook], lr=1e-2, total=5) as step:
        model.train()
        for k in range(5):
            model(input_ids=batch(k), attention_mask=mask, labels=batch(k)).loss.backward()
            step()
    assert all((p["A"] == 0).sum(1).tolist() == [int(0.4 * p["A"].shape[1])] * 3 for p in leaves(model).values())
    model.eval()(input_ids=batch(0))
    assert not hook.sums, "the hooks are still on the layers"
    with pytest.raises(LorakitError, match="is no linear layer"):
        run(adapted(target_modules=["embed_tokens"]), [build("prilora")])


# Ranks by importance


def test_ranks_by_importance():
    got = rank_by_importance({"a": 0.0, "b": 1.0, "c": 2.0, "d": 4.0}, base=6, cap=10)
    assert got == {"^a": 6, "^b": 8, "^c": 9, "^d": 10}
    assert set(rank_by_importance({"a": 0.0}, 3, 9).values()) == {3}
    with pytest.raises(LorakitError, match="importance nan"):
        rank_by_importance({"a": float("nan")})
    model, batches = tiny.llama(), [{"input_ids": batch(k), "labels": batch(k)} for k in range(3)]
    paths = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    for b in batches:
        model(**b).loss.backward()
    want = {p: float(model.get_submodule(p).weight.grad.norm()) for p in paths}
    model.zero_grad()
    model.lm_head.weight.requires_grad_(False)
    assert importance(model, batches, targets=["q_proj"]) == pytest.approx(want, rel=1e-4)
    assert model.get_submodule(paths[0]).weight.grad is None and not model.lm_head.weight.requires_grad
    seen = []
    handle = model.get_submodule(paths[1]).register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    got = importance(model, batches, "activation", ["q_proj"])
    handle.remove()
    assert got[paths[1]] == pytest.approx(float(torch.stack(seen).square().mean().sqrt()), rel=1e-5)
    pattern = rank_by_importance(importance(model, batches, targets=["q_proj"]), 2, 4)
    adapted_ = lorakit.adapt(model, r=1, target_modules=["q_proj"], rank_pattern=pattern)
    assert [s.methods["default"].r for s in host.slots(adapted_).values()] == [pattern[f"^{p}"] for p in paths] and 4 in pattern.values()


# LoRA-drop


@pytest.mark.parametrize("recipe", ["lora", "adalora"])
def test_lora_drop_keeps_the_smallest_sufficient_set(recipe):
    model = shake(lorakit.adapt(tiny.llama(layers=4), recipe, r=2, target_modules=["q_proj", "up_proj"]), 3).train()
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 5:] = 0
    batches = [{"input_ids": batch(k), "attention_mask": mask} for k in range(2)]
    slots, g = host.slots(model), {}
    W = {p: s.site.store.read().detach().clone() for p, s in slots.items()}
    for path, slot in slots.items():
        D = slot.methods["default"].weight(slot.params("default"), W[path]).detach() - W[path]

        def saw(m, args, path=path, D=D):
            g[path] = g.get(path, 0.0) + sum(float((D @ args[0][b, t]).square().sum()) for b in range(3) for t in range(7) if mask[b, t])

        slot.module.register_forward_pre_hook(saw)
    model.eval()
    with torch.no_grad():
        for b in batches:
            model(**b)
    g = dict(g)
    model.train()
    for T in (1e-9, 0.7, 1.0):
        plan = lora_drop(model, batches, T)
        for name in ("q_proj", "up_proj"):
            of = {p: v for p, v in g.items() if p.endswith(name)}
            I = {p: v / sum(of.values()) for p, v in of.items()}
            assert {p: v for p, v in plan["importance"].items() if p.endswith(name)} == pytest.approx(I, rel=1e-4)
            best = sorted(I, key=I.get, reverse=True)
            n = next(n for n in range(1, 5) if sum(I[p] for p in best[:n]) >= T - 1e-6)
            assert {p for p in plan["keep"] if p.endswith(name)} == set(best if n == 3 else best[:n])
            assert [sorted(s) for s in plan["share"] if s[0].endswith(name)] == ([sorted(best[n:])] if n < 3 else [])
    assert model.training
    with pytest.raises(LorakitError, match="mend: train a few steps first"):
        lora_drop(adapted(), batches)


# RoseLoRA


@pytest.mark.parametrize("clamp", [0.0, 0.05])
def test_rose_lora_prunes_rows_of_a_and_columns_of_b(clamp):
    keep, t0, t1, beta = 0.3, 1, 5, 0.6
    model = shake(adapted(r=3, target_modules=["q_proj", "down_proj", "embed_tokens"]))
    hook, old = build({"rose_lora": {"keep": keep, "t0": t0, "t1": t1, "beta": beta, "clamp": clamp}}), {}
    b4, after = hook.before_step, hook.after_step

    def before(m, o, t):
        for path, p in leaves(m).items():
            for k in "AB":
                now = (p[k].detach() * p[k].grad).abs()
                old[path, k] = beta * old[path, k] + (1 - beta) * now if t else now
        b4(m, o, t)

    def checked(m, o, t):
        rho = 1.0 if t < t0 else keep + (1 - keep) * (1 - (t - t0) / (t1 - t0)) ** 3 if t < t1 else keep
        want = {}
        for path, p in leaves(m).items():
            for k in "AB":
                w = want[path, k] = p[k].detach().clone()
                rows, scores = (w, old[path, k]) if k == "A" else (w.mT, old[path, k].mT)
                n = int(rows.shape[1] * (1 - rho) + 1e-9)
                for row, s in zip(rows, scores, strict=True):
                    row[sorted(range(len(row)), key=lambda j, s=s: float(s[j]))[:n]] = 0
                if clamp and n:
                    w.clamp_(-clamp, clamp)
        after(m, o, t)
        for (path, k), w in want.items():
            assert torch.equal(leaves(m)[path][k], w), (path, k, t)

    hook.before_step, hook.after_step = before, checked
    run(model, [hook], range(7), total=7)
    for p in leaves(model).values():
        assert ((p["A"] != 0).sum(1) <= p["A"].shape[1] - int(0.7 * p["A"].shape[1])).all()
        assert ((p["B"] != 0).sum(0) <= p["B"].shape[0] - int(0.7 * p["B"].shape[0])).all()
    with pytest.raises(LorakitError, match="never reached; mend: t1: 7"):
        run(adapted(), [build("rose_lora")], total=7)


# AFLoRA


def test_aflora_freezes_one_by_one():
    ti, tf, k, T = 2, 2, 2, 12
    model = adapted("aflora", r=3)
    hook = build({"aflora": {"tinit": ti, "tfinal": tf, "every": k}})
    b4, after, window, mean, spread, frozen, sizes = hook.before_step, hook.after_step, {}, {}, {}, {}, []

    def names():
        return {(p, n): t for p, q in leaves(model).items() for n, t in q.items() if n in "AB"}

    def before(m, o, t):
        for key, p in names().items():
            if key not in frozen:
                window.setdefault(key, []).append(p.grad.abs().double())
        b4(m, o, t)

    def checked(m, o, t):
        t += 1
        if t % k == 0:
            for key, seen in window.items():
                now = sum(seen) / len(seen)
                mean[key] = 0.85 * mean.get(key, 0) + 0.15 * now
                spread[key] = 0.95 * spread.get(key, 0) + 0.05 * (now - mean[key]).abs()
            window.clear()
        every = {key: p.numel() for key, p in names().items()}
        rho = 1.0 if t <= ti else 0.0 if t >= T - tf else (1 - (t - ti) / (T - ti - tf)) ** 3
        left = [key for key in every if key not in frozen]
        due = left if t >= T - tf else []
        if ti < t < T - tf and t % k == 0:
            scores = sorted(s for key in left for s in (mean[key] * spread[key]).flatten().tolist())
            n = int(sum(every.values()) * (1 - rho)) - sum(every[key] for key in frozen)
            due = [key for key in left if n > 0 and float((mean[key] * spread[key]).mean()) < scores[n - 1]]
        after(m, o, t - 1)
        frozen.update({key: names()[key].detach().clone() for key in due})
        assert {key for key, p in names().items() if not p.requires_grad} == set(frozen), t
        assert all(p not in o.state for key, p in names().items() if key in frozen)
        sizes.append(len(frozen))

    hook.before_step, hook.after_step = before, checked
    with hooked(model, torch.optim.AdamW, [hook], lr=1e-2, weight_decay=0.5, total=T) as step:
        steps(model, step, range(T))
        assert not any(t.requires_grad for t in names().values())
        assert all(p.grad is None or not p.requires_grad for p in model.parameters())
    for key, t in frozen.items():
        assert torch.equal(names()[key], t), "a frozen factor moved"
    assert sizes[1] == 0 and sizes[-1] == len(names()) and len(set(sizes)) > 3, sizes
    assert all(t.requires_grad for t in names().values()), "after training it can train again"
    with pytest.raises(LorakitError, match="nothing would train"):
        run(adapted(), [build("aflora")], total=20)


# SparseAdapter


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("score", ["rand", "mag", "snip", "grasp", "synflow"])
def test_sparse_adapter_keeps_the_highest_scores_for_good(score, scope):
    model = shake(adapted(r=3, target_modules=["q_proj", "down_proj"]))
    hook = build({"sparse_adapter": {"score": score, "scope": scope, "keep": 0.3, "at": 1}})
    b4, masks = hook.before_step, {}

    def before(m, o, t):
        if t == 1:
            ps = {(path, k): p[k] for path, p in leaves(m).items() for k in "AB"}
            grads = {key: p.grad.clone() for key, p in ps.items()}
            if score == "mag":
                s = {key: p.detach().abs() for key, p in ps.items()}
            elif score == "snip":
                s = {key: (p.detach() * grads[key]).abs() for key, p in ps.items()}
            elif score == "grasp":  # the change of the gradient along itself, by differences
                s, eps = {}, 1e-3
                there = {}
                for sign in (1, -1):
                    with torch.no_grad():
                        for key, p in ps.items():
                            p.add_(grads[key], alpha=sign * eps)
                    m.zero_grad()
                    m(input_ids=batch(1), labels=batch(1)).loss.backward()
                    there[sign] = {key: p.grad.clone() for key, p in ps.items()}
                    with torch.no_grad():
                        for key, p in ps.items():
                            p.sub_(grads[key], alpha=sign * eps)
                s = {key: -p.detach() * (there[1][key] - there[-1][key]) / (2 * eps) for key, p in ps.items()}
                for key, p in ps.items():
                    p.grad = grads[key]
            elif score == "synflow":
                other = lorakit.adapt(tiny.llama(), r=3, target_modules=["q_proj", "down_proj"])
                with torch.no_grad():
                    for a, b in zip(other.parameters(), m.parameters(), strict=True):
                        a.copy_(b.abs())
                other(input_ids=batch(1)).logits.sum().backward()
                s = {(path, k): (p[k].detach() * p[k].grad).abs() for path, p in leaves(other).items() for k in "AB"}
        was = {n: p.detach().clone() for n, p in m.named_parameters()}
        b4(m, o, t)
        assert all(torch.equal(p, was[n]) for n, p in m.named_parameters())
        if t == 1:
            got = {(path, k): hook.masks[f"{path} default {k}"] for path, p in leaves(m).items() for k in "AB"}
            masks.update({key: g.clone() for key, g in got.items()})
            for part in ([[key] for key in got] if scope == "local" else [list(got)]):
                n = sum(got[key].numel() for key in part)
                assert sum(int((~got[key]).sum()) for key in part) == int(0.7 * n + 0.5)
                if score != "rand":
                    kept, gone = (torch.cat([s[key][got[key] if on else ~got[key]] for key in part]) for on in (True, False))
                    assert kept.min() >= gone.max() - 2e-3 * max(kept.abs().max(), gone.abs().max())

    hook.before_step = before
    run(model, [hook], range(4), total=4, weight_decay=0.1)
    for (path, k), m in masks.items():
        w = leaves(model)[path][k]
        assert torch.equal(w != 0, m), "a masked entry came back"
    assert model.training


def test_sparse_adapter_refuses_scores_that_are_all_zero():
    with pytest.raises(LorakitError, match="mend: a larger `at`"):
        run(adapted(), [build({"sparse_adapter": {"at": 0}})], total=3)
    with pytest.raises(LorakitError, match="mend: a smaller `at`"):
        run(adapted(), [build("sparse_adapter")], total=3)


# Diff pruning


@pytest.mark.parametrize("structured", [True, False])
def test_diff_pruning_fixes_the_largest_entries(structured):
    model = lorakit.adapt(tiny.llama(), "diff-pruning", logit=1.2, structured=structured, target_modules=["q_proj", "up_proj"])
    hook = build({"diff_pruning": {"weight": 1e-3, "share": 0.1, "fix": 0.5, "lr": 0.3}})
    after, kept = hook.after_step, {}

    def change(m):
        out = {}
        for path, p in leaves(m).items():
            z = (p["a"].detach().sigmoid() * 3 - 1.5).clamp(0, 1) * p["w"].detach()
            out[path] = z * (p["g"].detach().sigmoid() * 3 - 1.5).clamp(0, 1) if structured else z
        return out

    def checked(m, o, t):
        want = change(m)
        after(m, o, t)
        if t == 2:
            every = torch.cat([c.abs().flatten() for c in want.values()])
            bar = every.sort(descending=True).values[int(0.1 * len(every) + 0.5) - 1]
            for path, c in change(m).items():
                assert torch.allclose(c, want[path] * (want[path].abs() >= bar), atol=1e-7)
                kept[path] = c != 0
            assert sum(int(k.sum()) for k in kept.values()) == int(0.1 * len(every) + 0.5)

    hook.after_step = checked
    hook.setup(model)
    L0 = sum(float(p[k].sigmoid().sum()) for p in leaves(model).values() for k in "ag" if k in p)
    assert float(hook.extra_loss(model, None).detach()) == pytest.approx(1e-3 * L0, rel=1e-5)
    with hooked(model, torch.optim.AdamW, [hook], lr=1e-2, weight_decay=0.1, total=6) as step:
        assert [g["lr"] for g in step.optimizer.param_groups] == [1e-2, 0.3] and step.optimizer.param_groups[1]["weight_decay"] == 0
        steps(model, step, range(3))
        fixed = {path: p["w"].detach().clone() for path, p in leaves(model).items()}
        steps(model, step, range(3, 6))
    for path, c in change(model).items():
        k = kept[path]
        assert torch.equal(c != 0, k) and (not k.any() or not torch.equal(leaves(model)[path]["w"][k], fixed[path][k]))
    with pytest.raises(LorakitError, match="mend: the method diff-pruning"):
        run(adapted(), [build("diff_pruning")], total=4)


# DoRA with dynamic ranks


def test_dynamic_dora_cuts_the_smallest_parts():
    T, r, model = 20, 4, adapted("trilora", r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    hook = build({"dora_dynamic": {"target_r": 2, "every": 2, "beta": 0.8, "weight": 0.3}})
    after, mean, counts = hook.after_step, {}, []
    hook.setup(model)
    var = sum(float(v) for p in leaves(model).values() for v in [*(row.var() for row in p["A"]), *(col.var() for col in p["B"].mT)])
    assert float(hook.extra_loss(model, None).detach()) == pytest.approx(0.3 * var / (2 * 6 * r), rel=1e-5)
    final = []

    def checked(m, o, t):
        want = {path: p["M"].detach().clone() for path, p in leaves(m).items()}
        if not final:
            for path, p in leaves(m).items():
                parts = [p["M"][k].detach() * torch.outer(p["B"][:, k], p["A"][k]).detach() for k in range(r)]
                for k in range(r):
                    s = float(parts[k].norm()) / (float(sum(parts).norm()) + 1e-8)
                    mean[path, k] = 0.8 * mean.get((path, k), 0) + 0.2 * s
        at, most = int(t + 1 - 0.15 * T), int(T * 0.35)
        dead = list(final)
        if t + 1 >= 0.15 * T and at <= most and (at % 2 == 0 or at == most):
            dead = sorted(mean, key=mean.get)[: int(12 * (at / most) ** 3)]
            final.extend(dead if at == most else [])
            counts.append(len(dead))
        for path, k in dead:
            want[path][k] = 0
        after(m, o, t)
        for path, p in leaves(m).items():
            assert torch.equal(p["M"], want[path]), (t, path)

    hook.after_step = checked
    run(model, [hook], range(T), total=T)
    assert counts[0] == 0 and counts[-1] == 12 and len(counts) == 5
    assert sum(hook.ranks().values()) == 12 and len(set(hook.ranks().values())) > 1
    assert hook.extra_loss(model, None) == 0.0


# Everywhere: stacks of experts, embeddings, convolutions; a run from a file


class Odd(torch.nn.Module):
    """An embedding and a convolution."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.conv = torch.nn.Embedding(20, 8), torch.nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.conv(self.table(x).mT).mT


EVERYWHERE = {"adalora": "adalora", "sora": "sora", "dora_dynamic": "trilora", "dylora": "lora", "rose_lora": "lora", "sparse_adapter": "lora",
              "aflora": "aflora"}


@pytest.mark.parametrize("hook", EVERYWHERE)
@pytest.mark.parametrize("where", ["layers", "experts"])
def test_policies_on_embeddings_convolutions_and_stacks_of_experts(hook, where, tmp_path):
    options = {"adalora": {"target_r": 2}, "dora_dynamic": {"target_r": 2, "every": 1}, "rose_lora": {"t0": 0, "t1": 3}, "sparse_adapter": {"at": 2},
               "aflora": {"every": 1}, "sora": {"xi": 0.05}}.get(hook, {})
    made_of, at = (Odd, {"target_modules": ["table", "conv"]}) if where == "layers" else (tiny.mixtral, {"target_parameters": "experts"})
    model, made, out = lorakit.adapt(made_of(), EVERYWHERE[hook], r=3, **at), build({hook: options}), lambda m, x: m(x) if where == "layers" else m(x).logits
    with hooked(model, torch.optim.AdamW, [made], lr=1e-2, total=5) as step:
        for k in range(5):
            y = out(model.train(), batch(k) % 20)
            (y.square().mean() + step.extra_loss(y)).backward()
            step()
    if hook in ("adalora", "dora_dynamic"):
        assert sum(made.ranks().values()) == 2 * sum(max(s.site.stack, default=1) for s in host.slots(model).values())
    lorakit.save(model.eval(), tmp_path)
    assert torch.allclose(out(lorakit.load(made_of().eval(), tmp_path), batch(9) % 20), out(model, batch(9) % 20), atol=1e-4)


def test_a_run_from_a_file_ends_with_the_budget(base, tmp_path):  # noqa: F811
    from lorakit.training.run import train

    rec = train(config(base, tmp_path, adapter={"method": "adalora", "r": 6}, hooks=[{"adalora": {"target_r": 4, "tfinal": 2}}]), say=lambda s: None)
    assert rec["verify"]["ok"] and rec["metrics"]["after"]["eval_loss"] < rec["metrics"]["before"]["eval_loss"]
    model = lorakit.load(lorakit.models.load_base(str(base)), tmp_path / "run" / "adapter")
    ranks = [len(s.params("default")["E"]) for s in host.slots(model).values()]
    assert sum(ranks) == 4 * len(ranks) and len(set(ranks)) > 1, ranks


# ALoRA


def test_alora_moves_ranks_to_where_they_are_missed():
    model = adapted("sora", r=4, target_modules=["q_proj", "v_proj"])
    hook = build({"alora": {"target_r": 2, "first": 2, "every": 2, "rounds": 2, "moved": 3}})
    interval, rounds = hook.on_interval, []

    def loss(m):
        with torch.no_grad():
            return float(m.eval()(input_ids=batch(0), labels=batch(0)).loss)

    def checked(m, o, sch, t):
        before = {p: {k: x.detach().clone() for k, x in q.items()} for p, q in leaves(m).items()}
        scores, y = {}, loss(m)
        for path, q in leaves(m).items():
            for k in [k for k in range(4) if q["g"][0, k] != 0]:
                one = q["g"].detach().clone()
                with torch.no_grad():
                    q["g"][0, k] = 0
                    without = loss(m)
                    q["g"].copy_(torch.eye(4)[k : k + 1])
                    alone = loss(m)
                    q["g"].copy_(one)
                scores[path, k] = without - alone
        m.train()
        interval(m, o, sch, t)
        assert m.training
        after = {p: q["g"].detach().clone() for p, q in leaves(m).items()}
        gone = {(p, k) for p in after for k in range(4) if before[p]["g"][0, k] and not after[p][0, k]}
        new = {(p, k) for p in after for k in range(4) if after[p][0, k] and not before[p]["g"][0, k]}
        if t not in (2, 4):
            assert not gone and not new
            return
        low = sorted(scores, key=scores.get)
        assert gone == set(low[: len(gone)]) and len(new) == len(gone) <= 3
        assert not {p for p, _ in gone} & {p for p, _ in new}, "a target that lost one also got one"
        for path, k in new:
            assert not leaves(m)[path]["B"][:, k].any() and not o.state[leaves(m)[path]["A"]]["exp_avg"][k].any()
        with torch.no_grad():
            for path, k in gone:  # what opened changes nothing: only what closed does
                before[path]["g"][0, k] = 0
            now = loss(m)
            keep = {p: {k: x.detach().clone() for k, x in q.items()} for p, q in leaves(m).items()}
            for source in (before, keep):
                for path, q in leaves(m).items():
                    for k, x in q.items():
                        x.copy_(source[path][k])
                if source is before:
                    assert loss(m) == pytest.approx(now, abs=1e-6) and now != y
        m.train()
        rounds.append(len(gone))

    hook.on_interval = checked
    run(model, [hook], range(6))
    assert len(rounds) == 2 and max(rounds) > 0
    assert sum(hook.ranks().values()) == 8 and len(set(hook.ranks().values())) > 1
    with pytest.raises(LorakitError, match="mend: a higher r"):
        run(adapted("sora", r=4), [build("alora")])
    with pytest.raises(LorakitError, match="mend: sora, or trilora"):
        run(shake(adapted("sora", r=8)), [build("alora")])
