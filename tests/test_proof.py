"""verify: PASS on what is right, FAIL on the right point for everything that can be wrong."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import logits

import lorakit
from lorakit import LorakitError, host, verify
from lorakit.formats.files import sha256

CONFIG, TENSORS, RECEIPT = "adapter_config.json", "adapter_model.safetensors", "receipt.json"
TARGETS = ["q_proj", "down_proj"]


@torch.no_grad()
def shake(model, seed=1, name="default"):
    g = torch.Generator().manual_seed(seed)
    for _, slot in sorted(host.slots(model, name).items()):
        for _, t in sorted(slot.params(name).items()):
            if t.requires_grad:
                t.add_(torch.randn(t.shape, generator=g) * 0.2)
    return model


def adapted(method="lora", seed=1, base=None, **kw):
    return shake(lorakit.adapt(tiny.llama() if base is None else base, method, **{"r": 2, "target_modules": TARGETS} | kw), seed)


@pytest.fixture
def saved(tmp_path):
    return lorakit.save(adapted(), tmp_path / "a")


def point(report, name):
    found = [p for p in report.points if p.name == name]
    assert len(found) == 1, f"no point `{name}` in:\n{report}"
    return found[0]


def failed(report):
    assert not report.ok and str(report).endswith("FAIL")
    return {p.name for p in report.points if p.ok is False}


def rewrite(folder, change):
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


def forge(folder):
    """Makes the receipt's digests those of the changed files, so that only what is computed can tell."""
    receipt = json.loads((folder / RECEIPT).read_text())
    receipt["files"] = {f: sha256(folder / f) for f in receipt["files"]}
    (folder / RECEIPT).write_text(json.dumps(receipt))


# Good


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "lora-fa", "lora-nonzero"])
def test_passes_what_is_right(method, tmp_path):
    model = adapted(method)
    lorakit.save(model, tmp_path / "a")
    report = verify(tmp_path / "a", tiny.llama(), lorakit.merged(model))
    assert report.ok and all(p.ok for p in report.points), str(report)
    assert [p.name for p in report.points] == ["files", "base", "keys", "effect", "norms", "probe", "merged weights", "merged logits"]
    assert str(report).endswith("PASS") and json.loads(json.dumps(report.to_dict()))["ok"] is True


@pytest.mark.parametrize("kind", list(tiny.MODELS))
def test_passes_on_every_kind_of_model(kind, tmp_path):
    model = shake(lorakit.adapt(tiny.MODELS[kind](), "dora", r=2, target_modules="all-linear"))
    lorakit.save(model, tmp_path / "a")
    report = verify(tmp_path / "a", tiny.MODELS[kind](), lorakit.merged(model))
    assert report.ok and all(p.ok for p in report.points), str(report)


def test_passes_from_folders_alone(tmp_path):
    base = tiny.llama()
    base.save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    model = adapted("dora", base=AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    lorakit.save(model, tmp_path / "a")
    lorakit.save_merged(model, tmp_path / "m")
    for base in (None, tmp_path / "base"):
        report = verify(tmp_path / "a", base, tmp_path / "m")
        assert report.ok and all(p.ok for p in report.points), str(report)


def test_leaves_the_model_as_it_was(saved):
    plain = tiny.llama()
    keys, grads = list(plain.state_dict()), [p.requires_grad for p in plain.parameters()]
    verify(saved, plain)
    assert list(plain.state_dict()) == keys and [p.requires_grad for p in plain.parameters()] == grads
    assert not any(isinstance(m, host.Host) for m in plain.modules())
    busy = adapted(seed=4)
    lorakit.adapt(busy, "dora", r=2, name="b", target_modules=["v_proj"])
    lorakit.activate(busy, "default", "b", weights=[0.5, 1.0])
    y, keys = logits(busy), list(busy.state_dict())
    assert verify(saved, busy).ok
    assert torch.equal(logits(busy), y) and list(busy.state_dict()) == keys and lorakit.active(busy) == {"default": 0.5, "b": 1.0}


# Wrong base, wrong files


def test_a_wrong_base_is_named(saved):
    report = verify(saved, tiny.llama(seed=1))
    assert "base" in failed(report) and "probe" in failed(report) and "values differ" in point(report, "base").detail
    close = tiny.llama()
    with torch.no_grad():
        close.model.norm.weight[2] += 0.25
    report = verify(saved, close)
    assert {"base"} <= failed(report) <= {"base", "probe"} and point(report, "base").detail.startswith("model.norm.weight: values differ")


def test_a_base_of_other_shapes_fails_without_an_exception(saved):
    report = verify(saved, tiny.llama(layers=1))
    assert {"base", "keys"} <= failed(report)
    assert failed(verify(saved, tiny.gpt2())) >= {"base", "keys"}
    assert failed(verify(saved, saved.parent / "nowhere")) == {"base"}
    assert failed(verify(saved.parent / "nowhere", tiny.llama())) == {"files"}


@pytest.mark.parametrize("forged", [False, True])
def test_an_edited_alpha_is_found(forged, saved):
    config = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] * 2}))
    if forged:
        forge(saved)
    report = verify(saved, tiny.llama())
    assert failed(report) == {"norms", "probe"} | (set() if forged else {"files"})
    if not forged:
        assert CONFIG in point(report, "files").detail


@pytest.mark.parametrize("forged", [False, True])
def test_renamed_keys_are_found(forged, saved):
    rewrite(saved, lambda t: [t.__setitem__(k.replace("q_proj", "k_proj"), t.pop(k)) for k in list(t) if "layers.0.self_attn" in k])
    if forged:
        forge(saved)
    report = verify(saved, tiny.llama())
    assert "keys" in failed(report) or {"norms", "probe"} <= failed(report), str(report)
    assert ("files" in failed(report)) is not forged


def test_a_missing_tensor_is_found(saved):
    rewrite(saved, lambda t: t.pop(next(k for k in t if "down_proj.lora_B" in k)))
    forge(saved)
    report = verify(saved, tiny.llama())
    assert failed(report) == {"keys"} and "is missing" in point(report, "keys").detail


@pytest.mark.parametrize("forged", [False, True])
def test_swapped_tensors_are_found(forged, saved):
    a, b = (f"base_model.model.model.layers.{n}.mlp.down_proj.lora_B.weight" for n in (0, 1))
    rewrite(saved, lambda t: t.update({a: t[b].clone(), b: t[a].clone()}))
    if forged:
        forge(saved)
    assert failed(verify(saved, tiny.llama())) == {"norms", "probe"} | (set() if forged else {"files"})


def test_what_keeps_every_norm_is_found_by_the_probe(saved):
    """Rows of B in another order: every norm is as it was, the function is not."""
    rewrite(saved, lambda t: t.update({k: v.flip(0) for k, v in t.items() if "lora_B" in k}))
    forge(saved)
    assert failed(verify(saved, tiny.llama())) == {"probe"}


def test_nan_is_found(saved):
    rewrite(saved, lambda t: next(v for k, v in t.items() if "lora_B" in k).fill_(float("nan")))
    forge(saved)
    assert failed(verify(saved, tiny.llama())) == {"keys"}


@pytest.mark.parametrize("byte", [-1, -50])
def test_one_changed_byte_is_found(byte, saved):
    raw = bytearray((saved / TENSORS).read_bytes())
    raw[byte] ^= 0x01
    (saved / TENSORS).write_bytes(raw)
    report = verify(saved, tiny.llama())
    assert "files" in failed(report) and TENSORS in point(report, "files").detail


# No effect


def test_an_adapter_that_does_nothing_fails(tmp_path):
    lorakit.save(lorakit.adapt(tiny.llama(), r=2, target_modules=TARGETS), tmp_path / "a")
    report = verify(tmp_path / "a", tiny.llama())
    assert "effect" in failed(report) and "does nothing" in point(report, "effect").detail


def test_zeros_in_some_modules_are_told_and_pass(tmp_path):
    model = adapted()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.lora_B.default.zero_()
    lorakit.save(model, tmp_path / "a")
    report = verify(tmp_path / "a", tiny.llama())
    assert report.ok and "1 of 4 are zero, e.g. model.layers.1.self_attn.q_proj" in point(report, "effect").detail


def test_an_adapter_that_is_skipped_fails_the_probe(saved, monkeypatch):
    """Right weights in the right places, and nobody calls them."""
    monkeypatch.setattr(host.Slot, "idle", lambda self: True)
    report = verify(saved, tiny.llama())
    assert failed(report) == {"probe"} and "not in effect" in point(report, "probe").detail


# Merged


def test_a_merge_that_wrote_the_base_back_is_found(saved):
    report = verify(saved, tiny.llama(), tiny.llama())
    assert failed(report) == {"merged weights", "merged logits"}
    assert "the merge wrote the base back" in point(report, "merged weights").detail and "BASE's" in point(report, "merged logits").detail


def test_a_merge_that_forgot_some_modules_is_found(saved):
    half = lorakit.merged(lorakit.load(tiny.llama(), saved))
    half.model.layers[0].mlp.down_proj.weight = tiny.llama().model.layers[0].mlp.down_proj.weight
    report = verify(saved, tiny.llama(), half)
    assert {"merged weights"} <= failed(report) <= {"merged weights", "merged logits"}
    assert "1 modules still hold the BASE's weight, e.g. model.layers.0.mlp.down_proj" in point(report, "merged weights").detail


def test_a_merge_of_another_adapter_is_found(saved):
    report = verify(saved, tiny.llama(), lorakit.merged(adapted(seed=9)))
    assert failed(report) == {"merged weights", "merged logits"} and "differs from base + adapter" in point(report, "merged weights").detail


def test_a_merge_applied_twice_is_found(saved):
    once = lorakit.merged(lorakit.load(tiny.llama(), saved))
    twice = lorakit.merged(lorakit.load(once, saved, check_base=False))
    assert failed(verify(saved, tiny.llama(), twice)) == {"merged weights", "merged logits"}


def test_a_merge_on_another_base_is_found_by_its_logits(saved):
    """The adapted modules are right, the rest of the model is not: only the logits can tell."""
    other = lorakit.merged(lorakit.load(tiny.llama(), saved))
    with torch.no_grad():
        other.model.norm.weight.mul_(1.5)
    assert failed(verify(saved, tiny.llama(), other)) == {"merged logits"}


def test_a_merged_model_of_another_shape_fails_without_an_exception(saved):
    assert "merged" in failed(verify(saved, tiny.llama(), tiny.gpt2()))
    assert "merged" in failed(verify(saved, tiny.llama(), saved.parent / "nowhere"))


@pytest.mark.parametrize("side", ["embed_tokens", "lm_head"])
def test_a_merge_into_a_tied_weight_passes(side, tmp_path):
    model = adapted(base=tiny.llama(tied=True), target_modules=[side])
    lorakit.save(model, tmp_path / "a")
    lorakit.save_merged(model, tmp_path / "m")
    report = verify(tmp_path / "a", tiny.llama(tied=True), tmp_path / "m")
    assert report.ok, str(report)


# Dtypes


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_dtypes_pass_and_still_fail_where_they_should(method, dtype, tmp_path):
    model = adapted(method, base=tiny.llama().to(dtype))
    lorakit.save(model, tmp_path / "a")
    report = verify(tmp_path / "a", tiny.llama().to(dtype), lorakit.merged(model))
    assert report.ok and all(p.ok for p in report.points), str(report)
    assert {"merged weights", "merged logits"} == failed(verify(tmp_path / "a", tiny.llama().to(dtype), tiny.llama().to(dtype)))
    assert "base" in failed(verify(tmp_path / "a", tiny.llama(seed=1).to(dtype)))


@pytest.mark.parametrize(("saved_in", "loaded_in"), [
    (torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float64)])
def test_a_base_in_another_dtype_is_recognised(saved_in, loaded_in, tmp_path):
    lorakit.save(adapted(base=tiny.llama().to(saved_in)), tmp_path / "a")
    report = verify(tmp_path / "a", tiny.llama().to(saved_in).to(loaded_in))
    assert point(report, "base").ok and report.ok, str(report)


# Written by others


def test_an_adapter_of_peft_has_no_receipt_and_is_checked_all_the_same(tmp_path):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"))
        with torch.no_grad():
            for n, p in model.named_parameters():
                if "lora_" in n:
                    p.add_(0.1)
        model.save_pretrained(tmp_path / "a")
        merged = copy.deepcopy(model).merge_and_unload().eval()
    report = verify(tmp_path / "a", tiny.llama(), merged)
    assert report.ok and {p.name for p in report.points if p.ok is None} == {"files", "base"}
    assert "2 points could not be checked" in str(report) and "another library wrote this" in point(report, "files").detail
    assert failed(verify(tmp_path / "a", tiny.llama(), tiny.llama())) == {"merged weights", "merged logits"}


def test_load_with_probe_refuses_what_does_not_compute_what_it_did(saved):
    config = json.loads((saved / CONFIG).read_text())
    lorakit.load(tiny.llama(), saved, probe=True)
    (saved / CONFIG).write_text(json.dumps(config | {"lora_alpha": 3}))
    model = adapted(seed=2)
    y = logits(model)
    for check, why in ((True, "adapter_config.json is not the file its receipt was written for"), (False, "probe: logits differ by")):
        with pytest.raises(LorakitError, match=why):
            lorakit.load(model, saved, "new", probe=True, check_base=check)
        assert torch.equal(logits(model), y) and lorakit.active(model) == {"default": 1.0}


def test_save_merged_refuses_a_folder_that_is_not_what_was_merged(tmp_path, monkeypatch):
    """As when a library writes tied or base weights back in saving."""
    model, real = adapted(), type(tiny.llama()).save_pretrained
    monkeypatch.setattr(type(model), "save_pretrained", lambda self, path, **kw: real(tiny.llama(), path, **kw))
    with pytest.raises(LorakitError, match="read back from disk is not what was merged"):
        lorakit.save_merged(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_sharded_base_is_the_same_base(tmp_path):
    """One file or many: the fingerprint is of the tensors. A merged model may be sharded too."""
    tiny.llama().save_pretrained(tmp_path / "one")
    tiny.llama().save_pretrained(tmp_path / "many", max_shard_size="4KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    model = adapted(seed=2)
    lorakit.save(model, tmp_path / "a")
    lorakit.merged(model).save_pretrained(tmp_path / "merged", max_shard_size="4KB")
    for base in ("one", "many"):
        report = lorakit.verify(tmp_path / "a", tmp_path / base, tmp_path / "merged")
        assert report.ok and all(p.ok for p in report.points), str(report)
