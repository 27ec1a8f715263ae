"""BiLoRA and AutoLoRA: the hypergradient against the exact one, both levels written out, whose rows are whose, ranks found and trained anew.

Stopped and resumed in test_hooks.py.
"""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from test_hooks import batch
from test_policies import Odd
from test_training import ROWS, TEXT, arguments, base, config, same_state  # noqa: F401
from tiny import logits

import lorakit
from lorakit import LorakitError
from lorakit.hooks import build, hooked
from lorakit.hooks.autolora import rank, retrained
from lorakit.hooks.components import gated
from lorakit.hooks.losses import Losses, batch_of, parted
from lorakit.models import load_base, load_tokenizer
from lorakit.training import AdapterTrainer, AdapterTrainerMixin

R, S = 3, 12 / (3 + 1e-5)


def rows(k):
    gen = torch.Generator().manual_seed(k)
    return torch.randn(6, 5, generator=gen, dtype=torch.float64), torch.randn(6, 4, generator=gen, dtype=torch.float64)


def squared(model, b):
    return (model(b[0]) - b[1]).square().mean()


def net(shake=0.3):
    """One dense layer in double precision with an AdaLoRA on it that is somewhere already."""
    torch.manual_seed(0)
    model = lorakit.adapt(torch.nn.Sequential(torch.nn.Linear(5, 4, bias=False).double()), "adalora", r=R, lora_alpha=12, target_modules="0")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and p.shape[-1] != 1:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * shake)
    return model.train()


def ladder(hook, state=None, **kw):
    return hooked(net(), torch.optim.SGD, [hook], lr=0.05, held=[rows(100 + k) for k in range(3)], loss=squared, total=6, state=state, **kw)


LAM = {"softmax": lambda t: t.exp() / t.exp().sum(), "real": lambda t: t, "binary": lambda t: 1 / (1 + (-t).exp())}


class Slow:
    """Both levels of one layer by autograd through the step itself, in double precision."""

    def __init__(self, model, variant, gamma1, gamma2, squared, lr, theta):
        leaf = dict(model[0].named_parameters())
        self.W = leaf["weight"].detach()
        self.P, self.Q = (leaf[f"lora_{k}.default"].detach().clone().double() for k in "BA")
        self.variant, self.g1, self.g2, self.squared, self.lr, self.theta = variant, gamma1, gamma2, squared, lr, theta.clone()

    def C(self, P, Q, lam, b):
        x, y = b
        return (x @ (self.W + S * P @ torch.diag(lam) @ Q).T - y).square().mean()

    def L1(self, P, Q, lam, b):
        eye = torch.eye(R, dtype=torch.float64)
        far = [(P.T @ P - eye).square().sum(), (Q @ Q.T - eye).square().sum()]
        return self.C(P, Q, lam, b) + self.g1 * sum(f if self.squared else f.sqrt() for f in far) / 2

    def upper(self, d1, d2, ramp, second=True):
        """dC/dθ on D2."""
        theta, P, Q = self.theta.clone().requires_grad_(), self.P.clone().requires_grad_(), self.Q.clone().requires_grad_()
        lam = LAM[self.variant](theta)
        gP, gQ = torch.autograd.grad(self.L1(P, Q, lam, d1), (P, Q), create_graph=True)
        if not second:
            gP, gQ = gP.detach(), gQ.detach()
        own = -(lam * lam.log() + (1 - lam) * (1 - lam).log()).mean() if self.variant == "binary" else 0.0
        return torch.autograd.grad(self.C(P - self.lr * gP, Q - self.lr * gQ, lam, d2) + self.g2 * ramp * own, theta)[0]

    def lower(self, d1):
        P, Q = self.P.clone().requires_grad_(), self.Q.clone().requires_grad_()
        return torch.autograd.grad(self.L1(P, Q, LAM[self.variant](self.theta), d1), (P, Q))


# The hypergradient, and both levels written out


@pytest.mark.parametrize("variant", LAM)
def test_the_hypergradient_is_the_exact_one_and_the_first_order_is_not(variant):
    theta = torch.tensor([0.4, -0.3, 0.1], dtype=torch.float64)
    found = {}
    for first in (False, True):
        hook = build({"bilora": {"variant": variant, "first_order": first, "gamma2": 0.0, "epsilon": 1e-3}})
        with ladder(hook) as step:
            with torch.no_grad():
                hook.theta[0].copy_(theta)
                hook.after_step(None, None, 0)
                p = dict(step.hooks.model[0].named_parameters())
                for k in "AB":  # softmax and binary began with P at zero
                    p[f"lora_{k}.default"].copy_(torch.randn(p[f"lora_{k}.default"].shape, generator=torch.Generator().manual_seed(ord(k))) * 0.6)
            slow = Slow(step.hooks.model, variant, 0.1, 0.0, False, 0.05, theta)
            before = {k: t.detach().clone() for k, t in p.items()}
            step.loss(rows(0)).backward()
            hook.before_step(step.hooks.model, step.optimizer, 0)
            assert all(torch.equal(t, before[k]) for k, t in p.items()), "the weights are put back to the bit"
            found[first] = hook.theta[0].grad.flatten()
    exact = slow.upper(rows(0), rows(100), 0.0)
    assert (found[False] - exact).norm() < 3e-6 * exact.norm()
    assert torch.allclose(found[True], slow.upper(rows(0), rows(100), 0.0, second=False), rtol=1e-6)
    assert (found[True] - exact).norm() > 0.01 * exact.norm(), "the second term matters here"


@pytest.mark.parametrize("variant, lower, upper, gamma1, square", [("softmax", 1, 1, 0.1, False), ("real", 2, 1, 0.3, True), ("binary", 2, 3, 0.0, False)])
def test_a_training_written_out(variant, lower, upper, gamma1, square):
    """Six steps of gradient descent: V on D1 in each, θ on D2 after every `lower` of them, `upper` times."""
    lr, seen = 0.05, 0
    hook = build({"bilora": {"variant": variant, "lower": lower, "upper": upper, "gamma1": gamma1, "gamma2": 0.2, "squared": square, "epsilon": 1e-3}})
    with ladder(hook) as step:
        model = step.hooks.model
        gate, slow = gated_of(hook), Slow(model, variant, gamma1, 0.2, square, lr, hook.theta[0].detach().flatten())
        assert torch.allclose(slow.theta, torch.zeros(3).double())
        for t in range(6):
            step.loss(rows(t)).backward()
            step()
            gP, gQ = slow.lower(rows(t))
            for _ in range(upper if (t + 1) % lower == 0 else 0):
                slow.theta = slow.theta - lr * slow.upper(rows(t), rows(100 + seen % 3), (t + 1) / 6)
                seen += 1
            slow.P, slow.Q = slow.P - lr * gP, slow.Q - lr * gQ
            lam = LAM[variant](slow.theta)
            assert torch.allclose(gate.gate.flatten(), lam, atol=1e-7), t
            assert torch.allclose(gate.B, slow.P, atol=1e-7) and torch.allclose(gate.A, slow.Q, atol=1e-7), t
        assert lam.std() > 1e-4, "λ moved"
    assert hook.seen == seen and gate.gate.requires_grad


def gated_of(hook):
    (one,) = hook.of
    return one


def test_each_level_moves_on_its_own_rows_alone():
    """λ moves at the turns of the upper level only, and by D2; P and Q move by D1, whatever D2 is."""
    def go(d2, first=True):
        hook, out = build({"bilora": {"lower": 3, "first_order": first}}), []
        with hooked(net(), torch.optim.SGD, [hook], lr=0.05, held=[d2], loss=squared) as step:
            for t in range(4):
                loss = step.loss(rows(t))
                loss.backward()
                g = gated_of(hook)
                assert g.gate.grad is None and not g.gate.requires_grad
                step()
                out.append([t.detach().clone() for t in (g.gate, g.A, g.B)])
        return out

    x, y = rows(7)
    one, other, nothing = go((x, y)), go((x, -y)), go((x * 0, y))
    for t in range(4):
        assert torch.allclose(one[t][0].sum(), torch.ones(()).double()) and (one[t][0] > 0).all()
        assert torch.equal(one[t][0], one[0][0]) is (t < 2)
        assert torch.equal(nothing[t][0], one[0][0]), "rows on which the adapter does nothing do not move λ"
        for k in (1, 2):
            assert torch.equal(one[t][k], other[t][k]) is (t < 3), "D2 reaches the factors through λ alone"
    assert not torch.equal(one[2][0], other[2][0])


@pytest.mark.parametrize("name, recipe", [("bilora", "adalora"), ("bilora", "sora"), ("bilora", "trilora"), ("autolora", "sora")])
def test_the_start_does_nothing_and_is_not_dead(name, recipe):
    model = lorakit.adapt(tiny.llama(), recipe, r=4)
    hook = build(name)
    with hooked(model, torch.optim.AdamW, [hook], lr=1e-2, total=9, held=[batch_(9)]) as step:
        assert torch.allclose(logits(model), logits(tiny.llama()), atol=1e-6)
        for g in hook.of:
            assert torch.allclose(g.gate, torch.full_like(g.gate, 0.25)) and not g.B.any()
        for k in range(2):
            step.loss(batch_(k)).backward()
            step()
        assert all(g.B.any() and g.gate.std() > 0 for g in hook.of)


def batch_(k):
    return {"input_ids": batch(k), "labels": batch(k)}


def test_a_loss_is_computed_again_with_the_same_dropout():
    model = lorakit.adapt(tiny.llama(), "sora", r=4, lora_dropout=0.5).train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.2 if p.requires_grad else 0)
    losses, values = Losses(), []
    for _ in range(2):
        losses.note(lambda: model(**batch_(3)).loss)
        values.append(float(model(**batch_(3)).loss.detach()))
    state = torch.get_rng_state()
    assert values[0] != values[1]
    for _ in range(2):
        assert [float(again().detach()) for again in losses.now] == values
    assert torch.equal(torch.get_rng_state(), state), "and nothing is drawn from what training draws from"


def test_the_loss_of_a_step_has_what_every_hook_adds():
    """Of one that looks at the model's answer, too."""
    model = lorakit.adapt(tiny.llama(), "sora", r=4).train()
    with hooked(model, torch.optim.AdamW, [build({"sora": {"l1": 0.5}}), build({"hidden_key": {"p": 0.0, "kl": 0.3}})]) as step:
        loss, answer = step.loss(batch_(0), 0.25), model(**batch_(0))
        assert torch.allclose(loss, 0.25 * (answer.loss + step.extra_loss(answer)), atol=1e-6) and loss.item() > 0.25 * answer.loss.item() + 0.01


# Whose rows are whose


def test_rows_are_parted_by_the_seed():
    train, apart = parted(50, 0.3, 4)
    assert len(apart) == 15 and sorted(train + apart) == list(range(50)) and (train, apart) == parted(50, 0.3, 4)
    assert apart != parted(50, 0.3, 5)[1]
    assert [len(p) for p in parted(2, 0.01, 0)] == [1, 1] == [len(p) for p in parted(2, 0.99, 0)]
    seen = [batch_of(7, 3, k, 0) for k in range(6)]
    assert [len(b) for b in seen] == [3, 3, 1, 3, 3, 1]
    assert all(sorted(n for b in epoch for n in b) == list(range(7)) for epoch in (seen[:3], seen[3:])) and seen[:3] != seen[3:]
    with pytest.raises(LorakitError, match="needs two at least"):
        parted(1, 0.5, 0)


class Watched(AdapterTrainer):
    """Notes which rows the model saw, of the lower level and of the upper."""

    def __init__(self, *a, **kw):
        self.rows, self.apart = [], []
        super().__init__(*a, **kw)
        loss = self._every.losses.apart
        self._every.losses.apart = lambda k: self._upper(loss, k)

    def _upper(self, loss, k):
        self.looking = self.apart
        out = loss(k)
        del self.looking
        return out

    def training_step(self, model, inputs, *args, **kw):
        self.rows += inputs["input_ids"].tolist()
        return super().training_step(model, inputs, *args, **kw)

    def note(self, module, args, kwargs):
        if hasattr(self, "looking"):
            self.looking += kwargs["input_ids"].tolist()
        else:
            self.all.append(kwargs["input_ids"].tolist())


def test_the_trainer_keeps_the_rows_apart_and_leaves_the_held_out_ones_alone(tmp_path):
    eval_rows = [{k: (v + 1) % 48 for k, v in r.items()} for r in ROWS[:4]]
    trainer = Watched(model=lorakit.adapt(tiny.llama(), "adalora", r=3), args=arguments(tmp_path, max_steps=12, save_strategy="no"), train_dataset=ROWS,
                      eval_dataset=eval_rows, hooks=[build({"bilora": {"seed": 3}})])
    trainer.all = []
    trainer.model.register_forward_pre_hook(trainer.note, with_kwargs=True)
    trainer.train()
    key = {tuple(r["input_ids"].tolist()): n for n, r in enumerate(ROWS)}
    lower, upper = ({key[tuple(r)] for r in rows} for rows in (trainer.rows, trainer.apart))
    d1, d2 = parted(len(ROWS), 0.2, 3)
    assert lower == set(d1) and upper == set(d2), "all of each were seen and none of the other's"
    again = {key[tuple(r)] for b in trainer.all for r in b}
    assert again == set(d1), "passes once more are on the lower level's rows"


def test_a_loop_equals_the_trainer(tmp_path):
    """With two micro-batches in a step and dropout off: the same rows, the same two levels."""
    hooks = lambda: [build({"autolora": {"lr": 0.05, "held": 0.25, "seed": 1}})]  # noqa: E731
    kw = {"max_steps": 4, "lr_scheduler_type": "constant", "max_grad_norm": 0.5, "save_strategy": "no"}

    def trainer():
        return AdapterTrainer(model=lorakit.adapt(tiny.llama(), "sora", r=4), args=arguments(tmp_path, **kw), train_dataset=ROWS, hooks=hooks())

    order = [{k: v.clone() for k, v in b.items()} for it in [iter(trainer().get_train_dataloader())] for b in [next(it) for _ in range(6)]]
    real = trainer()
    real.train()
    d2 = [ROWS[n] for n in parted(24, 0.25, 1)[1]]
    held = [{k: torch.stack([d2[n][k] for n in batch_of(6, 3, at, 1)]) for k in ("input_ids", "labels")} for at in range(4)]
    model = lorakit.adapt(tiny.llama(), "sora", r=4).train()
    with hooked(model, torch.optim.AdamW, hooks(), lr=1e-2, max_grad_norm=0.5, total=4, held=held) as step:
        for t in range(3):
            for b in order[2 * t : 2 * t + 2]:
                step.loss(b, 0.5).backward()
            step()
        seen = [t.detach().clone() for t in step.hooks.hooks[0].theta]
    short = trainer()
    short.args.max_steps = 3
    short.train()
    for a, b in zip(seen, short.hooks[0].theta, strict=True):
        assert torch.allclose(a, b, atol=1e-5) and a.std() > 1e-3
    assert not torch.allclose(real.hooks[0].theta[0], seen[0], atol=1e-4), "and a fourth step is another"


def test_two_runs_are_one(tmp_path):
    def go(out):
        model = lorakit.adapt(tiny.llama(), "adalora", r=4, lora_dropout=0.2)
        trainer = AdapterTrainer(model=model, args=arguments(tmp_path / out, max_steps=2, save_strategy="no"), train_dataset=ROWS,
                                 hooks=[build("bilora")])
        trainer.train()
        return trainer

    a, b = go("a"), go("b")
    same_state(a, b)
    assert all(torch.equal(x, y) for x, y in zip(a.hooks[0].theta, b.hooks[0].theta, strict=True))


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_under_trls_trainers(kind, base, tmp_path):  # noqa: F811 (a fixture)
    """Each level has that trainer's own loss."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    lines = TEXT.splitlines()[:20]
    data = {"sft": [{"prompt": a[:20], "completion": a[20:]} for a in lines],
            "dpo": [{"prompt": a[:12], "chosen": a[12:], "rejected": a[12:][::-1]} for a in lines]}[kind]
    cls, made = {"sft": (trl.SFTTrainer, trl.SFTConfig), "dpo": (trl.DPOTrainer, trl.DPOConfig)}[kind]
    args = made(str(tmp_path), max_steps=3, per_device_train_batch_size=4, save_strategy="no", report_to="none", learning_rate=1e-2, disable_tqdm=True,
                use_cpu=True, bf16=False, max_length=48, gradient_checkpointing=False)
    model = lorakit.adapt(load_base(str(base)), "adalora", r=3)
    more = {"ref_model": load_base(str(base))} if kind == "dpo" else {}
    trainer = type("Trainer", (AdapterTrainerMixin, cls), {})(model=model, args=args, train_dataset=Dataset.from_list(data), **more,
                                                              processing_class=load_tokenizer(base), hooks=[build("bilora")])
    assert len(trainer.train_dataset) == 16
    trainer.train()
    hook = trainer.hooks[0]
    assert hook.seen == 3 and all(g.gate.std() > 0 and g.B.any() for g in hook.of)


# AutoLoRA's ranks


def test_ranks_are_the_components_of_at_least_an_equal_share():
    model = lorakit.adapt(tiny.llama(), "sora", r=4)
    hook = build("autolora")
    with hooked(model, torch.optim.AdamW, [hook], total=3, held=[batch_(0)]):
        assert set(hook.ranks().values()) == {4}, "equal weights keep every component"
        with torch.no_grad():
            for n, theta in enumerate(hook.theta):
                theta.copy_(torch.tensor([[3.0, -1, -1, -1], [0, 0, 0, 1e-9], [2, 2, 0, 0]][n % 3]))
        hook.after_step(model, None, 0)
        assert list(hook.ranks().values())[:3] == [1, 4, 2]
        whole = [g.gate.clone() for g in hook.of]
        hook.on_interval(model, None, None, 2)
        assert all(torch.equal(a, g.gate) for a, g in zip(whole, hook.of, strict=True)), "nothing closes before the end"
        hook.on_interval(model, None, None, 3)
        for a, g in zip(whole, hook.of, strict=True):
            slow = [float(v) if float(v) >= 0.25 - 1e-6 else 0.0 for v in a.flatten()]
            assert g.gate.flatten().tolist() == slow
        assert list(hook.ranks().values())[:3] == [1, 4, 2], "the same afterwards"


def test_a_search_is_saved_as_lora_of_its_ranks_and_trained_anew(tmp_path):
    model = lorakit.adapt(tiny.llama(), "sora", r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "up_proj"])
    hooks = [build({"autolora": {"lr": 0.1}})]
    trainer = AdapterTrainer(model=model, args=arguments(tmp_path / "t", max_steps=6, save_steps=4), train_dataset=ROWS, hooks=hooks)
    trainer.train()
    ranks = trainer.hooks[0].ranks()
    assert len(set(ranks.values())) > 1 and all(1 <= r <= 4 for r in ranks.values())
    lorakit.save(model, tmp_path / "found")
    saved = json.loads((tmp_path / "found" / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA" and saved["rank_pattern"]
    again = lorakit.load(tiny.llama(), tmp_path / "found")
    assert {p: s.methods["default"].core.r for p, s in lorakit.host.slots(again).items()} == ranks
    assert torch.allclose(logits(again), logits(model.eval()), atol=1e-5)
    unfinished = lorakit.load(tiny.llama(), tmp_path / "t" / "checkpoint-4", trainable=True)
    assert all(g.gate.gt(0).all() for g in gated(unfinished, "test")), "a checkpoint on the way has every component"
    spec = retrained(model)
    second = lorakit.adapt(tiny.llama(), spec)
    slots = lorakit.host.slots(second)
    assert {p: s.methods["default"].r for p, s in slots.items()} == ranks and spec.method.alpha == 8 and spec.dropout == 0.1
    assert all(not s.parameters("default")["B"].any() for s in slots.values()), "from the start"
    with pytest.raises(LorakitError, match="no adapter here has a trained gate"):
        retrained(second)


def test_training_goes_on_where_it_stood():
    model = lorakit.adapt(tiny.llama(), "adalora", r=3)
    for _ in range(2):
        hook = build({"bilora": {"lr": 0.1}})
        before = [s.parameters("default")["E"].detach().clone() for s in lorakit.host.slots(model).values()]
        with hooked(model, torch.optim.AdamW, [hook], lr=1e-2, held=[batch_(9)]) as step:
            if hook.of[0].B.any():
                assert all(torch.allclose(a, g.gate, atol=1e-6) for a, g in zip(before, hook.of, strict=True))
                assert hook.of[0].gate.std() > 0
            step.loss(batch_(0)).backward()
            step()


def test_stacks_of_experts_have_weights_for_each_matrix(tmp_path):
    model = lorakit.adapt(tiny.mixtral(), "sora", r=3, target_parameters="experts").train()
    hook = build({"autolora": {"lr": 0.2}})
    with hooked(model, torch.optim.AdamW, [hook], lr=1e-2, total=2, held=[batch_(9)]) as step:
        for k in range(2):
            step.loss(batch_(k)).backward()
            step()
            if k == 0:
                for g in hook.of:
                    assert g.many == 4 and torch.allclose(g.flat(g.gate).sum(-1), torch.ones(4), atol=1e-6)
    assert all(1 <= rank(g) <= 3 for g in hook.of)
    lorakit.save(model.eval(), tmp_path / "a")
    assert torch.allclose(logits(lorakit.load(tiny.mixtral(), tmp_path / "a")), logits(model), atol=1e-5)


def test_embeddings_and_convolutions():
    model = lorakit.adapt(Odd(), "sora", r=3, target_modules=["table", "conv"]).train()
    hook, x = build("bilora"), torch.arange(12).view(2, 6) % 9
    with hooked(model, torch.optim.AdamW, [hook], lr=1e-2, held=[x], loss=lambda m, b: m(b).square().mean()) as step:
        for _ in range(2):
            step.loss(x).backward()
            step()
    assert len(hook.of) == 2 and all(g.gate.std() > 0 for g in hook.of)


# What is refused, and a run from a file


@pytest.mark.parametrize("options, what", [
    ({"held": 0.0}, "held is above 0"), ({"held": 1.0}, "held is above 0"), ({"lower": 0}, "at least 1"), ({"upper": 0}, "at least 1"),
    ({"epsilon": 0.0}, "epsilon above 0"), ({"variant": "soft"}, "unknown variant `soft`; did you mean `softmax`"), ({"lr": -1.0}, "lr at least 0"),
])
def test_wrong_options_are_refused(options, what):
    with pytest.raises(LorakitError, match=what):
        build({"bilora": options})


def test_what_cannot_be_is_refused(tmp_path):
    adapted = lambda: lorakit.adapt(tiny.llama(), "adalora", r=3)  # noqa: E731

    def go(*hooks, model=None, held=(1,), **kw):
        with hooked(model or adapted(), torch.optim.AdamW, list(hooks), held=[batch_(k) for k in held], **kw) as step:
            x = batch(0)
            step.hooks.model.train()(input_ids=x, labels=x).loss.backward()
            step()

    with pytest.raises(LorakitError, match=r"bilora: it learns on rows kept out of training, and was given none; mend: hooked\(…, held=batches\)"):
        go(build("bilora"), held=())
    with pytest.raises(LorakitError, match=r"needs this step's loss once more; mend: step.loss\(batch\)"):
        go(build("bilora"))
    go(build({"bilora": {"first_order": True}}))
    with pytest.raises(LorakitError, match="bilora and autolora both have a say"):
        go(build("bilora"), build("autolora"))
    with pytest.raises(LorakitError, match="bilora and pcgrad both have a say"):
        go(build("bilora"), build("pcgrad"))
    with pytest.raises(LorakitError, match="no adapter here has a trained gate"):
        go(build("bilora"), model=lorakit.adapt(tiny.llama(), "lora", r=2))
    with pytest.raises(LorakitError, match="autolora: its schedule needs to know how many steps"):
        go(build("autolora"))
    with pytest.raises(LorakitError, match="bilora: its schedule needs to know how many steps"):
        go(build({"bilora": {"variant": "binary"}}))
    model = adapted()
    with torch.no_grad():
        for g in gated(model, "test"):
            g.gate.fill_(0.9)
    with pytest.raises(LorakitError, match="q_proj has trained, and its gates are no softmax of anything"):
        go(build("bilora"), model=model)
    go(build({"bilora": {"variant": "real", "first_order": True}}), model=model)
    stream = iter(ROWS)
    with pytest.raises(LorakitError, match="bilora: it keeps 0.2 of the training rows apart, and these are a stream"):
        AdapterTrainer(model=adapted(), args=arguments(tmp_path), train_dataset=stream, hooks=[build("bilora")])


@pytest.mark.parametrize("name, method", [("bilora", "adalora"), ("autolora", "sora")])
def test_a_run_from_a_file(name, method, base, tmp_path):  # noqa: F811 (a fixture)
    from lorakit.training import run as r

    run = config(base, tmp_path, hooks=[{name: {"lr": 0.05}}], adapter={"method": method, "r": 4, "alpha": 32})
    said = []
    rec = r.train(run, say=said.append)
    assert rec["verify"]["ok"], rec["verify"]
    assert rec["metrics"]["after"]["eval_loss"] < rec["metrics"]["before"]["eval_loss"] - 0.1
    if name == "autolora":
        saved = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
        assert saved["peft_type"] == "LORA" and saved["rank_pattern"]
        again = config(base, tmp_path, adapter={k: saved[k] for k in ("r", "lora_alpha", "rank_pattern")} | {"method": "lora"}).spec()
        ranks = [{p: s.methods["default"].r for p, s in lorakit.host.slots(m).items()} for m in (
            lorakit.load(load_base(str(base)), tmp_path / "run" / "adapter"), lorakit.adapt(load_base(str(base)), again))]
        assert ranks[0] == ranks[1], "the second run from a file has the ranks that the first found"
        assert any(line.startswith(f"autolora: ranks from {min(ranks[0].values())} to {max(ranks[0].values())}, ") for line in said)
    else:
        assert any("after 12 steps on the 20% of the rows kept apart" in line for line in said)
