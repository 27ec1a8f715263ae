"""Whole checkpoints, and adapters at full rank, mixed tensor by tensor."""

from __future__ import annotations

import errno
import json
import subprocess
import sys

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_mix import deltas
from test_mix import saved as adapter
from test_mix_rules import ties, top

import lorakit
from lorakit import host
from lorakit.errors import LorakitError
from lorakit.merges import ROWS
from lorakit.merges.streamed import entries
from lorakit.models import load_base

PROJECTION = "model.layers.1.mlp.down_proj.weight"


def whole(path, model=tiny.llama, seed=0, dtype=torch.float32, **kw):
    model(seed=seed).to(dtype).save_pretrained(path, **kw)
    return path


@pytest.fixture
def three(tmp_path):
    """A base and two checkpoints, in shards and not."""
    return whole(tmp_path / "base", max_shard_size="20KB"), whole(tmp_path / "a", seed=1), whole(tmp_path / "b", seed=2, max_shard_size="15KB")


def tensors(folder):
    return {n: e.read() for n, e in entries(folder).items()}


def differ(a, b):
    return max(float((a[n].double() - b[n].double()).abs().max()) for n in a)


# What it computes


def literal(rule, t, w, path):
    """One merged update from several, as the rule's equation is written; t are (o, i)."""
    g = host.generator(0, path)
    p = [torch.full_like(x, 0.5) for x in t]
    if rule == "ties":
        return ties([top(x, 0.2) for x in t], w)
    if rule == "magnitude-prune":
        return sum(k * top(x, 0.2) for k, x in zip(w, t, strict=True))
    if rule == "breadcrumbs":
        return sum(k * (top(x, 0.21) - top(x, 0.01)) for k, x in zip(w, t, strict=True))
    if rule == "dare-linear":
        return sum(k * x * torch.bernoulli(q, generator=g) / q for k, x, q in zip(w, t, p, strict=True))
    if rule == "model-stock":
        cos = float((t[0] * t[1]).sum() / (t[0].norm() * t[1].norm())) if t[0].norm() * t[1].norm() else 0.0
        return 2 * cos / (1 + cos) * (t[0] + t[1]) / 2
    return sum(k * x for k, x in zip(w, t, strict=True))


@pytest.mark.parametrize("rule", ["linear", "ties", "magnitude-prune", "breadcrumbs", "dare-linear", "model-stock"])
def test_a_rule_on_checkpoints_is_its_equation_on_their_differences(three, tmp_path, rule):
    base, a, b = three
    w = [1.0, 1.0] if rule == "model-stock" else [0.6, -0.4]
    done = lorakit.mix_checkpoints([a, b], tmp_path / "out", rule, base=base, weights=None if rule == "model-stock" else w)
    W0, A, B, out = (tensors(f) for f in (base, a, b, tmp_path / "out"))
    for name in (PROJECTION, "model.layers.0.self_attn.k_proj.weight"):
        want = W0[name] + literal(rule, [A[name] - W0[name], B[name] - W0[name]], w, name.removesuffix(".weight"))
        assert torch.allclose(out[name], want, atol=1e-5) and not torch.allclose(want, W0[name], atol=1e-3), name
    assert PROJECTION in done.changed and done.tensors == len(W0) and "model.norm.weight" not in done.changed
    assert {f.name for f in (tmp_path / "out").iterdir()} == {f.name for f in base.iterdir()} | {"mix.json"}
    assert json.loads((tmp_path / "out" / "mix.json").read_text())["rule"] == rule
    load_base(tmp_path / "out")


def test_without_a_base_two_checkpoints_become_their_mean_or_lie_on_their_arc(three, tmp_path):
    _, a, b = three
    A, B = tensors(a), tensors(b)
    lorakit.mix_checkpoints([a, b], tmp_path / "mean")
    lorakit.mix_checkpoints([a, b], tmp_path / "same", weights=[3, 1], normalize=True)
    assert differ(tensors(tmp_path / "mean"), {n: (A[n] + B[n]) / 2 for n in A}) < 1e-6
    assert differ(tensors(tmp_path / "same"), {n: 0.75 * A[n] + 0.25 * B[n] for n in A}) < 1e-6
    lorakit.mix_checkpoints([a, b], tmp_path / "arc", "slerp", weights=[0.7, 0.3])
    x, y, out = A[PROJECTION], B[PROJECTION], tensors(tmp_path / "arc")
    angle = torch.arccos((x * y).sum() / (x.norm() * y.norm()))
    want = torch.sin(0.7 * angle) / torch.sin(angle) * x + torch.sin(0.3 * angle) / torch.sin(angle) * y
    assert torch.allclose(out[PROJECTION], want, atol=1e-5)
    logits = tiny.logits(load_base(tmp_path / "mean"))
    assert not torch.allclose(logits, tiny.logits(load_base(a)), atol=1e-2)


def test_a_checkpoint_mixed_with_itself_is_itself(three, tmp_path):
    base, a, _ = three
    A = tensors(a)
    for n, (rule, kw) in enumerate([("linear", {}), ("slerp", {}), ("ties", {"density": 1.0, "base": base}), ("linear", {"base": base, "weights": [0.5, 0.5]}),
                                    ("model-stock", {"base": base}), ("dare-ties", {"density": 1.0, "base": base})]):
        done = lorakit.mix_checkpoints([a, a], tmp_path / f"o{n}", rule, **kw)
        assert differ(A, tensors(tmp_path / f"o{n}")) < (2e-6 if kw else 1e-9), rule
        assert bool(done.changed) == bool(kw) and ("nothing differs" in str(done)) == (not kw)
    assert not lorakit.mix_checkpoints([base], tmp_path / "still", base=base).changed


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adapters_at_full_rank_are_what_their_merged_checkpoints_are(tmp_path, kind):
    """Every rule without statistics gives the same from adapters as from the checkpoints they were merged into, whatever side a layer's inputs are on."""
    model = tiny.MODELS[kind]
    base = whole(tmp_path / "base", model)
    on = {"base": model, "target_modules": ["c_attn", "c_proj"] if kind == "gpt2" else ["q_proj", "down_proj"]}
    a, b = adapter(tmp_path / "a", r=2, **on), adapter(tmp_path / "b", "dora", seed=2, r=3, **on)
    for x in "ab":
        lorakit.merge_checkpoint(base, tmp_path / x, tmp_path / f"merged-{x}")
    rules = [r for r, (cls, _) in ROWS.items() if not (cls.needs or r.startswith("peft"))]
    for rule in rules:
        kw = {"base": base, "seed": 3} | ({"shrunk": 1} if rule == "byom" else {})  # by default half of the source's rank
        one = lorakit.mix_checkpoints([a, b], tmp_path / f"adapters-{rule}", rule, **kw)
        lorakit.mix_checkpoints([tmp_path / "merged-a", tmp_path / "merged-b"], tmp_path / f"models-{rule}", rule, **kw)
        assert differ(tensors(tmp_path / f"adapters-{rule}"), tensors(tmp_path / f"models-{rule}")) < 1e-4, rule
        assert len(one.changed) == (6 if kind == "gpt2" else 4) and one.tensors == len(tensors(base))
    lorakit.mix_checkpoints([tmp_path / "merged-a", b], tmp_path / "half", "ties", base=base, density=0.3)
    lorakit.mix_checkpoints([a, tmp_path / "merged-b"], tmp_path / "other-half", "ties", base=base, density=0.3)
    assert differ(tensors(tmp_path / "half"), tensors(tmp_path / "other-half")) < 1e-4


def test_nothing_is_cut_that_an_adapter_would_lose(tmp_path):
    base, a, b = whole(tmp_path / "base"), adapter(tmp_path / "a"), adapter(tmp_path / "b", seed=2)
    lorakit.mix_checkpoints([a, b], tmp_path / "out", "ties", density=0.5, base=base)
    cut = lorakit.mix([a, b], tmp_path / "cut", "ties", density=0.5)
    exact = lorakit.mix([a, b], tmp_path / "exact", "ties", density=0.5, rank=16)
    W0, out, full = tensors(base), tensors(tmp_path / "out"), deltas(tmp_path / "exact")
    assert cut.error > 0.1 and exact.error < 1e-3
    assert max(float((out[f"{p}.weight"] - W0[f"{p}.weight"] - t).abs().max()) for p, t in full.items()) < 1e-4


def test_a_faster_way_to_a_rank_is_said(tmp_path, call):
    a, b = adapter(tmp_path / "a"), adapter(tmp_path / "b", seed=2)
    code, out, err = call("mix", a, b, "--rule", "ties", "--rank", 3, "--niter", 4, "-o", tmp_path / "c", "--json")
    fast, exact = json.loads(out), lorakit.mix([a, b], tmp_path / "d", "ties", rank=3)
    assert code == 0 and "4 rounds of subspace iteration" in str(fast["notes"]) and exact.error <= fast["error"] * 1.0001 <= exact.error * 1.01, err
    assert fast["error"] != exact.error
    with pytest.raises(LorakitError, match="niter must be at least 0, not -1"):
        lorakit.mix([a, b], tmp_path / "e", "ties", rank=3, niter=-1)


def test_dtypes_and_shards_are_the_bases(tmp_path):
    base = whole(tmp_path / "base", dtype=torch.bfloat16, max_shard_size="15KB")
    a, b = whole(tmp_path / "a", seed=1), whole(tmp_path / "b", seed=2, dtype=torch.float16)
    lorakit.mix_checkpoints([a, b], tmp_path / "out", base=base, weights=[0.5, 0.5])
    assert {n: (e.kind, e.file.name) for n, e in entries(tmp_path / "out").items()} == {n: (e.kind, e.file.name) for n, e in entries(base).items()}
    A, B = tensors(a), tensors(b)
    assert all(torch.equal(t, ((A[n].float() + B[n].float()) / 2).bfloat16()) or differ({n: t}, {n: (A[n] + B[n]) / 2}) < 4e-3
               for n, t in tensors(tmp_path / "out").items())


def test_a_threshold_over_the_whole_model(three, tmp_path):
    base, a, _ = three
    lorakit.mix_checkpoints([a], tmp_path / "out", "magnitude-prune", base=base, density=0.1, scope="global")
    W0, A = tensors(base), tensors(a)
    flat = torch.cat([(A[n] - W0[n]).reshape(-1) for n in W0])
    assert sum(int((t != W0[n]).sum()) for n, t in tensors(tmp_path / "out").items()) == int(0.1 * len(flat))


def test_large_tensors_are_worked_on_in_blocks_with_the_same_result(three, tmp_path, monkeypatch):
    base, a, b = three
    rules = {"ties": {"density": 0.3}, "breadcrumbs": {}, "slerp": {}, "model-stock": {}, "della": {"density": 0.9, "epsilon": 0.0}}
    for rule, kw in rules.items():
        lorakit.mix_checkpoints([a, b], tmp_path / f"one-{rule}", rule, base=base, **kw)
    monkeypatch.setattr("lorakit.merges.base.BLOCK", 100)
    for rule, kw in rules.items():
        lorakit.mix_checkpoints([a, b], tmp_path / f"many-{rule}", rule, base=base, **kw)
        one, many = tensors(tmp_path / f"one-{rule}"), tensors(tmp_path / f"many-{rule}")
        if rule != "della":  # what is drawn is drawn block by block
            assert differ(one, many) < 1e-6, rule
        else:
            W0, A, B = (tensors(f)[PROJECTION] for f in (base, a, b))
            values = {0.0, 1 / 0.9}
            x = ((many[PROJECTION] - W0) / (A - W0))[((A - W0).sign() != (B - W0).sign())]
            assert all(min(abs(float(v) - k) for k in values) < 1e-3 or float(v) < 0 for v in x)


# What it refuses


def test_bad_input_is_told_and_leaves_nothing(three, tmp_path):
    base, a, b = three

    def said(text, *sources, **options):
        before = sorted(p.name for p in tmp_path.iterdir())
        with pytest.raises(LorakitError, match=text):
            lorakit.mix_checkpoints(sources or (a, b), options.pop("output", tmp_path / "out"), options.pop("rule", "linear"), **options)
        assert sorted(p.name for p in tmp_path.iterdir()) == before

    def changed(name, change, config=None):
        path = whole(tmp_path / name, seed=1)
        here = load_file(path / "model.safetensors")
        change(here)
        save_file(here, path / "model.safetensors", metadata={"format": "pt"})
        if config:
            (path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | config))
        return path

    said("ties works on what was added to a base; mend: base=", rule="ties")
    said("without a base, the weights must sum to 1, not 2; mend: normalize=True", weights=[1, 1])
    said("slerp goes between two", a, b, a, rule="slerp")
    said("unknown rule `tise`; did you mean `ties`", rule="tise")
    said("ties has no option `densty`", rule="ties", base=base, densty=1)
    said("b is there already", output=b)
    said("there is no adapter folder .*aa; did you mean `a`", tmp_path / "aa", b)
    said(r"down_proj.weight: \[16, 24\] in .*model.safetensors, \[16, 30\] in .*wide.model.safetensors; mend: checkpoints of one architecture", a,
         changed("wide", lambda t: t.update({PROJECTION: torch.ones(16, 30)})))
    said(f"{PROJECTION}: in model.safetensors of .*a, not in .*less; mend: checkpoints of one architecture", a, changed("less", lambda t: t.pop(PROJECTION)))
    said("lm_head.weight: in model.safetensors of .*a, not in .*tied; .*tie_word_embeddings", a, whole(tmp_path / "tied", lambda seed: tiny.llama(True, seed)))
    said(f"{PROJECTION} in .*nan.model.safetensors holds NaN", a, changed("nan", lambda t: t[PROJECTION][0, 0].fill_(float("nan"))))
    said("quantised.* is quantised", a, changed("quantised", lambda t: None, {"quantization_config": {"quant_method": "x"}}))
    said(f"{PROJECTION}: F32 in .*, I8 in .*no floating-point numbers", a, changed("int", lambda t: t.update({PROJECTION: t[PROJECTION].to(torch.int8)})))
    said("lm_head.weight: the mix does not fit into float16", base, rule="linear", base=whole(tmp_path / "half", dtype=torch.float16, seed=1), weights=[1e6])
    file = b / sorted(p.name for p in b.glob("*.safetensors"))[0]
    kept = file.read_bytes()
    file.write_bytes(kept[:-10])
    said(f"{file.name} is no whole safetensors file: .* ends beyond it")
    size = int.from_bytes(kept[:8], "little")
    file.write_bytes(kept[:8] + kept[8 : 8 + size].replace(b'"F32"', b'"F16"', 1) + kept[8 + size :])
    said(f"{file.name} is no whole safetensors file: .* or is not of its shape")
    file.unlink()
    said(f"names {file.name}, which is not there")
    index = json.loads((b / "model.safetensors.index.json").read_text())
    (b / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": dict.fromkeys(index["weight_map"], "../a/model.safetensors")}))
    said("names ../a/model.safetensors, which is not there")
    (b / "model.safetensors.index.json").write_text("{}")
    said("names no file")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    said("pickled has no safetensors file; mend: save it with transformers' save_pretrained", tmp_path / "pickled")


def test_adapters_that_do_not_belong_are_refused(tmp_path):
    base, other = whole(tmp_path / "base"), whole(tmp_path / "other", seed=5)
    a, b = adapter(tmp_path / "a"), adapter(tmp_path / "b", seed=2)
    with pytest.raises(LorakitError, match="is an adapter, and the base is needed to make a checkpoint of it; mend: base="):
        lorakit.mix_checkpoints([a, b], tmp_path / "out")
    with pytest.raises(LorakitError, match="a was trained on another base: model.layers.0.*weight in .* has other values"):
        lorakit.mix_checkpoints([a, b], tmp_path / "out", base=other)
    assert lorakit.mix_checkpoints([a, b], tmp_path / "fine", base=other, check_base=False).changed
    router = adapter(tmp_path / "router", "hydralora", target_modules=["q_proj"])
    with pytest.raises(LorakitError, match="hydralora cannot be merged a weight at a time"):
        lorakit.mix_checkpoints([router], tmp_path / "out", base=base)
    file = b / "adapter_model.safetensors"
    here = load_file(file)
    key = next(k for k in here if "down_proj.lora_A" in k)
    here[key][0, 0] = float("inf")
    save_file(here, file)
    (b / "receipt.json").unlink()
    with pytest.raises(LorakitError, match="down_proj.lora_A.weight` holds NaN or infinity"):
        lorakit.mix_checkpoints([a, b], tmp_path / "out", base=base)
    receipt = json.loads((a / "receipt.json").read_text())
    (a / "receipt.json").write_text(json.dumps(receipt | {"lineage": [{"adapter": "x", "stage": "freeze"}]}))
    with pytest.raises(LorakitError, match="was trained beside earlier adapters"):
        lorakit.mix_checkpoints([a], tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(three, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lorakit.merges.checkpoints.write_json", full)
    with pytest.raises(LorakitError, match="could not write .*No space left on device"):
        lorakit.mix_checkpoints(three[1:], tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "base"]


def test_a_file_beside_the_index_is_neither_read_nor_copied(three, tmp_path):
    base, a, _ = three
    save_file({"stray": torch.ones(2)}, base / "consolidated.safetensors")
    lorakit.mix_checkpoints([a], tmp_path / "out", base=base)
    assert not (tmp_path / "out" / "consolidated.safetensors").exists() and "stray" not in entries(tmp_path / "out")


def test_another_tokenizer_is_said(three, tmp_path):
    base, a, b = three
    (base / "tokenizer.json").write_text("{}")
    (a / "tokenizer.json").write_text("{}")
    (b / "tokenizer.json").write_text("[]")
    done = lorakit.mix_checkpoints([a, b], tmp_path / "out", base=base)
    assert [n for n in done.notes if "tokenizer" in n] == [f"{b}: another tokenizer.json than {base}'s, which is kept"]


# The verb, and memory


def test_the_verb(three, tmp_path, call):
    base, a, b = three
    code, out, err = call("mix", a, b, "--base", base, "--rule", "ties", "--density", 0.5, "-o", tmp_path / "c")
    assert code == 0 and "density 0.5" in out and f"mixed model: {tmp_path / 'c'}" in out, err
    lorakit.mix_checkpoints([a, b], tmp_path / "d", "ties", base=base, density=0.5)
    assert differ(tensors(tmp_path / "c"), tensors(tmp_path / "d")) == 0
    x, y = adapter(tmp_path / "x"), adapter(tmp_path / "y", seed=2)
    code, out, err = call("mix", x, y, "--rule", "ties", "--base", base, "--to", "checkpoint", "-o", tmp_path / "e", "--json")
    assert code == 0 and json.loads(out)["base"] == str(base), err
    code, _, err = call("mix", a, b, "--to", "adapter", "-o", tmp_path / "f")
    assert code == 1 and "is a whole model, which no adapter holds" in err
    code, _, err = call("mix", a, b, "--rank", 4, "-o", tmp_path / "f")
    assert code == 1 and "`rank` is for a mix that is an adapter" in err
    code, _, err = call("mix", x, y, "--to", "chekpoint", "-o", tmp_path / "f")
    assert code == 1 and "`to`" in err and not (tmp_path / "f").exists()


@pytest.mark.slow
def test_memory_is_that_of_a_tensor_for_each_source_not_of_the_model(tmp_path):
    import transformers as tf

    sizes = {"vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 8}
    for n in ("base", "a", "b"):
        tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)).bfloat16().save_pretrained(tmp_path / n, max_shard_size="50MB")
    code = f"""
import torch, lorakit, re
from lorakit.models import skeleton
torch.set_num_threads(1)
skeleton({str(tmp_path / 'base')!r})  # what is imported for it
torch.zeros(4, 4).kthvalue(1)
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) / 1024
before = peak()
lorakit.mix_checkpoints([{str(tmp_path / 'a')!r}, {str(tmp_path / 'b')!r}], {str(tmp_path / 'out')!r}, "ties", base={str(tmp_path / 'base')!r})
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    grown, largest = float(done.stdout.splitlines()[-1]), 8192 * 1024 * 4 / 2**20
    model = sum(f.stat().st_size for f in (tmp_path / "base").glob("*.safetensors")) * 2 / 2**20
    assert grown < (2 + 6) * largest < model, f"{grown:.0f} MiB for tensors of {largest:.0f}, a model of {model:.0f}"
