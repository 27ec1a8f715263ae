"""What happens while training: every hook against its formula written out slowly, stopped and resumed to the bit, and what it refuses."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
import torch.distributed as dist
from test_distributed import together
from test_training import ROWS, StopAt, arguments, base, config, same_state  # noqa: F401
from tiny import logits

import lorakit
from lorakit import LorakitError, host
from lorakit.hooks import HOOKS, Hook, build, hooked, rounds, surgery
from lorakit.hooks.factors import pairs
from lorakit.training import AdapterTrainer


def batch(k: int) -> torch.Tensor:
    return torch.randint(4, tiny.VOCAB, (3, 7), generator=torch.Generator().manual_seed(k))


def adapted(recipe="lora", **kw):
    return lorakit.adapt(tiny.llama(), recipe, **{"r": 2, **kw})


def steps(model, step, which, extra=True):
    """A hand-written loop; the losses."""
    model.train()
    out = []
    for k in which:
        x = batch(k)
        y = model(input_ids=x, labels=x)
        (y.loss + step.extra_loss(y)).backward()
        step()
        out.append(float(y.loss.detach()))
    return out


def sgd(groups):
    return torch.optim.SGD(groups)


def run(model, hooks, which=range(4), optimizer=torch.optim.AdamW, **kw):
    with hooked(model, optimizer, hooks, **{"lr": 1e-2, **kw}) as step:
        return steps(model, step, which)


def shake(model, seed=0):
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=gen) * 0.1)
    return model


# Stop, resume, go on: for every hook

CASES = {
    "lora_plus": ({"ratio": 4.0}, "lora"), "relora": ({"every": 2, "warmup": 1}, "lora"), "cola": ({"links": 4}, "rslora"),
    "two_stage": ({"at": 3, "warmup": 2}, "dora"), "xgblora": ({"boosters": 4, "layers": 1}, "lora"),
    "delta_lora": ({"after": 1}, "lora"), "lora_fa": ({}, "lora"), "riemannian": ({}, "lora"), "factor_decay": ({"of": "product"}, "lora"),
    "lora_sp": ({}, "lora"), "lisa": ({"layers": 1, "every": 2}, "full"), "lora_dropout": ({"p": 0.3}, "lora"), "dropbp": ({}, "lora"),
    "pcgrad": ({}, "lora"), "gradvac": ({}, "lora"), "cagrad": ({}, "dora"), "galore": ({"r": 2, "every": 3}, "full"), "flora": ({"r": 3, "every": 3}, "full"),
    "hra_orthogonality": ({"weight": 0.1}, "hra"),
    "hidden_key": ({"p": 0.2, "kl": 0.5}, "lora"),
    "adalora": ({"target_r": 2, "tinit": 1, "tfinal": 2}, "adalora"),
    "sora": ({"xi": 0.05, "levels": 3, "l1": 0.1}, "sora"),
    "dylora": ({}, "dora"), "prilora": ({"every": 3}, "lora"), "rose_lora": ({"t0": 1, "t1": 6, "keep": 0.3, "clamp": 0.1}, "lora"),
    "aflora": ({"every": 2, "tfinal": 1}, "aflora"), "sparse_adapter": ({"at": 2}, "lora"), "diff_pruning": ({"fix": 0.4, "share": 0.1}, "diff-pruning"),
    "dora_dynamic": ({"target_r": 2, "every": 1, "warmup": 0.2, "rest": 0.2}, "trilora"),
    "alora": ({"target_r": 2, "first": 2, "every": 2, "rounds": 2}, "sora"),
    "bilora": ({"variant": "binary", "upper": 2, "lower": 2}, "adalora"), "autolora": ({"lr": 0.05}, "sora"),
    "lora_prune": ({"every": 2, "spare_last": 0}, "lora-prune"),
}


def test_every_hook_has_a_case():
    assert set(CASES) == set(HOOKS)


def states(folder):
    """What the hooks saved in a checkpoint."""
    return torch.load(folder / "checkpoint-6" / "lorakit_hooks.pt", weights_only=True)


def same(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for k in a:
            same(a[k], b[k], f"{where} {k}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for n, pair in enumerate(zip(a, b, strict=True)):
            same(*pair, f"{where} {n}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where


@pytest.mark.parametrize("name", CASES)
def test_every_hook_resumes_to_the_bit(name, tmp_path):
    options, recipe = CASES[name]

    def trainer(out, stop=None):
        drop = 0.0 if name == "delta_lora" else 0.2
        model = lorakit.adapt(tiny.llama(), recipe, **({} if recipe in ("full", "diff-pruning") else {"r": 4, "lora_dropout": drop}))
        rows = [{**r, "task": n % 2} for n, r in enumerate(ROWS)] if HOOKS[name].tasks else ROWS
        return AdapterTrainer(model=model, args=arguments(out, remove_unused_columns=False), train_dataset=rows, hooks=[build({name: options})],
                              callbacks=[StopAt(stop)] if stop else None)

    straight = trainer(tmp_path / "a")
    straight.train()
    trainer(tmp_path / "b", stop=5).train()
    resumed = trainer(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    assert resumed.state.global_step == 8
    same_state(straight, resumed)
    same(states(tmp_path / "a"), states(tmp_path / "b"))  # what the end may not show: averages, windows, counters
    x = logits(straight.model.eval())
    assert torch.equal(x, logits(resumed.model.eval()))
    lorakit.save(straight.model, tmp_path / "out")
    again = lorakit.load(tiny.llama(), tmp_path / "out")
    assert torch.allclose(logits(again), x, atol=1e-4), "the saved adapter is not the trained model"
    assert lorakit.verify(tmp_path / "out", tiny.llama()).ok
    lorakit.detach(straight.model)
    for (k, a), b in zip(tiny.llama().state_dict().items(), straight.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), f"{k}: detach does not give the base back"


# Surgery


def test_surgery_on_an_optimisers_memory():
    a, b = (torch.nn.Parameter(torch.randn(4, 10)) for _ in "ab")
    opt = torch.optim.AdamW([a, b], amsgrad=True)
    for _ in range(3):
        (a.square().sum() + b.sum()).backward()
        opt.step()
    before = {k: t.clone() for k, t in opt.state[a].items()}
    assert {k for k, _ in surgery.memory(opt, a)} == {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    surgery.prune(opt, [a], 0.3, "magnitude")
    for k, t in surgery.memory(opt, a):
        small = before[k].abs().flatten().sort().values[:12]
        assert sorted(before[k].abs()[t == 0].tolist()) == small.tolist(), "the 30 % smallest, and no others"
    surgery.prune(opt, [a], 0.5, "random", surgery.draw(0, 3))
    surgery.zero(opt, [a])
    assert all(not t.any() for _, t in surgery.memory(opt, a)) and opt.state[a]["step"] == 3
    new = torch.nn.Parameter(b.detach()[[0, 2]])
    was = opt.state[b]["exp_avg"]
    surgery.slice_(opt, b, new, torch.tensor([0, 2]))
    assert torch.equal(opt.state[new]["exp_avg"], was[[0, 2]]) and b not in opt.state and opt.state[new]["step"] == 3
    assert opt.param_groups[0]["params"][1] is new
    wide = torch.nn.Parameter(torch.cat([new.detach(), torch.zeros(2, 3)], 1))
    surgery.extend(opt, new, wide, 3, dim=1)
    assert torch.equal(opt.state[wide]["exp_avg"], torch.cat([was[[0, 2]], torch.zeros(2, 3)], 1))
    wide.sum().backward()
    opt.step()
    surgery.forget(opt, [wide])
    assert wide not in opt.state
    assert torch.equal(*(torch.rand(5, generator=surgery.draw(1, 2, "x")) for _ in "ab"))
    assert not torch.equal(torch.rand(5, generator=surgery.draw(1, 2)), torch.rand(5, generator=surgery.draw(1, 3)))


def test_random_pruning_leaves_the_share_it_says():
    p = torch.nn.Parameter(torch.randn(200, 200))
    opt = torch.optim.AdamW([p])
    p.square().sum().backward()
    opt.step()
    surgery.prune(opt, [p], 0.9, "random", surgery.draw(0, 0))
    assert abs(float((opt.state[p]["exp_avg"] == 0).float().mean()) - 0.9) < 0.01
    assert torch.equal(opt.state[p]["exp_avg"] == 0, opt.state[p]["exp_avg_sq"] == 0), "no average without its average of squares"


# Rounds: merge and restart


@pytest.mark.parametrize("recipe", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("target", ["all-linear", ["embed_tokens"]])
def test_a_restart_changes_nothing_of_what_the_model_computes(recipe, target, tmp_path):
    untouched = {k: v.clone() for k, v in tiny.llama().state_dict().items()}
    model = shake(adapted(recipe, target_modules=target))
    x = logits(model)
    for k in (1, 2, 3):
        rounds.new_round(pairs(model), 0, k)
        assert torch.allclose(logits(model), x, atol=1e-5)
        p = pairs(model)[0]
        assert not (p.A if p.flipped() else p.B).any() and (p.B if p.flipped() else p.A).any()
        assert rounds.begun(p).A0.shape[0] == 2 * k
        shake(model, k)
        x = logits(model)
    with lorakit.disabled(model):
        assert torch.allclose(logits(model), logits(tiny.llama()), atol=1e-4)
    p = pairs(model)[0]
    W0, now = p.slot.absorbed.kept.detach(), p.slot.map({p.adapter: 1.0}).weight()
    if recipe != "dora":
        assert torch.linalg.matrix_rank((now - p.slot.site.view(W0)).double(), atol=1e-5) == 8, "rank of the sum grows with every round"
    lorakit.save(model, tmp_path / "a")
    fresh = lorakit.load(tiny.llama(), tmp_path / "a")
    assert torch.allclose(logits(fresh), x, atol=1e-4)
    config = lorakit.formats.folder.Folder(tmp_path / "a")
    assert config.config["peft_type"] == "LORA" and config.config["r"] == 8 and config.receipt["converted_to_lora"]
    assert lorakit.verify(tmp_path / "a", tiny.llama()).ok
    merged = lorakit.merged(model)
    assert torch.allclose(logits(merged), x, atol=1e-4)
    lorakit.detach(model)
    assert all(torch.equal(v, untouched[k]) for k, v in model.state_dict().items())


def test_what_a_bfloat16_base_takes_in_is_not_rounded_away():
    """A hundred rounds, each below what bfloat16 can add to the weight, add up."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False)).bfloat16()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    lorakit.adapt(model, "lora", r=1, lora_alpha=1, target_modules="0")
    for k in range(100):
        p = pairs(model)[0]
        with torch.no_grad():
            p.A.fill_(1.0)
            p.B.fill_(1e-3)
        rounds.new_round([p], 0, k)
    assert torch.allclose(model[0].weight.float(), torch.full((4, 4), 1.1), atol=1e-2)


def test_relora_written_out():
    """Three rounds of SGD with momentum by hand on one dense weight: merged, restarted, memory pruned, rate on a ramp."""
    torch.manual_seed(0)
    every, warm, lr, r = 3, 2, 0.02, 2

    def net():
        torch.manual_seed(1)
        return torch.nn.Sequential(torch.nn.Linear(5, 4, bias=False))

    data = [torch.randn(6, 5) for _ in range(8)]
    model = lorakit.adapt(net(), "lora", r=r, lora_alpha=3, target_modules="0", seed=4)
    A0 = pairs(model)[0].A.detach().clone()
    hook = build({"relora": {"every": every, "warmup": warm, "prune": "magnitude", "share": 0.5, "seed": 9}})
    seen = []
    with hooked(model, lambda g: torch.optim.SGD(g, momentum=0.9), [hook], lr=lr, total=8) as step:
        for x in data:
            model.train()
            model(x).square().sum().backward()
            step()
            seen.append(pairs(model)[0].slot.map({"default": 1.0}).weight().detach().clone())

    W, A, B, s = net()[0].weight.detach().clone(), A0, torch.zeros(4, r), 3 / r
    mA, mB, since = None, None, None
    for t, x in enumerate(data):
        G = 2 * (x @ (W + s * B @ A).T).T @ x
        gA, gB = s * B.T @ G, s * G @ A.T
        mA, mB = (gA, gB) if mA is None else (0.9 * mA + gA, 0.9 * mB + gB)
        rate = lr * (1.0 if since is None else min(1.0, (t - since) / warm))
        A, B = A - rate * mA, B - rate * mB
        done = t + 1
        if done % every == 0 and done != 8:
            W, since = W + s * B @ A, done
            A = (torch.rand(A.shape, generator=host.generator(9, f"step {done} 0")) * 2 - 1) * 5**-0.5
            B = torch.zeros_like(B)
            for m in (mA, mB):
                limit = m.abs().flatten().sort().values[int(0.5 * m.numel()) - 1]
                m[m.abs() <= limit] = 0
        assert torch.allclose(seen[t], W + s * B @ A, atol=1e-5), t


def test_ramp_starts_at_zero_and_the_rate_is_put_back():
    model, rates = adapted(), []

    class Watch(Hook):
        place = 99

        def before_step(self, model, optimizer, step):
            rates.append(optimizer.param_groups[0]["lr"])

    run(model, [build({"relora": {"every": 4, "warmup": 2}}), Watch()], range(9), lr=0.5,
        scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 - t / 10), total=9)
    plain = [0.5 * (1 - t / 10) for t in range(9)]
    want = [x * m for x, m in zip(plain, [1, 1, 1, 1, 0, 0.5, 1, 1, 0], strict=True)]
    assert rates == pytest.approx(want)


def test_cola_and_boosting_forget_and_choose():
    model = adapted(target_modules=["q_proj", "v_proj"])
    hook = build({"xgblora": {"boosters": 3, "layers": 1, "seed": 2}})
    training, counts = [], []
    with hooked(model, torch.optim.AdamW, [hook], lr=1e-2, total=6) as step:
        for k in range(6):
            x = batch(k)
            training.append({p.path.split(".")[2] for p in pairs(model)})
            model.train()
            model(input_ids=x, labels=x).loss.backward()
            step()
            counts.append(len(step.optimizer.state))
    assert all(len(t) == 1 for t in training) and training[0] == training[1] and training[2] == training[3]
    assert counts[1] == counts[3] == 0, "forgotten at the end of each booster"
    sums = {p.path: 0 if rounds.begun(p) is None else rounds.begun(p).A0.shape[0] for p in pairs(model)}
    assert sum(sums.values()) == 2 * 2 * 2, "two boosters of rank 2 on one layer with two targets"
    assert all(p.requires_grad for q in pairs(model, still=True) for p in (q.A, q.B)), "all train again afterwards"


@pytest.mark.parametrize("name", ["relora", "cola", "two_stage", "xgblora", "delta_lora"])
def test_rounds_are_refused_where_they_mean_nothing(name):
    with pytest.raises(LorakitError, match="needs an update s B A"):
        run(adapted(lora_bias=True), [build(name)])
    with pytest.raises(LorakitError, match="no adapter here has two factors"):
        run(lorakit.adapt(tiny.llama(), "full"), [build(name)])
    with pytest.raises(LorakitError, match="subtracts where it started"):
        run(adapted("lora-nonzero"), [build(name)])


# Delta-LoRA


def test_delta_lora_step_by_step():
    """W moves by λ s (B' A' - B A) after every step t > K, done literally beside it; rank of the whole at most 2 r."""
    model = adapted(r=2)
    s, lam, K = pairs(model)[0].s, 1.5, 1
    W = {p.path: p.slot.site.store.read().detach().clone() for p in pairs(model)}
    W0 = {k: v.clone() for k, v in W.items()}
    with hooked(model, torch.optim.AdamW, [build({"delta_lora": {"ratio": lam, "after": K}})], lr=1e-2) as step:
        for t in range(6):
            before = {p.path: (p.B @ p.A).detach().clone() for p in pairs(model)}
            steps(model, step, [t])
            for p in pairs(model):
                if t > K:
                    W[p.path] += lam * s * ((p.B @ p.A).detach() - before[p.path])
                assert torch.allclose(p.slot.site.store.read(), W[p.path], atol=1e-6), (t, p.path)
    for p in pairs(model):
        total = (p.slot.map({p.adapter: 1.0}).weight() - W0[p.path]).double()
        assert torch.linalg.matrix_rank(total, atol=1e-5) <= 4
        assert not torch.equal(W[p.path], W0[p.path])


def test_delta_lora_of_ratio_zero_is_lora_and_is_saved_at_rank_2r(tmp_path):
    a, b = adapted(), adapted()
    assert run(a, [build({"delta_lora": {"ratio": 0.0, "after": 0}})]) == run(b, [])
    c = adapted(r=3)
    run(c, [build({"delta_lora": {"after": 0}})])
    lorakit.save(c, tmp_path / "c")
    assert lorakit.formats.folder.Folder(tmp_path / "c").config["r"] == 6
    with pytest.raises(LorakitError, match="lora_dropout: 0"):
        run(adapted(lora_dropout=0.1), [build("delta_lora")])


# Optimisers


def gradients(model, x):
    model.train()
    model(input_ids=x, labels=x).loss.backward()


@pytest.mark.parametrize("recipe", ["lora", "rslora"])
def test_lora_fa_projects_the_whole_gradient(recipe):
    """s g_B' A = G A⁺ A, with G from a dense weight; A stays to the bit."""
    model = shake(adapted(recipe, target_modules=["q_proj", "embed_tokens"]))
    begun = {p.path: (p.A.detach().clone(), p.B.detach().clone()) for p in pairs(model)}
    caught = {}

    class Catch(Hook):
        place = 99

        def before_step(self, model, optimizer, step):
            for p in pairs(model):
                caught[p.path] = p.A.grad.clone() if p.flipped() else p.B.grad.clone()

    dense = lorakit.merged(model).train()
    run(model, [build("lora_fa"), Catch()], range(1))
    for q in dense.parameters():
        q.requires_grad_(True)
    gradients(dense, batch(0))
    for p in pairs(model, still=True):
        (A, B), G = begun[p.path], dense.get_submodule(p.path).weight.grad
        G = G.T if p.flipped() else G
        if p.flipped():
            assert torch.equal(p.B.detach(), B) and not torch.equal(p.A.detach(), A)
            assert torch.allclose(p.s * B @ caught[p.path], B @ torch.linalg.pinv(B) @ G, atol=1e-4)
        else:
            assert torch.equal(p.A.detach(), A) and not torch.equal(p.B.detach(), B)
            assert torch.allclose(p.s * caught[p.path] @ A, G @ torch.linalg.pinv(A) @ A, atol=1e-4)


def test_lora_fa_plain_leaves_the_gradient_alone():
    a, b = adapted(seed=3), lorakit.adapt(tiny.llama(), "lora", r=2, freeze=("A",), seed=3)
    assert run(a, [build({"lora_fa": {"mode": "plain"}})]) == run(b, [])


def test_riemannian_does_not_care_how_the_product_is_split():
    """B9.7: a step of plain gradient descent on A -> c A, B -> B / c moves B A alike only as δ -> 0, which the pseudo-inverse itself shows."""

    def moved(c, reg):
        model = shake(adapted(target_modules=["q_proj"]).double(), 5)
        with torch.no_grad():
            for p in pairs(model):
                p.A.mul_(c)
                p.B.div_(c)
        was = [(p.B @ p.A).detach() for p in pairs(model)]
        run(model, [build({"riemannian": {"reg": reg}})], range(1), optimizer=sgd, lr=1e-4)
        return torch.cat([((p.B @ p.A).detach() - w).flatten() for p, w in zip(pairs(model), was, strict=True)])

    exact, loose = 1e-12, 1.0
    assert torch.allclose(moved(1.0, exact), moved(3.0, exact), rtol=1e-3, atol=1e-9)
    assert not torch.allclose(moved(1.0, loose), moved(3.0, loose), rtol=1e-1, atol=1e-9)


def test_riemannian_written_out():
    model = shake(adapted(target_modules=["q_proj"]))
    plain = shake(adapted(target_modules=["q_proj"]))
    gradients(plain, batch(0))
    before = [(p.A.detach().clone(), p.B.detach().clone()) for p in pairs(model)]
    run(model, [build({"riemannian": {"reg": 0.1}})], range(1), optimizer=sgd, lr=1.0)
    for p, q, (A, B) in zip(pairs(model), pairs(plain), before, strict=True):
        eye = 0.1 * torch.eye(2)
        assert torch.allclose(p.A, A - torch.linalg.inv(B.T @ B + eye) @ q.A.grad, atol=1e-5)
        assert torch.allclose(p.B, B - q.B.grad @ torch.linalg.inv(A @ A.T + eye), atol=1e-5)


def test_lora_plus_by_the_root_of_each_rank():
    model = adapted("dora", r=4, rank_pattern={"v_proj": 9}, target_modules=["q_proj", "v_proj"])
    group = {"params": [p for p in model.parameters() if p.requires_grad], "lr": 0.6, "weight_decay": 0.1}
    groups = build({"lora_plus": {"form": "sqrt"}}).param_groups(model, [group])
    rate = {id(p): g["lr"] for g in groups for p in g["params"]}
    assert len(rate) == len(group["params"]) and all(g["weight_decay"] == 0.1 for g in groups)
    for p in pairs(model):
        r = 9 if "v_proj" in p.path else 4
        assert (rate[id(p.A)], rate[id(p.B)]) == pytest.approx((0.6 / r**0.5, 0.6 * r**0.5))
        assert rate[id(p.slot.parameters("default")["m"])] == 0.6


def test_lora_plus_of_ratio_one_is_one_group():
    assert run(adapted(), [build({"lora_plus": {"ratio": 1.0}})]) == run(adapted(), [])


@pytest.mark.parametrize("of", ["factors", "product"])
def test_decay_of_factors_written_out(of):
    model = shake(adapted())
    hook = build({"factor_decay": {"weight": 0.3, "of": of}})
    hook.setup(model)
    total = 0.0
    for p in pairs(model):
        if of == "factors":
            total += sum(x**2 for t in (p.A, p.B) for x in t.flatten().tolist())
        else:
            total += float((p.s * p.B @ p.A).square().sum())
    assert float(hook.extra_loss(model, None).detach()) == pytest.approx(0.3 * total, rel=1e-5)


def test_decay_of_factors_is_twice_the_nuclear_norm_at_its_minimum():
    """B9.7: over all splits of a product, |A|² + |B|² is least at 2 |M|_*."""
    B, A = torch.randn(6, 3), torch.randn(3, 5)
    U, S, V = torch.linalg.svd(B @ A)
    b, a = U[:, :3] * S[:3].sqrt(), S[:3].sqrt()[:, None] * V[:3]
    assert torch.allclose(b @ a, B @ A, atol=1e-5)
    assert float(b.square().sum() + a.square().sum()) == pytest.approx(2 * float(S.sum()), rel=1e-5)
    for _ in range(20):
        M = torch.randn(3, 3)
        assert float((b @ M).square().sum() + (torch.linalg.inv(M) @ a).square().sum()) >= 2 * float(S.sum()) - 1e-4


def test_extra_loss_does_not_grow_with_accumulation(tmp_path):
    """The same batch in one micro-batch or in two: the same step."""
    out = []
    for n, (size, accumulate) in enumerate(((6, 1), (3, 2))):
        model = shake(adapted())
        args = arguments(tmp_path / str(n), max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=accumulate, optim="sgd",
                         max_grad_norm=0, save_strategy="no")
        AdapterTrainer(model=model, args=args, train_dataset=ROWS, hooks=[build({"factor_decay": {"weight": 0.5}})]).train()
        out.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.allclose(*out, atol=1e-6)


# Masks


@pytest.mark.parametrize("granularity", ["element", "rank"])
@pytest.mark.parametrize("resample", ["step", "once"])
def test_lora_sp_leaves_half_to_the_bit(granularity, resample):
    model = shake(adapted(r=4))
    hook = build({"lora_sp": {"granularity": granularity, "resample": resample}})
    ever = {}
    with hooked(model, torch.optim.AdamW, [hook], lr=1e-2, weight_decay=0.1) as step:
        for t in range(5):
            before = {p.path: (p.A.detach().clone(), p.B.detach().clone()) for p in pairs(model)}
            steps(model, step, [t])
            for p in pairs(model):
                for x, now, mask in zip(before[p.path], (p.A, p.B), hook.masks(p, t), strict=True):
                    assert torch.equal(now.detach()[~mask], x[~mask]) and bool((now.detach()[mask] != x[mask]).all())
                    key = (p.path, tuple(now.shape))
                    ever[key] = mask | ever.get(key, torch.zeros_like(mask))
                if granularity == "rank":
                    a, b = hook.masks(p, t)
                    assert torch.equal(a[:, 0], b[0])
    share = torch.cat([m.flatten() for m in ever.values()]).float().mean()
    assert share > 0.8 if resample == "step" else 0.3 < share < 0.7


def test_lisa_trains_so_many_blocks_at_a_time():
    model = lorakit.adapt(tiny.llama(layers=4), "full", target_modules=["q_proj", "up_proj", "embed_tokens"])
    hook, seen = build({"lisa": {"layers": 2, "every": 2, "seed": 1}}), []
    with hooked(model, torch.optim.AdamW, [hook], lr=1e-2) as step:
        model.train()
        for t in range(8):
            x = batch(t)
            model(input_ids=x, labels=x).loss.backward()
            with_grad = [n for n, p in model.named_parameters() if p.grad is not None]
            seen.append({n.split(".")[2] for n in with_grad if ".layers." in n})
            assert any("embed_tokens" in n for n in with_grad), "what is outside of blocks always trains"
            step()
    assert all(len(s) == 2 for s in seen)
    assert all(seen[t] == seen[t + 1] for t in range(0, 8, 2)) and len({tuple(sorted(s)) for s in seen}) > 1
    assert all(p.requires_grad for n, p in model.named_parameters() if "modules_to_save" in n)


def test_lora_dropout_written_out():
    """Gradient and loss are those of diag(m_B) B A diag(m_A); afterwards the factors are whole."""
    model, other = shake(adapted()), shake(adapted())
    hook = build({"lora_dropout": {"p": 0.4, "seed": 3}})
    hook.setup(model)
    hook.before_forward(model, 7)
    masks = {p.path: (hook.masks[id(p.A)].clone(), hook.masks[id(p.B)].clone()) for p in pairs(model)}
    x = batch(0)
    loss = model(input_ids=x, labels=x).loss
    loss.backward()
    hook.before_step(model, None, 7)
    for p in pairs(other):
        a, b = masks[p.path]
        assert a.shape == (1, p.A.shape[1]) and b.shape == (p.B.shape[0], 1)
        p.slot.module._modules["lora_A"]._parameters["default"] = p.A * a  # a graph from the leaf to the masked factor
        p.slot.module._modules["lora_B"]._parameters["default"] = p.B * b
    kept = list(zip(pairs(model), [p for p in shake(adapted()).parameters() if p.requires_grad], strict=False))
    assert kept
    same = other(input_ids=x, labels=x).loss
    assert torch.allclose(loss, same, atol=1e-6)
    zeros = torch.cat([((masks[p.path][1] * p.B) @ (p.A * masks[p.path][0]) == 0).float().flatten() for p in pairs(model)]).mean()
    assert abs(float(zeros) - (2 * 0.4 - 0.4**2)) < 0.12
    for p, q in zip(pairs(model), pairs(shake(adapted())), strict=True):
        assert torch.equal(p.A, q.A) and torch.equal(p.B, q.B), "whole again"
        a, b = masks[p.path]
        assert not p.A.grad[:, a[0] == 0].any() and not p.B.grad[b[:, 0] == 0].any()
    hook.close(model)


def test_lora_dropout_of_zero_is_lora():
    assert run(adapted(), [build({"lora_dropout": {"p": 0.0}})]) == run(adapted(), [])


# DropBP, HiddenKey


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropbp_keeps_the_value_and_drops_the_gradient(checkpointing):
    model, plain = shake(adapted()), shake(adapted())
    for m in (model, plain):
        m.train()
        if checkpointing:
            m.enable_input_require_grads()
            m.gradient_checkpointing_enable({"use_reentrant": False})
    hook = build("dropbp")
    hook.setup(model)
    hook.dropped = {1, 2}  # feed-forward of block 0, attention of block 1
    x = batch(0)
    a, b = model(input_ids=x, labels=x).loss, plain(input_ids=x, labels=x).loss
    assert torch.equal(a, b)
    a.backward()
    b.backward()
    for n, p in model.named_parameters():
        if p.requires_grad:
            gone = "layers.0.mlp" in n or "layers.1.self_attn" in n
            assert (p.grad is None) == gone, n
    # written out: the same with y.detach() after the two branches
    other = shake(adapted()).train()
    for path in ("model.layers.0.mlp", "model.layers.1.self_attn"):
        other.get_submodule(path).register_forward_hook(lambda m, i, o: (o[0].detach(), *o[1:]) if isinstance(o, tuple) else o.detach())
    other(input_ids=x, labels=x).loss.backward()
    for (n, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.allclose(p.grad, q.grad, atol=1e-6)), n
    model.eval()
    assert logits(model).equal(logits(plain.eval()))
    hook.close(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.layers[0].children())


def test_dropbp_draws_the_share_and_never_everything():
    model = lorakit.adapt(tiny.llama(layers=5), "lora", r=2, target_modules=["q_proj"])
    hook = build({"dropbp": {"p": 0.6, "seed": 1}})
    hook.setup(model)
    draws = [hook.draw(t) for t in range(200)]
    assert all(len(d) >= 6 for d in draws) and draws[3] == hook.draw(3) and len({tuple(d) for d in draws}) > 50
    assert all(any(k not in d for k in range(0, 10, 2)) for d in draws), "an attention with an adapter is always kept"
    hook.close(model)
    assert run(adapted(), [build({"dropbp": {"p": 0.0}})]) == run(adapted(), [])
    with pytest.raises(LorakitError, match="no blocks"):
        build("dropbp").setup(lorakit.adapt(tiny.bert(), "lora", r=2))
    hook = build({"dropbp": {"p": 0.0, "rates": [1.0, 0.0, 0.0, 0.0]}})
    hook.setup(model := adapted())
    assert hook.draw(0) == {0}
    hook.close(model)


def test_dropbp_sets_its_rates_by_what_branches_matter():
    """Sensitivity and allocation written out; the optimiser's gradients are left alone."""
    from lorakit.hooks.dropbp import allocate

    model = shake(adapted()).train()
    hook = build({"dropbp": {"p": 0.4, "measure": 0.5}})
    hook.setup(model)
    hook.start(model, None, 4)
    hook.before_forward(model, 1)
    hook.dropped = set()
    x = batch(0)
    model(input_ids=x, labels=x)
    random = torch.get_rng_state()
    hook.on_interval(model, None, None, 2)
    assert all(p.grad is None for p in model.parameters()) and torch.equal(random, torch.get_rng_state())

    def norms(cut):
        other = shake(adapted()).train()
        if cut:
            other.get_submodule(cut).register_forward_hook(lambda m, i, o: (o[0].detach(), *o[1:]) if isinstance(o, tuple) else o.detach())
        other(input_ids=x, labels=x).loss.backward()
        return [0.0 if p.grad is None else float(p.grad.norm()) for p in other.parameters() if p.requires_grad]

    whole = norms("")
    paths = [f"model.layers.{n}.{b}" for n in range(2) for b in ("self_attn", "mlp")]
    S = [sum((a - b) ** 2 for a, b in zip(whole, norms(q), strict=True)) for q in paths]
    attention, mlp = 2 * 16 * (16 + 8 + 8 + 16) + 4 * 16 * 7, 2 * 3 * 16 * 24
    extra = {b: 2 * sum(p.numel() for n, p in model.get_submodule(f"model.layers.0.{b}").named_parameters() if "lora_" in n) for b in ("self_attn", "mlp")}
    F = [attention + extra["self_attn"], mlp + extra["mlp"]] * 2
    rates = [0.0] * 4
    while sum(f * (1 - r) for f, r in zip(F, rates, strict=True)) > 0.6 * sum(F):
        k = min((k for k in range(4) if rates[k] < 0.85), key=lambda k: S[k] * (rates[k] + 0.1))
        rates[k] += 0.1
    assert hook.set_rates == pytest.approx(rates) and hook.state_dict()["rates"] == hook.set_rates
    assert len(set(hook.set_rates)) > 1
    assert allocate([1.0, 2.0], [1.0, 1.0], 1.0) == [0.9, 0.9] and allocate([1.0, 2.0], [1.0, 1.0], 0.0) == [0.0, 0.0]
    hook.close(model)


def test_hidden_key_closes_whole_columns():
    model = shake(lorakit.adapt(tiny.llama(layers=2, attn_implementation="eager"), "lora", r=2))
    hook = build({"hidden_key": {"p": 0.5, "later": 0.5}})
    hook.setup(model)
    attentions = model.train()(input_ids=batch(0), output_attentions=True).attentions
    plain, a = attentions
    n = a.shape[-1]
    assert (plain.tril() > 0).sum() == a.shape[0] * a.shape[1] * n * (n + 1) // 2, "the first block is left alone"
    assert torch.allclose(a.sum(-1), torch.ones(a.shape[:-1]), atol=1e-5), "rows still sum to 1"
    below = torch.ones(n, n).tril(-1).bool()
    closed = 0
    for m in a.flatten(0, 1):
        for k in range(n - 1):
            column = m[:, k][below[:, k]]
            assert bool((column == 0).all()) or bool((column > 0).all()), "a key is dropped for all queries or for none"
            closed += int((column == 0).all())
        assert bool((m.diagonal() > 0).all())
    assert 0.3 < closed / (a.shape[0] * a.shape[1] * (n - 1)) < 0.7
    x = logits(model.eval())
    hook.close(model)
    assert torch.equal(x, logits(model))


def test_hidden_key_adds_the_second_pass_and_the_disagreement():
    model = shake(adapted()).train()
    hook = build({"hidden_key": {"p": 0.0, "kl": 3.0}})
    hook.setup(model)
    x = batch(0)
    out = model(input_ids=x, labels=x)
    assert float(hook.extra_loss(model, out).detach()) == pytest.approx(float(out.loss.detach())), "two equal passes agree"
    hook.p = 0.3
    torch.manual_seed(0)
    one = model(input_ids=x, labels=x)
    state = torch.get_rng_state()
    extra = float(hook.extra_loss(model, one).detach())
    torch.set_rng_state(state)
    hook.second = True
    two = model(input_ids=x, labels=x)
    p, q = (o.logits[:, :-1].softmax(-1) for o in (one, two))
    kl = ((p * (p / q).log()).sum(-1).mean() + (q * (q / p).log()).sum(-1).mean()) / 2
    assert extra == pytest.approx(float((two.loss + 3.0 * kl).detach()), rel=1e-4)
    hook.close(model)


# Gradients of several tasks


def vectors(k, n=7, seed=0):
    return torch.randn(k, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_pcgrad_written_out():
    for seed in range(20):
        g = vectors(2, seed=seed)
        d = build("pcgrad").combine(None, g)
        dot = float(g[0] @ g[1])
        if dot >= 0:
            assert torch.equal(d, g[0] + g[1])
        else:
            want = g[0] - dot / float(g[1] @ g[1]) * g[1] + g[1] - dot / float(g[0] @ g[0]) * g[0]
            assert torch.allclose(d, want)
            parts = [g[0] - dot / float(g[1] @ g[1]) * g[1], g[1] - dot / float(g[0] @ g[0]) * g[0]]
            assert abs(float(parts[0] @ g[1])) < 1e-9 and abs(float(parts[1] @ g[0])) < 1e-9
    hook = build({"pcgrad": {"tasks": 3, "seed": 1}})
    g, gen = vectors(3, seed=4), surgery.draw(1, 0, "pcgrad")
    out = torch.zeros(7, dtype=torch.float64)
    for i in range(3):
        mine = g[i].clone()
        for j in torch.randperm(3, generator=gen).tolist():
            if j != i and float(mine @ g[j]) < 0:
                mine = mine - (mine @ g[j]) / (g[j] @ g[j]) * g[j]
        out += mine
    assert torch.allclose(hook.combine(None, g), out)


def test_gradvac_reaches_the_expected_cosine_and_is_pcgrad_at_zero():
    for seed in range(20):
        g = vectors(2, seed=seed)
        hook = build("gradvac")
        hook.setup(None)
        assert torch.allclose(hook.combine(None, g), build("pcgrad").combine(None, g), atol=1e-9)
        phi = float(torch.cosine_similarity(g[0], g[1], dim=0))
        assert hook.expected[0, 1] == pytest.approx(0.01 * phi) and hook.expected[1, 0] == pytest.approx(0.01 * phi)
        hook.expected = torch.full((2, 2), 0.9, dtype=torch.float64)
        total = hook.combine(None, g)
        parts = []
        for i, j in ((0, 1), (1, 0)):
            a, b = g[i], g[j]
            w = float(a.norm()) * (0.9 * (1 - phi**2) ** 0.5 - phi * (1 - 0.81) ** 0.5) / (float(b.norm()) * (1 - 0.81) ** 0.5)
            parts.append(a + max(0.0, w) * b)
            assert float(torch.cosine_similarity(parts[-1], b, dim=0)) == pytest.approx(max(0.9, phi))
        assert torch.allclose(total, parts[0] + parts[1])
        assert hook.expected[0, 1] == pytest.approx(0.99 * 0.9 + 0.01 * phi)


def test_cagrad_stays_in_its_ball_and_helps_the_worst_task():
    for k, seed in ((2, 0), (2, 1), (3, 2), (4, 3)):
        g, c = vectors(k, seed=seed), 0.5
        g0 = g.mean(0)
        d = build({"cagrad": {"tasks": k, "c": c}}).combine(None, g) / k
        assert float((d - g0).norm()) == pytest.approx(c * float(g0.norm()), rel=1e-6)
        assert float((g @ d).min()) >= float((g @ g0).min())
        best = -1e9
        for n in range(20000):  # no other point of the ball serves the worst task better
            u = torch.randn(7, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
            best = max(best, float((g @ (g0 + c * g0.norm() * u / u.norm())).min())) if n < 2000 else best
        assert best <= float((g @ d).min()) + 1e-3
    g = vectors(3)
    assert torch.allclose(build({"cagrad": {"tasks": 3, "c": 0.0}}).combine(None, g), g.sum(0))
    assert torch.allclose(build({"cagrad": {"tasks": 3, "c": 0.5, "rescale": True}}).combine(None, g),
                          build({"cagrad": {"tasks": 3, "c": 0.5}}).combine(None, g) / 1.25)


class Sum(Hook):
    """Tasks apart, and then just their sum."""

    tasks = 2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_tasks_apart_and_summed_is_ordinary_training(accumulate, tmp_path):
    out = []
    for n, hooks in enumerate(([], [Sum()])):
        model = shake(adapted())
        args = arguments(tmp_path / str(n), max_steps=3, gradient_accumulation_steps=accumulate, save_strategy="no", remove_unused_columns=False)
        rows = [{**r, "task": k % 2} for k, r in enumerate(ROWS)] if hooks else ROWS
        AdapterTrainer(model=model, args=args, train_dataset=rows, hooks=hooks).train()
        out.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.allclose(*out, atol=1e-5)


def test_tasks_in_a_loop_and_what_is_refused(tmp_path):
    a, b = shake(adapted()), shake(adapted())
    with hooked(a, sgd, [build("pcgrad")], lr=1.0) as step:
        a.train()
        losses = [a(input_ids=batch(k), labels=batch(k)).loss for k in range(2)]
        step.backward(losses)
        step()
    apart = []
    for k in range(2):
        b.zero_grad()
        b(input_ids=batch(k), labels=batch(k)).loss.backward()
        apart.append(torch.cat([p.grad.flatten() for p in b.parameters() if p.requires_grad]))
    was = torch.cat([p.detach().flatten() for p in b.parameters() if p.requires_grad])
    now = torch.cat([p.detach().flatten() for p in a.parameters() if p.requires_grad])
    assert torch.allclose(now, was - build("pcgrad").combine(None, torch.stack(apart)), atol=1e-5)
    with pytest.raises(LorakitError, match="no tensor `task`"):
        AdapterTrainer(model=adapted(), args=arguments(tmp_path), train_dataset=ROWS, hooks=[build("pcgrad")]).train()
    with pytest.raises(LorakitError, match="both make one gradient"):
        AdapterTrainer(model=adapted(), args=arguments(tmp_path), train_dataset=ROWS, hooks=[build("pcgrad"), build("cagrad")])


# Projected gradients of whole weights


def test_galore_written_out():
    """Adam in the subspace of the current gradient, moments carried over unchanged."""
    model = lorakit.adapt(tiny.llama(), "full", target_modules=["model.layers.0.mlp.up_proj"])
    plain = lorakit.adapt(tiny.llama(), "full", target_modules=["model.layers.0.mlp.up_proj"])
    W = next(p for p in plain.parameters() if p.requires_grad)
    r, lr, scale, m, v = 3, 1e-2, 0.5, 0.0, 0.0
    with hooked(model, torch.optim.AdamW, [build({"galore": {"r": r, "every": 2, "scale": scale}})], lr=lr, weight_decay=0.1) as step:
        assert sum(p.numel() for g in step.optimizer.param_groups for p in g["params"]) == 24 * r
        for t in range(5):
            plain.zero_grad()
            gradients(plain, batch(t))
            steps(model, step, [t])
            G = W.grad  # (24, 16)
            if t % 2 == 0:
                P = torch.linalg.svd(G, full_matrices=False)[2][:r]
            R = G @ P.T
            m, v = 0.9 * m + 0.1 * R, 0.999 * v + 0.001 * R**2
            N = (m / (1 - 0.9 ** (t + 1))) / ((v / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
            with torch.no_grad():
                before = W.clone()
                W.sub_(lr * scale * N @ P)
                assert torch.linalg.matrix_rank((W - before).double(), atol=1e-7) <= r
                W.mul_(1 - lr * 0.1)
            mine = next(p for p in model.parameters() if p.requires_grad)
            assert torch.allclose(mine, W, atol=1e-5), t


def test_flora_of_one_projection_is_lora_with_a_frozen_random_factor():
    """W moves by -lr G A Aᵀ, as B A does with A frozen; drawn anew the sum of steps has a higher rank."""
    target = ["model.layers.0.mlp.up_proj"]
    for every, rank in ((1000, 2), (1, 8)):
        model, plain = (lorakit.adapt(tiny.llama(), "full", target_modules=target) for _ in "ab")
        W = next(p for p in plain.parameters() if p.requires_grad)
        begun, hook = W.detach().clone(), build({"flora": {"r": 2, "every": every, "seed": 5}})
        with hooked(model, sgd, [hook], lr=0.1) as step:
            for t in range(4):
                plain.zero_grad()
                gradients(plain, batch(t))
                steps(model, step, [t])
                P = next(iter(hook.P.values()))
                with torch.no_grad():
                    W.sub_(0.1 * W.grad @ P @ P.T)
        mine = next(p for p in model.parameters() if p.requires_grad)
        assert torch.allclose(mine, W, atol=1e-5)
        assert torch.linalg.matrix_rank((mine - begun).detach().double(), atol=1e-6) == rank


def test_flora_is_unbiased_and_takes_its_momentum_along():
    hook, G = build({"flora": {"r": 8, "every": 1}}), torch.randn(6, 20)
    mean = sum((P := hook.basis("x", G, t)) @ (P.T @ G) for t in range(4000)) / 4000
    assert float((mean - G).norm() / G.norm()) < 0.06
    old, new = hook.basis("x", G, 1), hook.basis("x", G, 2)
    small = torch.nn.Parameter(torch.zeros(8, 20))
    opt = torch.optim.SGD([small], momentum=0.9)
    opt.state[small]["momentum_buffer"] = old.T @ G
    hook.changed(opt, small, old, new, left=True)
    assert torch.allclose(opt.state[small]["momentum_buffer"], new.T @ old @ old.T @ G, atol=1e-5)


# A loop of one's own, order, configuration


def test_a_loop_stops_and_goes_on_to_the_bit(tmp_path):
    def go(which, state=None, file=None):
        model = adapted(seed=1)
        hooks = [build({"relora": {"every": 2, "warmup": 1}}), build({"lora_dropout": {"p": 0.2}})]
        with hooked(model, torch.optim.AdamW, hooks, lr=1e-2, total=6, state=state and state["step"]) as step:
            if state:
                lorakit.formats.folder.fill(model, "default", lorakit.formats.folder.Folder(tmp_path / "half"))
                step.optimizer.load_state_dict(state["optimizer"])
            losses = steps(model, step, which)
            if file:
                lorakit.save(model, file)
            return losses, {"step": step.state_dict(), "optimizer": step.optimizer.state_dict()}, model

    straight, _, a = go(range(6))
    one, state, _ = go(range(3), file=tmp_path / "half")
    two, _, b = go(range(3, 6), state)
    assert straight == one + two
    assert torch.equal(logits(a), logits(b))


def test_hooks_come_in_their_order_wherever_they_stand_in_the_list():
    names = ["relora", "lora_sp", "riemannian", "pcgrad", "factor_decay", "delta_lora"]
    places = [HOOKS[n].place for n in names]
    assert places == [80, 40, 30, 10, 50, 60]


def test_a_loop_equals_the_trainer(tmp_path):
    """One way: the same hooks by hand and under Trainer."""
    hooks = lambda: [build({"relora": {"every": 2, "warmup": 1}}), build("dropbp"), build({"lora_plus": {"ratio": 2.0}})]  # noqa: E731
    args = arguments(tmp_path, max_steps=5, gradient_accumulation_steps=1, lr_scheduler_type="constant", max_grad_norm=0.5, save_strategy="no")
    trainer = AdapterTrainer(model=adapted(), args=args, train_dataset=ROWS, hooks=hooks())
    rows = [next(it)["input_ids"] for it in [iter(trainer.get_train_dataloader())] for _ in range(5)]
    trainer = AdapterTrainer(model=adapted(), args=args, train_dataset=ROWS, hooks=hooks())
    trainer.train()
    model = adapted()
    with hooked(model, torch.optim.AdamW, hooks(), lr=1e-2, max_grad_norm=0.5, total=5) as step:
        model.train()
        for x in rows:
            model(input_ids=x, labels=x).loss.backward()
            step()
    for (k, a), (_, b) in zip(model.named_parameters(), trainer.model.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), k


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_documented_and_checks_its_options(name):
    from lorakit.catalog import entries

    card = next(e for e in entries() if e["kind"] == "hook" and e["name"] == name)
    assert card["doc"] and card["formula"] and all(f["about"] for f in card["fields"]), name
    with pytest.raises(LorakitError, match="no option `nonsense`"):
        build({name: {"nonsense": 1}})


@pytest.mark.parametrize("config,what", [
    ({"relora": {"every": 0}}, "makes no sense"), ({"relora": {"prune": "some"}}, "prune is one of"), ({"cola": {"links": 0}}, "at least one link"),
    ({"dropbp": {"p": 2}}, "probabilities"), ({"lora_sp": {"frozen": 1.0}}, "frozen"), ({"cagrad": {"c": 1.0}}, "below 1"),
    ({"lora_fa": {"mode": "corected"}}, "unknown mode `corected`; did you mean `corrected`"), ({"relora": {"every": "x"}}, "relora: "),
    ({"pcgrad": {"tasks": 1}}, "at least 2"), ({"delta_lora": {"ratio": -1}}, "at least 0"),
])
def test_wrong_options_are_refused(config, what):
    with pytest.raises(LorakitError, match=what):
        build(config)


# Two processes; a whole run from YAML


PARALLEL = {"relora": {"every": 2, "warmup": 1}, "dropbp": {}, "xgblora": {"boosters": 3, "layers": 1}, "lora_dropout": {"p": 0.3}, "pcgrad": {},
            "galore": {"r": 2}}


def _parallel(folder) -> dict:
    """Every process on its own half of the batch; what each has at the end."""
    out = {}
    for name, options in PARALLEL.items():
        torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)  # whatever a process draws for itself must not matter
        model = lorakit.adapt(tiny.llama(), "full" if name == "galore" else "lora", **({} if name == "galore" else {"r": 2}))
        world = dist.get_world_size() if dist.is_initialized() else 1
        rows = [{**r, "task": n % 2} for n, r in enumerate(ROWS)] if name == "pcgrad" else ROWS
        args = arguments(folder / name, max_steps=6, per_device_train_batch_size=4 // world, gradient_accumulation_steps=1, remove_unused_columns=False,
                         save_strategy="no", dataloader_pin_memory=False, adam_epsilon=1e-4)
        AdapterTrainer(model=model, args=args, train_dataset=rows, hooks=[build({name: options})]).train()
        slots = host.slots(model)
        out[name] = {k: v.detach().clone() for k, v in model.named_parameters()} | {f"effect {p}": s.map({"default": 1.0}).weight() for p, s in slots.items()}
    return out


@pytest.mark.skipif(not dist.is_gloo_available(), reason="no gloo in this torch")
def test_two_processes_end_with_the_same_model(tmp_path):
    """Identical to the bit in both, and what one process makes of the whole batch."""
    one, other = together(_parallel, tmp_path)
    alone = _parallel(tmp_path / "alone")
    for name in PARALLEL:
        assert one[name].keys() == other[name].keys()
        for k in one[name]:
            assert torch.equal(one[name][k], other[name][k]), (name, k)
            if name != "galore":  # its subspace turns with the last bit of the gradient
                assert torch.allclose(one[name][k], alone[name][k], atol=1e-4), (name, k)


def test_a_run_with_hooks_from_its_configuration(base, tmp_path):  # noqa: F811 (a fixture)
    from lorakit.training import run as r

    hooks = [{"lora_plus": {"ratio": 4}}, {"relora": {"every": 4, "warmup": 1}}, "dropbp"]
    train = {"max_steps": 12, "learning_rate": 5e-3, "batch_size": 8, "threads": 1}
    rec = r.train(config(base, tmp_path, hooks=hooks, train=train), say=lambda s: None)
    assert rec["verify"]["ok"], rec["verify"]
    assert rec["metrics"]["after"]["eval_loss"] < rec["metrics"]["before"]["eval_loss"]
    saved = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA" and saved["r"] == 12, "three rounds of rank 4"
    assert len(json.loads((tmp_path / "run" / "adapter" / "receipt.json").read_text())["converted_to_lora"]) == 14


def test_the_loop_of_the_guide_runs(tmp_path, monkeypatch):
    import re
    from pathlib import Path

    page = (Path(__file__).parents[1] / "docs" / "train-in-python.md").read_text()
    code = next(c for c in re.findall(r"```python\n(.*?)```", page, re.S) if "hooked(" in c)
    monkeypatch.chdir(tmp_path)
    x = [batch(k) for k in range(4)]
    exec(compile(code, "docs/train-in-python.md", "exec"), {"model": adapted(), "loader": [{"input_ids": b, "labels": b} for b in x], "lorakit": lorakit})
    assert (tmp_path / "out" / "adapter" / "receipt.json").is_file()


def test_a_checkpoint_with_hooks_is_not_resumed_without_them(tmp_path):
    hooks = [build({"relora": {"every": 2, "warmup": 1}})]
    AdapterTrainer(model=adapted(), args=arguments(tmp_path), train_dataset=ROWS, hooks=hooks, callbacks=[StopAt(5)]).train()
    bare = AdapterTrainer(model=adapted(), args=arguments(tmp_path), train_dataset=ROWS)
    with pytest.raises(LorakitError, match=r"holds the state of the hooks \['relora'\], this training has \[\]; mend: the same hooks"):
        bare.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("hook", ["lora_dropout", "lora_sp", "rose_lora", "riemannian"])
@pytest.mark.parametrize("recipe", ["tied-lora", "lotr", "poly"])
def test_factors_that_are_shared_or_of_another_kind_are_refused(hook, recipe):
    """Masks laid on one tensor by many targets would not come off again."""
    with pytest.raises(LorakitError, match=f"{hook}: no adapter here has two factors A and B of each target's own"):
        run(adapted(recipe), [build(hook)], range(1))


@pytest.mark.parametrize("hook", [{"lora_fa": {"mode": "corrected"}}, {"factor_decay": {"of": "product"}}])
def test_formulas_of_s_b_a_are_refused_where_the_update_is_another(hook):
    for recipe in ("sora", "trilora"):
        with pytest.raises(LorakitError, match=r"needs an update s B A, which (sora|trilora) is not exactly"):
            run(adapted(recipe), [build(hook)], range(1))
    run(adapted("lora-nonzero"), [build(hook)], range(1))
