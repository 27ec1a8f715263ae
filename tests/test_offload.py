"""Bases that accelerate keeps elsewhere, on the CPU or on disk: adapted before or after, as if they were in memory."""

from __future__ import annotations

import copy
import json

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_host import shake
from tiny import logits
from torch import nn
from transformers import AutoModelForCausalLM, TrainingArguments

import lorakit
from lorakit import LorakitError, host
from lorakit.formats.receipt import fingerprint
from lorakit.training import AdapterTrainer

accelerate = pytest.importorskip("accelerate")
CPU = torch.device("cpu")
PARTS = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
METHODS = {"lora": {"r": 2}, "dora": {"r": 2}, "lora-nonzero": {"r": 2}, "saved": {"r": 2, "modules_to_save": ["lm_head"]}, "embedding": {
    "r": 2, "target_modules": ["embed_tokens", "q_proj"]}}
WAYS = ["cpu", "disk", "map", "whole-on-disk"]


def adapt(model: nn.Module, method: str, **kw) -> nn.Module:
    return lorakit.adapt(model, method if method in ("dora", "lora-nonzero") else "lora", **METHODS[method], **kw)


def send(model: nn.Module, way: str, folder) -> nn.Module:
    """Offloads the model; the work is done on the CPU."""
    if way == "cpu":
        return accelerate.cpu_offload(model, execution_device=CPU)
    if way == "disk":
        accelerate.disk_offload(model, str(folder / "weights"), execution_device=CPU)
        return model
    where = dict.fromkeys(PARTS, "disk") if way == "whole-on-disk" else dict.fromkeys(PARTS, "cpu") | {"model.layers.1": "disk", "lm_head": "disk"}
    return accelerate.dispatch_model(model, where, main_device="cpu", offload_dir=str(folder / "weights"), force_hooks=True)


def offloaded(method: str, way: str, order: str, folder) -> nn.Module:
    if order == "before":
        return adapt(send(tiny.llama(), way, folder), method)
    return send(adapt(tiny.llama(), method), way, folder)


def leaves(model: nn.Module) -> dict[str, nn.Parameter]:
    return {f"{n}.{k}": p for n, m in model.named_modules() if isinstance(m, host.Leaves) for k, p in m.named_parameters()}


def steps(model: nn.Module, n: int = 3) -> list[float]:
    """A few AdamW steps; the losses."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(params, lr=1e-2), []
    for k in range(n):
        x = torch.randint(4, tiny.VOCAB, (2, 6), generator=torch.Generator().manual_seed(k))
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        assert all(p.grad is not None for p in params), "an adapter tensor gets no gradient"
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", list(METHODS))
def test_an_offloaded_model_computes_trains_and_saves_as_one_in_memory(method, way, order, tmp_path):
    """order: offloaded before it was adapted, or after."""
    plain, model = adapt(tiny.llama(), method), offloaded(method, way, order, tmp_path)
    away = [p.device.type for n, p in model.named_parameters() if "model.layers.1" in n and n.endswith("_proj.weight")]
    assert away == ["meta"] * 7, "nothing is offloaded"
    assert leaves(model).keys() == leaves(plain).keys() and all(p.device == CPU for p in leaves(model).values()), "adapter tensors were offloaded"
    shake(plain)
    shake(model)
    assert torch.equal(logits(model), logits(plain)) and not torch.equal(logits(plain), logits(tiny.llama()))
    assert steps(model) == pytest.approx(steps(plain), abs=1e-6)
    assert all(float((p - leaves(plain)[n]).detach().abs().max()) <= 1e-6 for n, p in leaves(model).items())
    assert float((logits(model) - logits(plain)).abs().max()) <= 1e-5

    with torch.no_grad():
        for n, p in leaves(model).items():
            p.copy_(leaves(plain)[n])
    lorakit.save(plain, tmp_path / "plain")
    lorakit.save(model, tmp_path / "offloaded")
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("plain", "offloaded"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    a, b = (json.loads((tmp_path / n / "receipt.json").read_text()) for n in ("plain", "offloaded"))
    assert a["base"]["tensors"] == b["base"]["tensors"] and a["base"]["digest"] == b["base"]["digest"] and a["probe"] == b["probe"]
    assert a["modules"] == b["modules"]


def test_no_weight_that_was_offloaded_is_kept(tmp_path):
    """DoRA remembers the norms of the base's rows, not the base."""
    model = shake(adapt(send(tiny.llama(), "disk", tmp_path), "dora"))
    logits(model)
    assert not [s.path for s in host.slots(model).values() if s.site._row_sq[0]() is not None], "weights that were loaded for one call stay"


@pytest.mark.parametrize("way", WAYS)
def test_a_saved_adapter_loads_onto_an_offloaded_base(way, tmp_path):
    plain = shake(adapt(tiny.llama(), "dora"))
    lorakit.save(plain, tmp_path / "adapter")
    model = lorakit.load(send(tiny.llama(), way, tmp_path), tmp_path / "adapter", probe=True)
    assert torch.equal(logits(model), logits(plain))
    assert lorakit.proof.verify(tmp_path / "adapter", send(tiny.llama(), "cpu", tmp_path)).ok


def test_another_base_is_told_also_when_it_is_offloaded(tmp_path):
    lorakit.save(shake(adapt(tiny.llama(), "lora")), tmp_path / "adapter")
    with pytest.raises(LorakitError, match="was trained on another base"):
        lorakit.load(send(tiny.llama(seed=1), "disk", tmp_path), tmp_path / "adapter")


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("way", WAYS)
def test_merging_is_refused_and_changes_nothing(way, order, tmp_path):
    model = shake(offloaded("dora", way, order, tmp_path))
    y, was = logits(model), {n: (id(m), type(m), set(vars(m))) for n, m in model.named_modules()}
    for verb in (lorakit.merge, lorakit.merged, lambda m: lorakit.save_merged(m, tmp_path / "merged")):
        with pytest.raises(LorakitError, match=r"offloaded.*mend: load the model without offload"):
            verb(model)
    assert {n: (id(m), type(m), set(vars(m))) for n, m in model.named_modules()} == was
    assert torch.equal(logits(model), y) and not (tmp_path / "merged").exists()


def test_a_start_that_changes_the_base_is_refused_on_an_offloaded_one(tmp_path):
    model = send(tiny.llama(), "disk", tmp_path)
    y = logits(model)
    with pytest.raises(LorakitError, match=r"offloaded.*mend: load the model without offload"):
        lorakit.adapt(model, r=2, init={"name": "nonzero", "storage": "base"})
    assert torch.equal(logits(model), y) and not any(isinstance(m, host.Host) for m in model.modules())


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("way", WAYS)
def test_taking_adapters_off_gives_back_a_model_that_runs(way, order, tmp_path):
    y = logits(tiny.llama())
    model = shake(offloaded("saved", way, order, tmp_path))
    shake(lorakit.adapt(model, "dora", name="second", r=3), "second")
    lorakit.delete(model, "default")
    alone = logits(model)
    assert torch.equal(alone, logits(shake(lorakit.adapt(tiny.llama(), "dora", name="second", r=3), "second")))
    lorakit.detach(model)
    assert torch.equal(logits(model), y) and not any(isinstance(m, (host.Host, host.Leaves)) for m in model.modules())
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(logits(model), y) and not any(p.device.type == "meta" for p in model.parameters())


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("way", ["cpu", "disk"])
def test_the_hooks_may_go_before_the_adapters(way, order, tmp_path):
    """accelerate writes its copies back when a hook is taken off: never over what was trained since."""
    model, plain = offloaded("dora", way, order, tmp_path), adapt(tiny.llama(), "dora")
    steps(model)
    steps(plain)
    trained, y = {n: p.detach().clone() for n, p in leaves(model).items()}, logits(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert all(torch.equal(p, trained[n]) for n, p in leaves(model).items()), "the adapter's values from before the offload came back"
    assert torch.equal(logits(model), y) and float((y - logits(plain)).abs().max()) <= 1e-5
    steps(model)
    lorakit.merge(model)
    lorakit.detach(model)
    assert torch.equal(logits(model), logits(tiny.llama()))
    lorakit.adapt(model, r=2)
    assert float((logits(shake(model)) - logits(shake(lorakit.adapt(tiny.llama(), r=2)))).abs().max()) == 0.0


def test_an_optimizer_made_before_the_offload_still_trains(tmp_path):
    model = adapt(tiny.llama(), "lora")
    params = [p for p in model.parameters() if p.requires_grad]
    send(model, "disk", tmp_path)
    assert {id(p) for p in params} == {id(p) for p in model.parameters() if p.requires_grad}, "the adapter's tensors are other objects now"
    steps(model, 1)
    assert any(float(p.detach().abs().max()) > 0 for n, p in leaves(model).items() if "lora_B" in n)


def test_a_copy_of_an_offloaded_model_is_independent(tmp_path):
    model = shake(adapt(send(tiny.llama(), "cpu", tmp_path), "dora"))
    y, other = logits(model), copy.deepcopy(model)
    shake(other, seed=2)
    assert torch.equal(logits(model), y) and not torch.equal(logits(other), y)
    lorakit.detach(other)
    assert torch.equal(logits(other), logits(tiny.llama())) and torch.equal(logits(model), y)


def test_several_adapters_on_an_offloaded_model(tmp_path):
    outs = []
    for model in (tiny.llama(), send(tiny.llama(), "map", tmp_path)):
        shake(lorakit.adapt(model, "dora", r=2, name="a"), "a", 1)
        shake(lorakit.adapt(model, r=3, name="b", target_modules=["v_proj", "lm_head"]), "b", 2)
        got = [logits(model)]
        lorakit.activate(model, "a", "b", weights=[0.5, 1.0])
        got.append(logits(model))
        with lorakit.disabled(model):
            got.append(logits(model))
        with lorakit.rows(model, ["a", None, "b"]):
            got.append(logits(model))
        outs.append(got)
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


def as_blocks(model: nn.Module, folder) -> nn.Module:
    """Every decoder layer is loaded and dropped whole."""
    return accelerate.dispatch_model(model, dict.fromkeys(PARTS, "cpu") | {"model.layers.1": "disk"}, main_device="cpu", force_hooks=True,
                                     offload_dir=str(folder), preload_module_classes=["LlamaDecoderLayer"])


def test_blocks_that_are_offloaded_as_one_never_lose_an_adapter_silently(tmp_path):
    lorakit.save(shake(adapt(tiny.llama(), "dora")), tmp_path / "adapter")
    model = as_blocks(tiny.llama(), tmp_path / "a")
    for verb in (lambda: adapt(model, "dora"), lambda: lorakit.load(model, tmp_path / "adapter", check_base=False)):
        with pytest.raises(LorakitError, match=r"model\.layers\.1\.\S*: accelerate offloads the block around it as one \(preload_module_classes\).*mend:"):
            verb()
    assert torch.equal(logits(model), logits(tiny.llama())) and not any(isinstance(m, host.Host) for m in model.modules())
    lorakit.adapt(model, r=2, layers_to_transform=[0])

    model = as_blocks(shake(adapt(tiny.llama(), "dora")), tmp_path / "b")
    assert float((logits(model) - logits(lorakit.load(tiny.llama(), tmp_path / "adapter"))).abs().max()) <= 1e-6
    with pytest.raises(LorakitError, match=r"layers\.1\.\S* has no values \(meta device\); nothing was written"):
        lorakit.save(model, tmp_path / "lost")
    assert not (tmp_path / "lost").exists()
    trainer = AdapterTrainer(model=model, args=TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"), train_dataset=[])
    with pytest.raises(LorakitError, match=r"layers\.1\.\S* has no values here .*mend: adapt the model after offloading it, and offload it without preload"):
        trainer.create_optimizer()


@pytest.mark.parametrize("where", [{"": "cpu"}, dict.fromkeys(PARTS, "cpu") | {"model.layers.1": "disk"}, dict.fromkeys(PARTS, "disk") | {"lm_head": "cpu"}])
def test_a_model_that_transformers_loaded_with_a_device_map(where, tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    plain = shake(adapt(AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval(), "dora"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=where, offload_folder=str(tmp_path / "weights")).eval()
    prints = fingerprint(model)
    assert any(p.device.type == "meta" for p in model.parameters()) == ("disk" in where.values())
    shake(adapt(model, "dora"))
    assert torch.equal(logits(model), logits(plain)) and fingerprint(model) == prints == fingerprint(plain)
    assert steps(model) == pytest.approx(steps(plain), abs=1e-6)
    lorakit.save(model, tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=where, offload_folder=str(tmp_path / "weights2")).eval()
    assert torch.equal(logits(lorakit.load(again, tmp_path / "adapter", probe=True)), logits(model))
    lorakit.detach(model)
    assert torch.equal(logits(model), logits(tiny.llama()))
