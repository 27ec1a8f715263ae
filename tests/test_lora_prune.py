"""LoRAPrune: scores and masks against plain loops, the masked model against a smaller one, merged, saved, and what is refused (resumed in test_hooks.py)."""

from __future__ import annotations

import pytest
import tiny
import torch
from test_hooks import batch, shake, steps
from test_training import ROWS, arguments, base, config, same_state  # noqa: F401
from tiny import logits

import lorakit
from lorakit import LorakitError, host
from lorakit.hooks import build, hooked
from lorakit.hooks.groups import prunable, pruned
from lorakit.models import load_base
from lorakit.training import AdapterTrainer

NAMES = {"llama": (("q_proj", "k_proj", "v_proj"), "o_proj", ("gate_proj", "up_proj"), "down_proj"),
         "opt": (("q_proj", "k_proj", "v_proj"), "out_proj", ("fc1",), "fc2")}


def adapted(model=None, **kw):
    return lorakit.adapt(model or tiny.llama(layers=3), "lora-prune", **{"r": 3, "lora_alpha": 6, **kw})


def leaves(model, path):
    slot = host.slots(model)[path]
    return {k: t.detach() for k, t in slot.parameters("default").items()} | {"W": slot.map({}).weight().detach(), "p": slot.parameters("default")}


def literal(model, attention, mlp, n_heads, kinds):
    """s of every head and channel of one block by loops over rows and columns."""
    (heads, out, channels, down), scores = kinds, []
    for parent, makes, takes, n in ((attention, heads, out, n_heads), (mlp, channels, down, None)):
        total = 0.0
        for name in (*makes, takes):
            t = leaves(model, f"{parent}.{name}")
            A, B, gA, gB = t["A"], t["B"], t["p"]["A"].grad, t["p"]["B"].grad
            after = (B - gB) @ (A - gA)  # a step of rate one on both factors
            S = ((B @ A - after) * (t["W"] + 2.0 * B @ A)).abs()
            S = S if name in makes else S.T
            groups = n or len(S)
            width = len(S) // groups
            v = torch.tensor([float(S[g * width : (g + 1) * width].sum()) for g in range(groups)])
            total = total + v / v.norm()
        scores.append(total)
    return scores


@pytest.mark.parametrize("kind", NAMES)
def test_scores_are_sums_over_the_rows_and_columns_of_a_group(kind):
    model = shake(adapted(whole(kind)))
    x = batch(1)
    model(input_ids=x, labels=x).loss.backward()
    blocks = {b.path + " " + b.kind: b for b in prunable(model)}
    for k in range(2):
        at = f"model.layers.{k}" if kind == "llama" else f"model.decoder.layers.{k}"
        attention, mlp = f"{at}.self_attn", f"{at}.mlp" if kind == "llama" else at
        two = literal(model, attention, mlp, 2, NAMES[kind])
        for path, what, want in ((attention, "heads", two[0]), (mlp, "channels", two[1])):
            b = blocks[f"{path} {what}"]
            assert b.n == len(want) == (2 if what == "heads" else 24)
            assert torch.allclose(b.scores(), want, rtol=1e-4), path


@pytest.mark.parametrize("first, warmup, rest, every", [(0.0, 0.1, 0.1, 1), (0.25, 0.2, 0.3, 4)])
def test_pruning_written_out(first, warmup, rest, every):
    """Masks over a training: an average of scores, the lowest out at every k-th step, by the cubic ratio; the last block stays whole."""
    T, ratio, beta = 10, 0.6, 0.7
    model = adapted()
    hook = build({"lora_prune": {"ratio": ratio, "first": first, "warmup": warmup, "rest": rest, "every": every, "beta": beta}})
    mean, counts = {}, []
    with hooked(model, torch.optim.AdamW, [hook], lr=1e-2, total=T) as step:
        model.train()
        for t in range(1, T + 1):
            x = batch(t)
            model(input_ids=x, labels=x).loss.backward()
            slow = {}
            for k in range(2):
                at = f"model.layers.{k}"
                slow[f"{at}.self_attn heads"], slow[f"{at}.mlp channels"] = literal(model, f"{at}.self_attn", f"{at}.mlp", 2, NAMES["llama"])
            before = {b.key: b.alive() for b in hook.of}
            step()
            end = T - rest * T
            for b in hook.of:
                if t <= end:
                    mean[b.key] = beta * mean.get(b.key, 0) + (1 - beta) * slow[b.key]
                if t <= warmup * T:
                    rho = first
                elif t >= end:
                    rho = ratio
                else:
                    rho = ratio + (first - ratio) * (1 - (t - warmup * T) / (end - warmup * T)) ** 3
                n = int(b.n * rho + 1e-9) if (t % every == 0 or t == end) and t <= end else b.n - int(before[b.key].sum())
                order = sorted(range(b.n), key=lambda g: (bool(before[b.key][g]), float(mean[b.key][g])))
                want = torch.tensor([g not in order[:n] for g in range(b.n)])
                assert torch.equal(b.alive(), want), (t, b.key)
                for m in b.masks:
                    assert torch.equal(m, want[:, None].expand_as(m).float()), "a whole head in each layer of the block"
            counts.append(hook.left()["model.layers.0.mlp channels"][0])
    assert counts[-1] == 24 - int(24 * ratio) and len(set(counts)) > 2 and counts == sorted(counts, reverse=True)
    whole = [s.parameters("default")["m"] for p, s in host.slots(model).items() if ".layers.2." in p or "o_proj" in p or "down_proj" in p]
    assert whole and all((m == 1).all() and not m.requires_grad for m in whole)


def test_what_is_pruned_stays_so_whatever_its_score():
    model = adapted(tiny.llama())
    hook = build({"lora_prune": {"every": 1, "warmup": 0.0, "rest": 0.0, "spare_last": 0}})
    with hooked(model, torch.optim.AdamW, [hook], total=6) as step:
        up, gone = torch.arange(24.0), []
        for t, score in ((0, up), (1, up.flip(0)), (5, up.flip(0))):
            hook.mean = {b.key: score[: b.n] for b in hook.of}
            hook.after_step(model, step.optimizer, t)
            gone.append(set((~hook.of[1].alive()).nonzero().flatten().tolist()))
    few, more = (int(24 * hook.share(t)) for t in (1, 2))
    assert 0 < few < more < 12
    assert gone[0] == set(range(few)), "the lowest"
    assert gone[1] == {*range(few), *range(24 - (more - few), 24)}, "those that are gone, then the lowest of the others"
    assert gone[2] == {*range(few), *range(24 - (12 - few), 24)}


def whole(kind):
    """A tiny model whose biases matter."""
    model = getattr(tiny, kind)()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n.endswith("bias"):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))) * 0.3)
    return model


def pruned_somewhere(model):
    """Every other channel, and the first head, of every block."""
    with torch.no_grad():
        for b in prunable(model):
            for m in b.masks:
                m[:: 2 if b.kind == "channels" else b.n] = 0
    return model


@pytest.mark.parametrize("kind", NAMES)
def test_the_masked_model_is_the_merged_and_the_smaller_one(kind, tmp_path):
    model = pruned_somewhere(shake(adapted(whole(kind))).eval())
    fresh = whole(kind)
    x, b = logits(model), prunable(model)[0]
    assert (x - logits(fresh)).abs().max() > 0.1
    small, merged = pruned(model), lorakit.merged(model)
    assert torch.allclose(logits(merged), x, atol=1e-5) and torch.allclose(logits(small), x, atol=1e-5)
    up, v = (next(m for n, m in small.named_modules() if n.endswith(k)) for k in (("up_proj", "v_proj") if kind == "llama" else ("fc1", "v_proj")))
    assert up.weight.shape == (12, 16) and up.out_features == 12
    assert v.weight.shape == (8 // (b.n if kind == "llama" else 1), 16), "half of the heads"
    assert sum(p.numel() for p in small.parameters()) < 0.85 * sum(p.numel() for p in fresh.parameters())
    for name in (n for n, m in merged.named_modules() if n.endswith(("up_proj", "fc1"))):
        layer = merged.get_submodule(name)
        assert not layer.weight[::2].any() and layer.weight[1::2].any() and (layer.bias is None or not layer.bias[::2].any())
    lorakit.save(model, tmp_path / "a")
    again = lorakit.load(whole(kind), tmp_path / "a")
    assert torch.allclose(logits(again), x, atol=1e-6) and torch.allclose(logits(pruned(again)), x, atol=1e-5)
    assert lorakit.verify(tmp_path / "a", whole(kind)).ok
    small.generate(tiny.ids(), max_new_tokens=3, do_sample=False)
    lorakit.detach(model)
    assert torch.equal(logits(model), logits(fresh))


def test_masked_outputs_have_no_gradient_and_stay_out():
    """The factors behind a closed output do not move, whatever momentum does, and the group does not come back."""
    model = adapted()
    hook = build({"lora_prune": {"every": 1, "warmup": 0.0, "rest": 0.5, "spare_last": 0}})
    with hooked(model, torch.optim.AdamW, [hook], lr=1e-2, total=8) as step:
        steps(model, step, range(4))
        alive = {b.key: b.alive().clone() for b in hook.of}
        assert all(b.alive().float().mean() == 0.5 for b in hook.of)
        x = batch(9)
        model(input_ids=x, labels=x).loss.backward()
        for b in hook.of:
            for k, p in b.layers.items():
                if k in ("up_proj", "gate_proj", "v_proj"):
                    gone = ~b.alive().repeat_interleave(len(p.B) // b.n)
                    assert not p.B.grad[gone].any() and p.B.grad[~gone].any()
        step()
        steps(model, step, range(3))
    assert all(torch.equal(b.alive(), alive[b.key]) for b in hook.of)


def test_two_runs_are_one(tmp_path):
    def go(out):
        model = adapted(tiny.llama(), lora_dropout=0.2)
        hook = build({"lora_prune": {"every": 1, "spare_last": 0}})
        trainer = AdapterTrainer(model=model, args=arguments(tmp_path / out, max_steps=4, save_strategy="no"), train_dataset=ROWS, hooks=[hook])
        trainer.train()
        return trainer

    a, b = go("a"), go("b")
    same_state(a, b)
    assert set(a.hooks[0].left().values()) == {(1, 2), (12, 24)}


def test_scores_that_are_not_numbers_are_left_out():
    model = adapted()
    hook = build({"lora_prune": {"every": 1}})
    with hooked(model, torch.optim.AdamW, [hook], total=8) as step:
        x = batch(0)
        model.train()(input_ids=x, labels=x).loss.backward()
        p = hook.of[0].layers["q_proj"].B
        p.grad[0, 0] = torch.nan
        hook.before_step(model, step.optimizer, 0)
        assert hook.of[0].key not in hook.mean and hook.of[1].key in hook.mean


@pytest.mark.parametrize("options, what", [
    ({"ratio": 1.0}, "ratio < 1"), ({"first": 0.6}, "first <= ratio"), ({"warmup": 0.5, "rest": 0.5}, "together below 1"),
    ({"every": 0}, "every is at least 1"), ({"spare_last": -1}, "spare_last at least 0"), ({"beta": 1.0}, "below 1"),
])
def test_wrong_options_are_refused(options, what):
    with pytest.raises(LorakitError, match=what):
        build({"lora_prune": options})


def test_what_cannot_be_is_refused():
    def go(model, total=5, **options):
        with hooked(model, torch.optim.AdamW, [build({"lora_prune": options})], total=total) as step:
            steps(model, step, range(1))

    with pytest.raises(LorakitError, match=r"no adapter of the method lora-prune .* \(v_proj; gate_proj, up_proj, fc1\); mend: method: lora-prune"):
        go(lorakit.adapt(tiny.llama(), "lora", r=2))
    with pytest.raises(LorakitError, match="no adapter of the method lora-prune"):
        go(adapted(target_modules=["q_proj", "down_proj"]))
    with pytest.raises(LorakitError, match="all 1 blocks with masks are spared; mend: a lower spare_first or spare_last"):
        go(adapted(tiny.llama(layers=1)))
    with pytest.raises(LorakitError, match="its schedule needs to know how many steps"):
        go(adapted(), total=None)
    model = adapted()
    for k in range(3):
        del model.model.layers[k].self_attn.head_dim
    with pytest.raises(LorakitError, match="does not say its head_dim, so its heads are not known; mend: exclude_modules: model.layers.0.self_attn.v_proj"):
        prunable(model)
    go(adapted(tiny.llama(), target_modules=["up_proj"]))


def test_a_run_from_a_file(base, tmp_path):  # noqa: F811 (a fixture)
    from lorakit.training import run as r

    run = config(base, tmp_path, hooks=[{"lora_prune": {"every": 2, "ratio": 0.25}}], adapter={"method": "lora-prune", "r": 4})
    said = []
    rec = r.train(run, say=said.append)
    assert "lora_prune: 2 of 2 heads left in 1 blocks, 36 of 48 channels left in 1 blocks" in said
    assert rec["verify"]["ok"], rec["verify"]
    assert rec["metrics"]["after"]["eval_loss"] < rec["metrics"]["before"]["eval_loss"] - 0.1
    again = lorakit.load(load_base(str(base)), tmp_path / "run" / "adapter")
    assert [int((~b.alive()).sum()) for b in prunable(again)] == [0, 12, 0, 0], "12 of 48 channels of the first block; a quarter of two heads is none"
