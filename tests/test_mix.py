"""`lorakit.mix` and `lorakit mix`: saved adapters and adapters on a model made one; what is written, what is refused."""

from __future__ import annotations

import errno
import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import lorakit
from lorakit import host
from lorakit.errors import LorakitError
from lorakit.formats.folder import Folder

TARGETS = ["q_proj", "down_proj"]


@torch.no_grad()
def saved(path, recipe="lora", seed=1, base=tiny.llama, **kw):
    kw = {"target_modules": TARGETS} | ({"r": 3} if "r" not in kw and "block_size" not in kw else {}) | kw
    model = lorakit.adapt(base(), recipe, **kw).eval()
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(torch.randn(p.shape, generator=g) * 0.3)
    lorakit.save(model, path)
    return path


def together(paths, weights, base=tiny.llama):
    """The logits of several adapters in effect on one model, weighted."""
    model = base()
    for n, p in enumerate(paths):
        lorakit.load(model, p, f"a{n}")
    lorakit.activate(model, *(f"a{n}" for n in range(len(paths))), weights=weights)
    return tiny.logits(model)


def deltas(path, base=tiny.llama):
    """Target -> what a saved adapter adds to its weight, from the merged model."""
    model = lorakit.load(base(), path)
    paths = [p for p, s in host.slots(model, "default").items() if not s.tied]
    new, old = lorakit.merged(model), base()
    return {p: (new.get_submodule(p).weight - old.get_submodule(p).weight).detach() for p in paths}


# What it computes


@pytest.mark.parametrize("with_base", [False, True])
def test_a_sum_is_both_adapters_weighted_together(tmp_path, with_base):
    """Of different ranks, scales and targets, one weight negative."""
    a = saved(tmp_path / "a", r=2, lora_alpha=3)
    b = saved(tmp_path / "b", "rslora", seed=2, r=5, target_modules=["q_proj", "gate_proj"])
    done = lorakit.mix([a, b], tmp_path / "c", weights=[0.6, -0.4], base=tiny.llama() if with_base else None)
    assert done.error < 1e-6 and bool(done.verified) == with_base
    assert {p.rpartition(".")[2]: r for p, r in done.ranks.items()} == {"q_proj": 7, "down_proj": 2, "gate_proj": 5}
    now = tiny.logits(lorakit.load(tiny.llama(), tmp_path / "c"))
    assert torch.allclose(now, together([a, b], [0.6, -0.4]), atol=1e-5) and not torch.allclose(now, tiny.logits(tiny.llama()), atol=1e-3)
    assert lorakit.verify(tmp_path / "c", tiny.llama()).ok
    config = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"


def test_peft_reads_what_was_mixed(tmp_path):
    peft = pytest.importorskip("peft")
    a, b = saved(tmp_path / "a", r=2), saved(tmp_path / "b", seed=2, r=4, target_modules=["q_proj", "embed_tokens"])
    lorakit.mix([a, b], tmp_path / "c", weights=[1.0, 0.5])
    theirs = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "c").eval()
    assert torch.allclose(tiny.logits(theirs), together([a, b], [1.0, 0.5]), atol=1e-5)


@pytest.mark.parametrize("recipe, kw, needs", [
    ("dora", {}, True), ("loha", {}, False), ("oft", {"block_size": 4}, True), ("vera", {}, True), ("full", {"r": None}, True)])
def test_another_method_goes_by_what_it_adds(tmp_path, recipe, kw, needs):
    a = saved(tmp_path / "a", r=2)
    b = saved(tmp_path / "b", recipe, seed=2, **kw)
    if needs:
        with pytest.raises(LorakitError, match="the base is needed to mix or compare it; mend: base=, or --base"):
            lorakit.mix([a, b], tmp_path / "c", "linear", rank=16)
        assert not (tmp_path / "c").exists()
    done = lorakit.mix([a, b], tmp_path / "c", "linear", rank=16, base=tiny.llama() if needs else None)
    assert done.error < 1e-3
    want, first = deltas(b), deltas(a)
    for p, t in deltas(tmp_path / "c").items():
        assert torch.allclose(t, first[p] + want[p], atol=1e-4), p
    few = lorakit.mix([a, b], tmp_path / "d", "linear", rank=2, base=tiny.llama() if needs else None)
    mixed = deltas(tmp_path / "d")
    left = sum(float((mixed[p] - first[p] - want[p]).square().sum()) for p in mixed)
    whole = sum(float((first[p] + want[p]).square().sum()) for p in mixed)
    assert few.error == pytest.approx((left / whole) ** 0.5, abs=1e-3) and few.error > 0.01
    assert json.loads((tmp_path / "d" / "receipt.json").read_text())["mix"]["error"] == few.error


@pytest.mark.parametrize("base, targets", [(tiny.gpt2, ["c_attn", "wte"]), (tiny.llama, ["embed_tokens", "o_proj"]), (tiny.opt, ["q_proj", "fc1"])])
@pytest.mark.parametrize("with_base", [False, True])
def test_on_other_layers(tmp_path, base, targets, with_base):
    a, b = (saved(tmp_path / n, seed=k, base=base, target_modules=targets, r=2 + k) for k, n in enumerate("ab"))
    lorakit.mix([a, b], tmp_path / "c", weights=[1.0, -0.5], base=base() if with_base else None)
    assert torch.allclose(tiny.logits(lorakit.load(base(), tmp_path / "c")), together([a, b], [1.0, -0.5], base), atol=1e-4)


def test_a_convolution_keeps_its_kernel(tmp_path):
    def net():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 16, 5)).eval()

    x = torch.randn(2, 3, 6, 6)
    a, b = (saved(tmp_path / n, seed=k, base=net, target_modules=["0", "2"], r=2) for k, n in enumerate("ab"))
    for name, base in (("c", None), ("d", net())):
        lorakit.mix([a, b], tmp_path / name, weights=[0.5, 2.0], base=base)
        model = net()
        for n, p in enumerate((a, b)):
            lorakit.load(model, p, f"a{n}")
        want = lorakit.activate(model, "a0", "a1", weights=[0.5, 2.0])(x)
        assert torch.allclose(lorakit.load(net(), tmp_path / name)(x), want, atol=1e-4)


def test_experts_need_the_base_and_are_mixed_on_it(tmp_path):
    kw = {"base": tiny.mixtral, "target_modules": [], "target_parameters": ["experts.down_proj"]}
    a, b = (saved(tmp_path / n, seed=k, r=2, **kw) for k, n in enumerate("ab"))
    with pytest.raises(LorakitError, match="parameters that are read, not called, so that the base is needed"):
        lorakit.mix([a, b], tmp_path / "c")
    for rule, options in (("linear", {}), ("ties", {"density": 1.0, "rank": 16}), ("knots", {"density": 1.0})):
        lorakit.mix([a, a], tmp_path / rule, rule, weights=[0.5, 0.5], base=tiny.mixtral(), **options)
    want = tiny.logits(lorakit.load(tiny.mixtral(), a))
    for rule in ("linear", "ties", "knots"):  # the mean of a thing and itself
        assert torch.allclose(tiny.logits(lorakit.load(tiny.mixtral(), tmp_path / rule)), want, atol=1e-4), rule


def test_a_head_that_is_trained_whole_is_the_weighted_mean(tmp_path):
    a, b = (saved(tmp_path / n, seed=k, base=tiny.bert, target_modules=["query"]) for k, n in enumerate("ab"))
    with pytest.raises(LorakitError, match="classifier: what full adds depends on the weight, so that the base is needed"):
        lorakit.mix([a, b], tmp_path / "c")
    done = lorakit.mix([a, b], tmp_path / "c", "ties", weights=[3.0, 1.0], rank=16, density=1.0, base=tiny.bert())
    assert done.notes == ["classifier: trained whole, so the weighted mean of its copies"] and "classifier" not in done.modules
    heads = [lorakit.merged(lorakit.load(tiny.bert(), p)).classifier for p in (a, b, tmp_path / "c")]
    for k in ("weight", "bias"):
        x, y, z = (getattr(h, k) for h in heads)
        assert torch.allclose(z, 0.75 * x + 0.25 * y, atol=1e-6)
    with pytest.raises(LorakitError, match="classifier: trained whole, and the weights of its copies sum to 0"):
        lorakit.mix([a, b], tmp_path / "d", weights=[1.0, -1.0], base=tiny.bert())
    other = saved(tmp_path / "other", base=lambda: tiny.bert(num_labels=5), target_modules=["query"])
    with pytest.raises(LorakitError, match="classifier.*has shape"):
        lorakit.mix([a, other], tmp_path / "d", base=tiny.bert())
    assert not (tmp_path / "d").exists()


def test_ties_over_folders_is_ties_of_the_updates(tmp_path):
    from lorakit.merges import ROWS
    from lorakit.merges.base import At, Vector, build

    a, b = saved(tmp_path / "a", r=2), saved(tmp_path / "b", seed=2, r=4)
    done = lorakit.mix([a, b], tmp_path / "c", "ties", density=0.3, rank=16)
    A, B, C = (deltas(tmp_path / n) for n in "abc")
    for p in A:
        want = build("ties", ROWS, {"density": 0.3}).merge([Vector(matrix=A[p]), Vector(matrix=B[p])], (1.0, 1.0), At(p)).dense()
        assert torch.allclose(C[p], want, atol=1e-4)
    assert set(done.ranks.values()) == {16} and done.error < 1e-5
    assert set(lorakit.mix([a, b], tmp_path / "d", "ties", density=0.3).ranks.values()) == {4}  # the larger of the two, with an error
    knots = lorakit.mix([a, b], tmp_path / "k", "knots", density=0.3)
    assert set(knots.ranks.values()) == {6} and knots.error == 0  # that one stays in the factors
    every = torch.cat([t.abs().reshape(-1) for t in A.values()]).sort(descending=True).values
    lorakit.mix([a], tmp_path / "e", "magnitude-prune", density=0.3, scope="global", rank=16)
    cut = every[int(0.3 * len(every)) - 1]
    E = deltas(tmp_path / "e")
    assert all(torch.allclose(E[p], t * (t.abs() >= cut), atol=1e-4) for p, t in A.items())


def test_what_is_drawn_depends_on_the_seed_alone(tmp_path):
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", seed=2)
    for name, seed in (("c", 0), ("d", 0), ("e", 1)):
        torch.manual_seed(ord(name))  # torch's own numbers are not looked at
        lorakit.mix([a, b], tmp_path / name, "dare-ties", density=0.5, seed=seed)
    C, D, E = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "cde")
    assert all(torch.equal(C[k], D[k]) for k in C) and any(not torch.equal(C[k], E[k]) for k in C)


def test_adapters_on_a_model_become_a_new_one_beside_them(tmp_path):
    model = tiny.llama()
    for k, n in enumerate("ab"):
        lorakit.load(model, saved(tmp_path / n, seed=k, r=2 + k), n)
    done = lorakit.mix(["a", "b"], "c", weights=[0.5, 1.0], model=model)
    assert list(lorakit.adapters(model)) == ["a", "b", "c"] and list(lorakit.active(model)) == ["b"] and done.error == 0
    want = tiny.logits(lorakit.activate(model, "a", "b", weights=[0.5, 1.0]))
    assert torch.allclose(tiny.logits(lorakit.activate(model, "c")), want, atol=1e-5)
    with pytest.raises(LorakitError, match="the model has an adapter `c` already"):
        lorakit.mix(["a", "b"], "c", model=model)


# What it says


def test_the_report_and_the_lineage(tmp_path):
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", seed=2)
    done = lorakit.mix([a, b], tmp_path / "c", weights=[1.0, 0.5])
    A, B = deltas(a), deltas(b)
    for p, row in done.modules.items():
        x, y = A[p].double(), B[p].double() * 0.5
        assert row["cosine"] == pytest.approx(float((x * y).sum() / (x.norm() * y.norm())), abs=1e-4)
        assert row["sign_agreement"] == pytest.approx(float((x.sign() == y.sign()).double().mean()), abs=0.01)
        against = torch.minimum(x.abs(), y.abs())[x.sign() != y.sign()].sum()
        assert row["interference"] == pytest.approx(float(against / (x.abs().sum() + y.abs().sum())), abs=1e-3)
        assert row["norm_kept"] == pytest.approx(1.0, abs=1e-4)
        assert row["present"][0] == pytest.approx(1 + float((x * y).sum() / x.square().sum()), abs=1e-3)
    made = Folder(tmp_path / "c")
    steps = made.receipt["lineage"]
    assert [(s["stage"], s["weight"], s["files"]) for s in steps] == [("mix", w, Folder(f).receipt["files"]) for f, w in ((a, 1.0), (b, 0.5))]
    assert json.loads((tmp_path / "c" / "mix.json").read_text())["modules"].keys() == done.modules.keys()
    assert (tmp_path / "c" / "mix.png").read_bytes()[:4] == b"\x89PNG"
    again = lorakit.mix([tmp_path / "c", a], tmp_path / "d")  # a mix is an adapter like any other
    assert again.error == 0 and lorakit.verify(tmp_path / "d", tiny.llama()).ok


def test_the_verb(tmp_path, call):
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", seed=2)
    tiny.llama().save_pretrained(tmp_path / "base")
    code, out, err = call("mix", a, b, "--rule", "ties", "--density", 0.3, "--weights", 0.6, 0.4, "-o", tmp_path / "c", "--base", tmp_path / "base")
    assert code == 0 and "+0.6 ×" in out and "+0.4 ×" in out and "verified on the base" in out and "left out by the rank" in out, (out, err)
    code, out, err = call("mix", a, b, "--rule", "dare-linear", "--set", "density=0.5", "--weights", "1,-0.5", "-o", tmp_path / "d", "--json")
    assert code == 0 and json.loads(out)["weights"] == [1.0, -0.5] and json.loads(out)["options"]["density"] == 0.5, err
    e = tmp_path / "e"
    (tmp_path / "mix.yaml").write_text(f"adapters: [{a}, {b}]\nrule: knots\nweights: [0.6, 0.4]\noutput: {e}\nrank: 2\noptions: {{density: 0.5}}\n")
    code, out, err = call("mix", tmp_path / "mix.yaml")
    assert code == 0 and (tmp_path / "e" / "receipt.json").is_file(), err
    (tmp_path / "bad.yaml").write_text(f"adapters: [{a}, {b}]\nruel: knots\n")
    code, _, err = call("mix", tmp_path / "bad.yaml", "-o", tmp_path / "f")
    assert code == 1 and "ruel" in err and "did you mean `rule`" in err
    code, _, err = call("mix", "-o", tmp_path / "f", "--base", tmp_path / "base")
    assert code == 1 and "there is no adapter to mix" in err
    code, _, err = call("mix", a, b, "--weights", "0.6,x", "-o", tmp_path / "f")
    assert code == 1 and "`x`" in err
    assert not (tmp_path / "f").exists()


# What it refuses


def test_bad_input_is_told_and_leaves_nothing(tmp_path):
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", seed=2)

    def said(text, *adapters, **options):
        with pytest.raises(LorakitError, match=text):
            lorakit.mix(adapters or (a, b), options.pop("output", tmp_path / "out"), options.pop("rule", "linear"), **options)
        assert not (tmp_path / "out").exists()

    said("2 adapters but 3 weights", weights=[1, 2, 3])
    said("all weights are 0", weights=[0, 0])
    said("a weight is nan", weights=[float("nan"), 1])
    said("unknown rule `tise`; did you mean `ties`", rule="tise")
    said("ties has no option `densty`; did you mean `density`", rule="ties", densty=0.2)
    said("the rank must be at least 1, not 0", rank=0)
    said("model-stock finds its weights by itself", rule="model-stock", weights=[1, 2])
    said("needs the `gram` statistics of every adapter; mend: stats=", rule="regmean")
    said("looks at no statistics", stats=[{}, {}])
    said("the mixed update is zero on every target", a, a, weights=[1, -1], rank=2)
    said("b is there already; mend: another name", output=b)
    with pytest.raises(LorakitError, match="give a list of adapters"):
        lorakit.mix(a, tmp_path / "out")
    with pytest.raises(LorakitError, match="there is no adapter to mix"):
        lorakit.mix([], tmp_path / "out")
    said(r"there is no adapter folder .*bb; did you mean `b`", a, tmp_path / "bb")
    other = saved(tmp_path / "other", base=lambda: tiny.llama(seed=3))
    said("a and .*other were trained on different bases: .*values differ.* Mend: adapters of one base, or pass check_base=False", a, other)
    assert lorakit.mix([a, other], tmp_path / "fine", check_base=False).ranks
    wide = saved(tmp_path / "wide", base=tiny.gpt2, target_modules=["c_proj"])
    said("different bases", a, wide)
    saved(tmp_path / "router", "hydralora", target_modules=["q_proj"])
    said("depends on its input.* cannot be mixed; mend: leave this adapter out", a, tmp_path / "router")
    saved(tmp_path / "biased", lora_bias=True, base=lambda: tiny.llama(attention_bias=True), target_modules=["q_proj"])
    said("changes the bias", tmp_path / "biased")
    said("statistics of", rule="fisher", stats=[{"model.layers.0.self_attn.q_proj": torch.ones(2, 2)}, {}])


def test_a_shape_that_differs_names_the_target(tmp_path):
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", base=lambda: tiny.llama(seed=1), seed=2)
    file = tmp_path / "b" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if "layers.1.mlp.down_proj.lora_A" in k)
    save_file(tensors | {key: torch.ones(3, 30)}, file)
    (tmp_path / "b" / "receipt.json").unlink()
    with pytest.raises(LorakitError, match=r"model.layers.1.mlp.down_proj: an update of shape \[16, 24\] in .*a, \[16, 30\] in .*b"):
        lorakit.mix([a, b], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("with_base", [False, True])
def test_nan_names_the_tensor(tmp_path, with_base):
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", seed=2)
    file = b / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if "layers.1.mlp.down_proj.lora_A" in k)
    tensors[key][0, 0] = float("nan")
    save_file(tensors, file)
    (b / "receipt.json").unlink()
    with pytest.raises(LorakitError, match="layers.1.mlp.down_proj.lora_A.weight` holds NaN"):
        lorakit.mix([a, b], tmp_path / "out", base=tiny.llama() if with_base else None)
    assert not (tmp_path / "out").exists()


def test_a_corrupted_or_changed_file(tmp_path):
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", seed=2)
    file = b / "adapter_model.safetensors"
    shutil.copytree(b, tmp_path / "kept")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(LorakitError, match="truncated or not a safetensors file"):
        lorakit.mix([a, b], tmp_path / "out")
    save_file({k: t * 2 for k, t in load_file(tmp_path / "kept" / file.name).items()}, file)
    with pytest.raises(LorakitError, match="is not the file its receipt was written for"):
        lorakit.mix([a, b], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("with_base", [False, True])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, with_base):
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", seed=2)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lorakit.formats.folder.save_file" if with_base else "lorakit.merges.mix.write_json", full)
    model = tiny.llama() if with_base else None
    with pytest.raises(LorakitError, match="could not write .*No space left on device"):
        lorakit.mix([a, b], tmp_path / "out", base=model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    assert model is None or host.find_state(model) is None or not lorakit.adapters(model)


# With data


def rows(path, texts):
    path.write_text("\n".join(json.dumps({"prompt": p, "completion": c}) for p, c in texts))
    return path


@pytest.fixture
def trained(tmp_path):
    """The embedded model with two adapters that learned one answer each, and their data."""
    from lorakit.models import load_base, load_tokenizer
    from lorakit.training import data as d

    tok, out = load_tokenizer("embedded"), []
    for n, (prompt, answer) in enumerate((("def f(x):", " return x + 1"), ("import os", " as operating"))):
        torch.manual_seed(n)
        model = lorakit.adapt(load_base("embedded", dtype="float32"), "lora", r=2, target_modules=["q_proj", "v_proj"])
        batch = d.Collator(tok.pad_token_id)(d.encode([{"prompt": prompt, "completion": answer}], tok, 64, True, None).rows)
        opt = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.02)
        for _ in range(12):
            model(**batch).loss.backward()
            opt.step()
            opt.zero_grad()
        lorakit.save(model.eval(), tmp_path / f"t{n}")
        out.append((tmp_path / f"t{n}", rows(tmp_path / f"t{n}.jsonl", [(prompt, answer)])))
    return out


@pytest.mark.parametrize("rule", ["regmean", "fisher"])
def test_rules_that_need_data_and_the_metrics_before_and_after(trained, tmp_path, rule):
    from lorakit.experiments import mixing

    (a, x), (b, y) = trained
    done = mixing.run(mixing.read({"adapters": [str(a), str(b)], "rule": rule, "data": [str(x), str(y)], "output": str(tmp_path / "c"), "rank": 8}))
    assert done.verified["ok"]
    metrics = json.loads((tmp_path / "c" / "mix.json").read_text())["metrics"]
    for row, own, other in zip(metrics, (a, b), (b, a), strict=True):
        loss = {k: v["eval_loss"] for k, v in row.items() if k != "data"}
        assert loss[str(own)] < loss["base"] and loss["mix"] < loss["base"] and loss[str(own)] < loss[str(other)]


def test_statistics_are_what_they_say():
    from lorakit.merges import stats

    model = lorakit.adapt(tiny.llama(), "lora", r=2, target_modules=["q_proj", "embed_tokens"])
    lorakit.activate(model)
    x = tiny.ids()
    mask = torch.ones_like(x)
    mask[0, 3:] = 0
    batches = [{"input_ids": x[:2], "attention_mask": mask[:2], "labels": x[:2]}, {"input_ids": x[2:], "attention_mask": mask[2:], "labels": x[2:]}]
    seen = []
    hook = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    G = stats.grams(model, "default", batches)
    hook.remove()
    assert set(G) == {f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)}
    X = torch.cat([t[b["attention_mask"].bool()] for t, b in zip(seen, batches, strict=True)]).double()
    assert torch.allclose(G["model.layers.1.self_attn.q_proj"].double(), X.T @ X / len(X), atol=1e-5) and len(X) == int(mask.sum())
    F = stats.fisher(model, "default", batches)
    plain, want = tiny.llama(), 0
    W = plain.model.layers[0].self_attn.q_proj.weight
    for n in range(3):  # the adapter is at its start, where it adds nothing
        plain.zero_grad()
        plain(input_ids=x[n : n + 1], attention_mask=mask[n : n + 1], labels=x[n : n + 1]).loss.backward()
        want = want + W.grad.square() / 3
    assert torch.allclose(F["model.layers.0.self_attn.q_proj"], want, rtol=1e-3, atol=1e-9)
    assert lorakit.active(model) == {}
    with pytest.raises(LorakitError, match="a batch has no `labels`"):
        stats.fisher(model, "default", [{"input_ids": x}])
    with pytest.raises(LorakitError, match="no batch to look at"):
        stats.grams(model, "default", [])


def test_a_search_finds_the_weights_that_a_loss_asks_for():
    """The loss is how far the output is from that of known weights; what was active comes back."""
    from lorakit.merges.search import lorahub, scan

    pytest.importorskip("cma")
    model = tiny.llama()
    g = torch.Generator().manual_seed(1)
    for n in "abc":
        lorakit.adapt(model, "lora", r=2, target_modules=TARGETS, name=n)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g) * 0.3)
    want = tiny.logits(lorakit.activate(model, "a", "b", "c", weights=[0.8, -0.6, 0.0]))
    lorakit.activate(model, "b", weights=[0.5])

    def loss(m):
        return float((tiny.logits(m) - want).square().mean())

    found = lorahub(model, "abc", loss, budget=150)
    assert found.loss < 0.1 * found.before and len(found.tried) <= 150 and found.tried[0][0] == [0, 0, 0]
    assert abs(found.weights[0] - 0.8) < 0.25 and abs(found.weights[1] + 0.6) < 0.25 and abs(found.weights[2]) < 0.25
    assert all(abs(w) <= 1.5 for ws, _ in found.tried for w in ws) and lorakit.active(model) == {"b": 0.5}
    assert lorahub(model, "abc", loss, budget=9).tried == found.tried[:9]  # seeded
    assert lorahub(model, "abc", loss, budget=9, penalty=1e6).weights == [0, 0, 0]  # no adapter is worth that
    want = tiny.logits(lorakit.activate(model, "a", weights=[0.75]))
    found = scan(model, "a", loss)
    assert found.weights == [0.75] and len(found.tried) == 5 and found.loss < 1e-9
    with pytest.raises(LorakitError, match="scan goes over the weight of one adapter, not of 2"):
        scan(model, "ab", loss)
    with pytest.raises(LorakitError, match="lorahub weighs two adapters at least"):
        lorahub(model, "a", loss)


def test_a_search_over_saved_adapters(trained, tmp_path, call):
    (a, x), (b, _) = trained
    code, _, err = call("mix", a, b, "-o", tmp_path / "c", "--search", "lorahub", "--data", x)
    assert code == 0, err
    said = json.loads((tmp_path / "c" / "mix.json").read_text())
    assert said["weights"] == said["search"]["weights"] and said["search"]["loss"] < said["search"]["before"] and len(said["search"]["tried"]) <= 40
    assert said["metrics"][0]["mix"]["eval_loss"] == pytest.approx(said["search"]["loss"], abs=1e-3)
    code, _, err = call("mix", a, b, "-o", tmp_path / "d", "--search", "lorahb", "--data", x)
    assert code == 1 and "did you mean `lorahub`" in err and not (tmp_path / "d").exists()
