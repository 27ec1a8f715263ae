"""Mixed batches as one product, and many adapters trained at once: the same as one after the other."""

import copy

import pytest
import tiny
import torch

import lorakit
from lorakit import host
from lorakit.errors import LorakitError
from lorakit.kernels.segments import layout, segmented, segmented_slow, stacked
from lorakit.maps import Grouped, PerRow
from lorakit.training.together import together

MIXES = {"groups": [0, 0, 1, 1, 2, 2], "unsorted groups": [2, 0, 1, 2, 1, 0], "each its own": [3, 2, 1, 0], "some none": [0, -1, 2, -1, 0, 1],
         "uneven": [0, 0, 0, 1, 3, 3], "none": [-1, -1], "one": [2, 2, 2], "not here": [1, 3, 3, 0]}


@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (0.5, 0.5, 0.5), (1.0, 2.0, 0.25)])
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("mix", MIXES)
def test_the_segmented_product_is_the_row_by_row_one(mix, tokens, scales):
    g = torch.Generator().manual_seed(0)
    given = [(torch.randn(7, r, generator=g).double(), torch.randn(r, 5, generator=g).double(), s) for r, s in zip((2, 1, 4), scales, strict=True)]
    pairs = [(B * s, A) for B, A, s in given] + [None]
    index = torch.tensor(MIXES[mix])
    x = torch.randn(len(index), tokens, 5, generator=g).double().requires_grad_(True)
    at = layout(index, [p is not None for p in pairs], x.device)
    slow = segmented_slow(x, index, pairs, 7)
    if not at.kinds:
        assert not slow.any()
        return
    B, A = stacked([given[k] for k in at.kinds], x.dtype)
    fast = segmented(x, at, B, A)
    assert torch.allclose(fast, slow.detach(), atol=1e-12)
    probe = torch.randn(fast.shape, generator=g).double()
    want = torch.cat([p[None] @ (pairs[k][0] @ pairs[k][1]) if k >= 0 and pairs[k] else torch.zeros(1, tokens, 5).double()
                      for p, k in zip(probe, index.tolist(), strict=True)])
    assert torch.allclose(torch.autograd.grad((fast * probe).sum(), x)[0], want, atol=1e-12)


def many(k: int = 4, base=None, **options):
    model = base or tiny.llama()
    for n in range(k):
        lorakit.adapt(model, ("lora", "vera", "rslora", "adalora")[n % 4], name=f"a{n}", r=2 + n, seed=n, **options)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and ("lora" in name or "vera" in name):
                p.add_(torch.randn_like(p) * 0.1)
    return model


def calls_of(model, names):
    with lorakit.rows(model, names):
        return {type(s.call()) for s in host.slots(model).values()}


def test_thin_products_go_as_one_and_others_one_by_one():
    names = ["a0", "a1", "a2", None]
    assert calls_of(many(3), names) == {Grouped}
    model = many(2)
    lorakit.adapt(model, "dora", name="a2", r=2)
    assert calls_of(model, names) == {PerRow}


def test_without_gradients_a_change_of_a_leaf_is_seen_at_once():
    model, ids = many(3), tiny.ids(3, 6)
    with lorakit.rows(model, ["a0", "a1", "a2"]), torch.no_grad():
        before, again = model(ids).logits, model(ids).logits
        next(iter(host.slots(model, "a0").values())).params("a0")["B"].mul_(3)
        after = model(ids).logits
    assert torch.equal(before, again) and not torch.equal(before[0], after[0]) and torch.equal(before[1:], after[1:])


def test_unequal_dropout_goes_one_by_one_while_training_and_together_after():
    model = tiny.llama()
    lorakit.adapt(model, "lora", name="a0", lora_dropout=0.5)
    lorakit.adapt(model, "lora", name="a1")
    model.train()
    assert calls_of(model, ["a0", "a1"]) == {PerRow}
    model.eval()
    assert calls_of(model, ["a0", "a1"]) == {Grouped}


def batches(seed: int, rows: int = 2, length: int = 9, n: int = 3):
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(n):
        ids = torch.randint(3, 30, (rows, length), generator=g)
        labels = ids.clone()
        labels[:, :2] = -100
        out.append({"input_ids": ids, "labels": labels})
    return out


@pytest.mark.parametrize("quantised", [False, True])
def test_trained_together_is_trained_alone(quantised):
    base = lorakit.quantize(tiny.llama(), "nf4") if quantised else tiny.llama()
    model = many(4, base)
    data = {f"a{k}": batches(k, rows=1 + k % 2, length=7 + k) for k in range(4)}
    rates = {f"a{k}": 1e-2 / (k + 1) for k in range(4)}
    alone, apart = copy.deepcopy(model), {}
    for name in data:
        apart |= together(alone, {name: data[name]}, steps=6, learning_rate={name: rates[name]})
    at_once = together(model, data, steps=6, learning_rate=rates)
    for name in data:
        assert at_once[name] == pytest.approx(apart[name], rel=1e-4) and sum(at_once[name][3:]) < sum(at_once[name][:3])
        for a, b in zip(host.slots(model, name).values(), host.slots(alone, name).values(), strict=True):
            for k, t in a.params(name).items():
                assert torch.allclose(t, b.params(name)[k], atol=2e-4), (name, a.path, k)


def test_checkpoints_are_computed_again_with_the_rows_they_had():
    model, again = many(3), many(3)
    again.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    data = {f"a{k}": batches(k) for k in range(3)}
    plain, less = (together(m, data, steps=4, learning_rate=1e-2) for m in (model, again))
    assert all(less[n] == pytest.approx(plain[n], rel=1e-5) for n in data)


def test_one_alone_is_a_plain_loop():
    model = many(1)
    plain, data = copy.deepcopy(model), batches(3)
    told = together(model, {"a0": data}, steps=4, learning_rate=1e-2, schedule="constant")
    opt = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    plain.train()
    for k in range(4):
        loss = plain(**data[k % 3]).loss
        assert told["a0"][k] == pytest.approx(float(loss.detach()), rel=1e-4)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        opt.step()
    assert all(p.grad is None and p.untyped_storage().nbytes() == p.nbytes for p in model.parameters() if p.requires_grad)


def test_bad_input_says_what_and_changes_nothing():
    model = many(2)
    was = {k: t.clone() for k, t in model.state_dict().items()}
    for kw, why in (({"batches": {"a7": batches(0)}}, "known are a0, a1"), ({"batches": {"a0": []}}, "`a0` has no batch"),
                    ({"batches": {"a0": batches(0)}, "learning_rate": {"a1": 1.0}}, "no learning rate"),
                    ({"batches": {"a0": batches(0)}, "schedule": "linera"}, "did you mean `linear`")):
        with pytest.raises(LorakitError, match=why):
            together(model, kw.pop("batches"), steps=2, **kw)
    lorakit.freeze(model, "a1")
    with pytest.raises(LorakitError, match="nothing of adapter `a1` trains"):
        together(model, {"a1": batches(0)}, steps=1)
    assert all(torch.equal(t, was[k]) for k, t in model.state_dict().items())


@pytest.mark.parametrize("method", ["prompt-tuning", "p-tuning", "prefix-tuning"])
def test_learnt_tokens_train_as_alone_or_are_refused(method):
    """What the last of them predicts counts in a run of its own: the text's first token, where that has a label."""
    model, quiet = lorakit.adapt(tiny.llama(), method, num_virtual_tokens=3, name="p"), batches(3)
    data = [{**b, "labels": b["input_ids"]} for b in quiet]
    alone = [float(copy.deepcopy(model).train()(**b).loss) for b in (data[0], quiet[0])]
    assert together(copy.deepcopy(model), {"p": quiet}, steps=1)["p"][0] == pytest.approx(alone[1], rel=1e-5)
    if method == "prefix-tuning":
        assert together(model, {"p": data}, steps=1)["p"][0] == pytest.approx(alone[0], rel=1e-5)
    else:
        with pytest.raises(LorakitError, match="learnt token of `p` would predict a text's first one"):
            together(model, {"p": data}, steps=1)


def test_a_loss_of_its_own_is_refused():
    model = lorakit.adapt(tiny.llama(), "cpt", token_ids=[5, 6, 7, 8], types=[1, 2, 3, 4], name="c")
    with pytest.raises(LorakitError, match=r"`c` has a loss of its own \(cpt\)"):
        together(model, {"c": batches(3)}, steps=1)
