"""Adapters on whole models: ties, hooks, copies, refusals, and that taking them off leaves nothing behind."""

from __future__ import annotations

import copy
import io
import pickle

import probes  # noqa: F401
import pytest
import tiny
import torch
from probes import Rotation, SharedBasis, SharedTrained
from safetensors import safe_open
from tiny import logits
from torch import nn
from transformers import AutoModelForCausalLM

import lorakit
from lorakit import LorakitError, host
from lorakit.methods.lora import LoRA

NAMES = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"], "bert": ["query", "dense"], "opt": ["q_proj", "v_proj"]}


@torch.no_grad()
def shake(model, name="default", seed=1):
    """Noise on all that trains, so that the adapter matters everywhere."""
    g = torch.Generator().manual_seed(seed)
    for _, slot in sorted(host.slots(model, name).items()):
        for _, t in sorted(slot.params(name).items()):
            if t.requires_grad:
                t.add_(torch.randn(t.shape, generator=g) * 0.2)
    return model


def picture(model):
    """Everything that must be as before once the adapters are off: objects, classes, attributes, values, what trains."""
    return {n: (id(m), type(m), set(vars(m))) for n, m in model.named_modules()} | {
        f"p:{n}": (id(p), p.requires_grad, p.detach().clone().flatten().tolist()) for n, p in model.named_parameters(remove_duplicate=False)}


class Two(nn.Module):
    """Two linear layers of different widths."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.slim = nn.Linear(12, 16), nn.Linear(16, 6)

    def forward(self, x):
        return self.slim(torch.tanh(self.wide(x)))


def x12():
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(3))


# Taking off


@pytest.mark.parametrize("method", ["lora", "dora", "lora-nonzero", "full"])
def test_detach_gives_back_the_very_model(whole, method):
    for n, p in whole.named_parameters():
        p.requires_grad_("bias" not in n and "norm" not in n)  # some trained before, some did not
    was, y, keys = picture(whole), logits(whole), list(whole.state_dict())
    targets = NAMES[whole.config.model_type]
    shake(lorakit.adapt(whole, method, target_modules=targets, r=2) if method != "full" else lorakit.adapt(whole, method, target_modules=targets))
    shake(lorakit.adapt(whole, "dora", name="second", target_modules="all-linear", r=3), "second")
    assert not torch.equal(logits(whole), y)
    assert not any(p.requires_grad for n, p in whole.named_parameters() if n in keys), "the base trains"
    lorakit.merge(whole)
    assert lorakit.detach(whole) is whole
    assert torch.equal(logits(whole), y) and list(whole.state_dict()) == keys
    assert picture(whole) == was


def test_delete_of_the_last_adapter_is_detach(llama):
    was = picture(llama)
    lorakit.adapt(llama, r=2, name="one")
    lorakit.adapt(llama, "dora", r=2, name="two", target_modules=["v_proj"])
    lorakit.delete(llama, "one")
    assert not isinstance(llama.model.layers[0].self_attn.q_proj, host.Host) and isinstance(llama.model.layers[0].self_attn.v_proj, host.Host)
    lorakit.delete(llama, "two")
    assert picture(llama) == was


@pytest.mark.parametrize("start", ["plain", "base"])
def test_nothing_stays_behind_when_an_attach_fails(start, llama):
    """A method that fits some targets and not others, with and without starts that change the base."""
    was, y = picture(llama), logits(llama)
    with pytest.raises(LorakitError, match="do not divide"):
        lorakit.adapt(llama, Rotation(k=3), target_modules=["up_proj", "down_proj"])
    with pytest.raises(LorakitError, match="orthonormal rows do not fit"):
        lorakit.adapt(llama, r=20, init={"name": "orthogonal", "storage": "base" if start == "base" else "offset"}, target_modules=["down_proj", "q_proj"])
    assert picture(llama) == was and torch.equal(logits(llama), y)
    lorakit.adapt(llama, r=2, name="there", target_modules=["q_proj"])
    before = picture(llama)
    with pytest.raises(LorakitError, match="do not divide"):
        lorakit.adapt(llama, Rotation(k=3), target_modules=["up_proj", "down_proj", "q_proj"])
    assert picture(llama) == before and list(lorakit.adapters(llama)) == ["there"] and lorakit.active(llama) == {"there": 1.0}


def test_a_start_taken_out_of_the_base_that_fails_half_way_gives_the_base_back():
    model, x = Two(), x12()
    was, y = picture(model), model(x)
    lorakit.sites.site_for(model.wide)  # both are adaptable
    model.slim.max_out = 1
    vars(model.slim)["forward"] = lambda x: nn.functional.linear(x, model.slim.weight, model.slim.bias)
    was = picture(model)
    with pytest.raises(LorakitError, match="slim: its forward was replaced"):
        lorakit.adapt(model, "lora-nonzero", r=2, init={"name": "nonzero", "storage": "base"}, target_modules=["wide", "slim"])
    assert picture(model) == was and torch.equal(model(x), y)


# Refusals, each with its reason


def test_a_replaced_forward_is_refused(llama):
    layer = llama.model.layers[0].self_attn.q_proj
    layer.forward = lambda x: nn.functional.linear(x, layer.weight)
    with pytest.raises(LorakitError, match=r"model\.layers\.0\.self_attn\.q_proj: its forward was replaced .* mend: adapt the model first"):
        lorakit.adapt(llama, r=2)
    assert not any(isinstance(m, host.Host) for m in llama.modules())


@torch.no_grad()
def test_a_fused_encoder_layer_never_skips_its_adapter_silently():
    torch.manual_seed(0)
    block, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(2, 3, 8)
    y = block(x)
    with pytest.raises(LorakitError, match=r"linear1: TransformerEncoderLayer reads .* mend: torch\.backends\.mha\.set_fastpath_enabled\(False\)"):
        lorakit.adapt(block, r=2, target_modules=["linear1", "linear2"])
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        shake(lorakit.adapt(block, r=2, target_modules=["linear1", "linear2"]))
        assert float((block(x) - y).abs().max()) > 1e-3
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


class Shouting(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Quiet(nn.Linear):
    """A subclass that computes what its parent does."""

    note = "kept"


def test_a_subclass_with_its_own_forward_is_refused_and_one_without_is_not():
    model = nn.Sequential(Shouting(4, 4), Quiet(4, 4))
    with pytest.raises(LorakitError, match=r"0: .*Shouting has a forward of its own, not Linear's"):
        lorakit.adapt(model, r=2, target_modules=["0", "1"])
    lorakit.adapt(model, r=2, target_modules=["1"])
    assert isinstance(model[1], Quiet) and model[1].note == "kept" and type(model[1]).__name__ == "AdaptedQuiet"


def test_an_embedding_that_renormalises_is_refused():
    with pytest.raises(LorakitError, match="max_norm"):
        lorakit.adapt(nn.Sequential(nn.Embedding(8, 4, max_norm=1.0)), r=2, target_modules=["0"])


@pytest.mark.parametrize(("name", "why"), [("a.b", "one word without dots"), ("", "one word without dots")])
def test_names_of_adapters(name, why, llama):
    with pytest.raises(LorakitError, match=why):
        lorakit.adapt(llama, r=2, name=name)


def test_a_second_adapter_of_the_same_name_is_refused(llama):
    lorakit.adapt(llama, r=2)
    with pytest.raises(LorakitError, match=r"already has an adapter `default`; mend: another name, or lorakit\.delete"):
        lorakit.adapt(llama, r=4)


def test_verbs_name_the_nearest_adapter(llama):
    with pytest.raises(LorakitError, match=r"this LlamaForCausalLM has no adapters; mend: lorakit\.adapt"):
        lorakit.activate(llama, "x")
    lorakit.adapt(llama, r=2, name="pirate")
    for verb in (lorakit.activate, lorakit.delete, lorakit.freeze):
        with pytest.raises(LorakitError, match="no adapter `pirat`; did you mean `pirate`"):
            verb(llama, "pirat")
    with pytest.raises(LorakitError, match="1 adapters but 2 weights"):
        lorakit.activate(llama, "pirate", weights=[1, 2])


def test_order_of_merge_and_the_rest(llama):
    lorakit.adapt(llama, r=2)
    with pytest.raises(LorakitError, match="nothing is merged"):
        lorakit.unmerge(llama)
    lorakit.merge(llama)
    for verb in (lorakit.merge, lambda m: lorakit.activate(m, "default"), lambda m: lorakit.delete(m, "default"), lambda m: lorakit.adapt(m, name="b")):
        with pytest.raises(LorakitError, match=r"merged.*mend: lorakit\.unmerge"):
            verb(llama)
    lorakit.unmerge(llama)
    lorakit.activate(llama)
    with pytest.raises(LorakitError, match="no adapter is active"):
        lorakit.merge(llama)


def test_a_merge_that_would_not_be_finite_changes_nothing(llama):
    lorakit.adapt(llama, r=2)
    was = picture(llama)
    with torch.no_grad():
        llama.model.layers[1].mlp.down_proj.lora_B.default.fill_(float("inf"))
    with pytest.raises(LorakitError, match=r"model\.layers\.1\.mlp\.down_proj: the merged weight is not finite"):
        lorakit.merge(llama)
    now = picture(llama)
    assert {k: v for k, v in now.items() if "lora_B" not in k} == {k: v for k, v in was.items() if "lora_B" not in k}


def test_extra_arguments_to_a_layer_are_not_swallowed():
    class Takes(nn.Linear):
        pass

    model = nn.Sequential(Takes(4, 4))
    lorakit.adapt(model, r=2, target_modules=["0"])
    with pytest.raises(LorakitError, match="called with more than its input"):
        model[0](torch.ones(2, 4), scale=2)


# Ties


@pytest.mark.parametrize("side", ["embed_tokens", "lm_head"])
def test_tied_weights_stay_tied_until_one_side_is_merged(side, tied_llama, tmp_path):
    model, y0 = tied_llama, logits(tied_llama)
    head, table = model.lm_head, model.model.embed_tokens
    shake(lorakit.adapt(model, r=2, target_modules=[side]))
    assert head.weight is table.weight, "adapting must not part a tie"
    y, shared = logits(model), head.weight
    lorakit.merge(model)
    adapted, other = (table, head) if side == "embed_tokens" else (head, table)
    assert adapted.weight is not shared and other.weight is shared, "only the adapted side gets a weight of its own"
    assert float((logits(model) - y).abs().max()) < 1e-4
    lorakit.unmerge(model)
    assert head.weight is table.weight and head.weight is shared

    new = lorakit.merged(model)
    assert new.config.tie_word_embeddings is False and model.config.tie_word_embeddings is True
    new.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert float((logits(again) - y).abs().max()) < 1e-4, "the tie comes back on loading and swallows the merge"
    lorakit.detach(model)
    assert torch.equal(logits(model), y0)


def test_ties_that_no_adapter_touches_survive_a_merge(tied_llama):
    shake(lorakit.adapt(tied_llama, r=2, target_modules=["q_proj"]))
    new = lorakit.merged(tied_llama)
    assert new.lm_head.weight is new.model.embed_tokens.weight and new.config.tie_word_embeddings is True


# accelerate


def test_a_hook_that_was_there_first_calls_the_adapter(llama):
    hooks = pytest.importorskip("accelerate.hooks")
    plain = shake(lorakit.adapt(tiny.llama(), "dora", r=2))
    y0 = logits(llama)
    for m in llama.modules():
        if isinstance(m, nn.Linear):
            hooks.add_hook_to_module(m, hooks.AlignDevicesHook(io_same_device=True))
    shake(lorakit.adapt(llama, "dora", r=2))
    assert torch.equal(logits(llama), logits(plain)) and not torch.equal(logits(llama), y0), "the hook skips the adapter"
    lorakit.detach(llama)
    assert torch.equal(logits(llama), y0)
    hooks.remove_hook_from_module(llama, recurse=True)
    assert torch.equal(logits(llama), y0)


def test_a_hook_that_came_later_calls_the_adapter(llama):
    hooks = pytest.importorskip("accelerate.hooks")
    shake(lorakit.adapt(llama, r=2))
    y = logits(llama)
    hooks.add_hook_to_module(llama.model.layers[0].self_attn.q_proj, hooks.ModelHook())
    assert torch.equal(logits(llama), y)
    base = logits(lorakit.detach(llama))
    assert torch.equal(base, logits(tiny.llama()))


@pytest.mark.parametrize("method", ["lora", "dora", "lora-nonzero"])
def test_an_offloaded_model_is_adapted_as_one_in_memory(method, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    plain = shake(lorakit.adapt(tiny.llama(), method, r=2))
    model = tiny.llama()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.lm_head.weight.device.type == "meta"
    shake(lorakit.adapt(model, method, r=2))
    assert torch.equal(logits(model), logits(plain))
    with pytest.raises(LorakitError, match=r"offloaded.*mend: load the model without offload"):
        lorakit.merge(model)
    assert torch.equal(logits(model), logits(plain)), "a refused merge must leave the model alone"
    lorakit.save(model, tmp_path)
    assert torch.equal(logits(lorakit.load(tiny.llama(), tmp_path)), logits(plain) if method != "lora-nonzero" else logits(
        lorakit.load(tiny.llama(), lorakit.save(plain, tmp_path / "plain")))), "the receipt of an offloaded base must be that of the base"


def test_disk_offload_with_a_device_map(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, plain = tiny.llama(), shake(lorakit.adapt(tiny.llama(), r=2))
    accelerate.dispatch_model(model, {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
                                      "model.rotary_emb": "cpu", "lm_head": "cpu"}, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert model.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    shake(lorakit.adapt(model, r=2))
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_offloading_an_adapted_model(method, llama):
    """accelerate offloads the leaves too, and hooks holders that are never called: they must come from its map."""
    accelerate = pytest.importorskip("accelerate")
    y = logits(shake(lorakit.adapt(llama, method, r=2)))
    accelerate.cpu_offload(llama, execution_device=torch.device("cpu"))
    assert torch.equal(logits(llama), y)


# Several adapters


def test_chained_adapters_act_one_on_the_other(llama):
    shake(lorakit.adapt(llama, r=2, name="a"), "a", 1)
    shake(lorakit.adapt(llama, "dora", r=2, name="b"), "b", 2)
    lorakit.activate(llama, "a", "b", chain=True)
    chained = logits(llama)
    lorakit.activate(llama, "a", "b")
    assert float((logits(llama) - chained).abs().max()) > 1e-3, "a chain with DoRA is not a sum"
    lorakit.activate(llama, "a", "b", chain=True)
    lorakit.merge(llama)
    assert float((logits(llama) - chained).abs().max()) < 1e-3
    lorakit.unmerge(llama)
    assert torch.equal(logits(llama), chained)
    lorakit.activate(llama, "a")
    a = logits(llama)
    lorakit.delete(llama, "b")
    assert torch.equal(logits(llama), a)


def test_switching_walks_no_modules(llama, monkeypatch):
    for n in "abc":
        lorakit.adapt(llama, r=2, name=n)
    states = {id(s.state) for s in host.slots(llama).values()}
    assert len(states) == 1, "one state for the whole model"
    state, seen, every = host.state_of(llama), [], list(llama.modules())
    first = next(n for n, m in enumerate(every) if isinstance(m, host.Host))

    def counted(self, *args, **kw):
        for m in every:
            seen.append(m)
            yield m

    monkeypatch.setattr(nn.Module, "modules", counted)
    for place, name in ((host, "slots"), (host.adapters, "_strip"), (host.module, "host")):
        monkeypatch.setattr(place, name, None)  # whoever walks the layers fails
    monkeypatch.setattr(nn.Module, "named_modules", None)
    lorakit.activate(llama, "a", "c", weights=[1.0, 0.5])
    assert state.active == {"a": 1.0, "c": 0.5}
    with lorakit.disabled(llama), lorakit.rows(llama, ["a", None]):
        pass
    assert len(seen) <= 3 * (first + 1), "the state is found at the first adapted layer; no verb goes past it"


def test_rows_restore_what_was_active_also_after_an_error(llama):
    shake(lorakit.adapt(llama, r=2, name="a"), "a")
    shake(lorakit.adapt(llama, r=2, name="b"), "b", 2)
    y = logits(llama)
    with pytest.raises(LorakitError, match="a mixed batch of 2 rows got an input whose first dimension is 3"), lorakit.rows(llama, ["a", "b"]):
        logits(llama)
    assert torch.equal(logits(llama), y)
    with pytest.raises(RuntimeError), lorakit.disabled(llama):
        raise RuntimeError
    assert torch.equal(logits(llama), y)


def test_rows_of_a_whole_model(whole):
    targets = NAMES[whole.config.model_type]
    base, out = logits(whole), {}
    for k, n in enumerate("ab"):
        shake(lorakit.adapt(whole, ["lora", "dora"][k], r=2 + k, name=n, target_modules=targets), n, k)
        out[n] = logits(whole)
    with lorakit.rows(whole, ["b", None, "a"]):
        y = logits(whole)
    for k, want in enumerate((out["b"], base, out["a"])):
        assert float((y[k] - want[k]).abs().max()) < 1e-5


def test_rows_follow_where_a_model_folds_batch_and_tokens(opt):
    """OPT's feed-forward layers see (batch * tokens, width)."""
    shake(lorakit.adapt(opt, r=2, target_modules=["fc1", "fc2"]), "default")
    y = logits(opt)
    with lorakit.disabled(opt):
        base = logits(opt)
    with lorakit.rows(opt, ["default", None, "default"]):
        mixed = logits(opt)
    for k, want in enumerate((y, base, y)):
        assert float((mixed[k] - want[k]).abs().max()) < 1e-5
    assert float((y - base).abs().max()) > 1e-2


def test_norms_follow_a_change_of_dtype():
    model, x = Two(), x12()
    shake(lorakit.adapt(model, "dora", r=2, target_modules=["wide"]))
    model(x)
    model.double()
    slot = model.wide.slot
    exact = slot.map({"default": 1.0}).weight().detach().norm(dim=1)
    assert exact.dtype == torch.float64 and float((exact - slot.params("default")["m"].detach().abs()).abs().max()) < 1e-12
    kept = slot.map({}).row_sq()
    assert kept.dtype == torch.float64 and torch.equal(kept, model.wide.weight.detach().square().sum(1))


# Copies


@pytest.mark.parametrize("method", ["lora", "dora", "lora-nonzero"])
def test_copies_of_a_whole_model_are_independent(method, llama):
    shake(lorakit.adapt(llama, method, r=2, target_modules="all-linear"))
    y = logits(llama)
    buffer = io.BytesIO()
    torch.save(llama, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(llama), pickle.loads(pickle.dumps(llama)), torch.load(buffer, weights_only=False)):
        assert torch.equal(logits(other), y)
        mine, theirs = ({id(p) for p in m.parameters()} | {p.data_ptr() for p in m.parameters()} for m in (llama, other))
        assert not mine & theirs, "a copy shares tensors with the original"
        assert len({id(s.state) for s in host.slots(other).values()}) == 1 and host.state_of(other) is not host.state_of(llama)
        assert all(s.module is m for (n, s), m in ((i, dict(other.named_modules())[i[0]]) for i in host.slots(other).items()))
        lorakit.detach(other)
        assert torch.equal(logits(other), logits(tiny.llama())) and torch.equal(logits(llama), y)


def test_a_whole_model_compiles_without_a_break(llama):
    shake(lorakit.adapt(llama, "dora", r=2))
    y = logits(llama)
    torch._dynamo.reset()
    fast = torch.compile(llama.model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert float((fast(tiny.ids()).last_hidden_state @ llama.lm_head.weight.mT - y).abs().max()) < 1e-4


def test_gradient_checkpointing_of_a_whole_model(llama):
    lorakit.adapt(llama, r=2, lora_dropout=0.2)
    shake(llama).train()
    grads = []
    for on in (False, True):
        if on:
            llama.gradient_checkpointing_enable({"use_reentrant": False})
        llama.zero_grad()
        torch.manual_seed(1)
        llama(tiny.ids(), labels=tiny.ids()).loss.backward()
        grads.append({n: p.grad.clone() for n, p in llama.named_parameters() if p.grad is not None})
    assert grads[0] and grads[0].keys() == grads[1].keys() and all(torch.equal(grads[0][n], g) for n, g in grads[1].items())


def test_generation_goes_through_the_adapter(llama):
    lorakit.adapt(llama, r=4)
    shake(llama)
    with torch.no_grad():
        live = llama.generate(tiny.ids(2, 4), max_new_tokens=6, do_sample=False, pad_token_id=0)
        merged = lorakit.merged(llama).generate(tiny.ids(2, 4), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(live, merged)


# Seeds, shared leaves, dropout, dtypes


def starts(model, name="default"):
    return {p: {k: t.detach().clone() for k, t in s.params(name).items()} for p, s in host.slots(model, name).items()}


def test_starts_depend_on_seed_and_path_alone():
    torch.manual_seed(11)
    a = starts(lorakit.adapt(tiny.llama(), r=2, target_modules=["q_proj", "up_proj"]))
    torch.manual_seed(12)
    b = starts(lorakit.adapt(tiny.llama(), r=2, target_modules=["up_proj", "q_proj", "v_proj"]))
    assert all(torch.equal(a[p][k], b[p][k]) for p in a for k in a[p]), "order, number of targets or the global generator matter"
    c = starts(lorakit.adapt(tiny.llama(), r=2, target_modules=["q_proj"], seed=1))
    assert not any(torch.equal(a[p]["A"], c[p]["A"]) for p in c), "the seed does not matter"
    same_shape = [v["A"] for p, v in a.items() if "q_proj" in p]
    assert not torch.equal(*same_shape), "two layers start alike"


def test_adapting_does_not_touch_the_global_generator(llama):
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    lorakit.adapt(llama, "dora", r=2, init="gaussian")
    assert torch.equal(torch.rand(4), want)


@pytest.mark.parametrize("method", [SharedBasis(r=3), SharedTrained(r=3)])
def test_a_shared_leaf_exists_once(method, tmp_path):
    model, x = Two(), x12()
    shake(lorakit.adapt(model, method, target_modules=["wide", "slim"]))
    y = model(x)
    names = [n for n, _ in model.named_parameters() if n.endswith("_A.default")]
    assert len(names) == 1
    A = dict(model.named_parameters())[names[0]]
    assert list(A.shape) == [3, 16], "as large as the widest layer needs"
    everyone = [m._modules[n].default for m in (model.wide, model.slim) for n in m._modules if n.endswith("_A")]
    assert len(everyone) == 2 and all(e is A for e in everyone)
    trains = [p for p in model.parameters() if p.requires_grad]
    assert len({id(p) for p in trains}) == len(trains) and lorakit.trainable(model)[0] == sum(p.numel() for p in trains)
    if A.requires_grad:  # one optimiser step moves both layers' view of it
        y.square().sum().backward()
        torch.optim.SGD(trains, 0.1).step()
        assert all(torch.equal(s.params("default")["A"], A[:, : s.site.in_]) for s in (model.wide.slot, model.slim.slot))
    lorakit.save(model, tmp_path, form="native")
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as f:
        keys = [k for k in f.keys() if "_A" in k]  # noqa: SIM118
    assert len(keys) == 1 and keys[0].startswith("base_model.probe")
    again = lorakit.load(Two(), tmp_path)
    assert torch.equal(again(x), model(x))
    assert len([n for n, _ in again.named_parameters() if n.endswith("_A.default")]) == 1
    other = copy.deepcopy(model)
    assert len([n for n, _ in other.named_parameters() if n.endswith("_A.default")]) == 1, "a copy has two"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_leaves_live_in_float32_over_a_small_base(dtype):
    model = lorakit.adapt(tiny.llama().to(dtype), "dora", r=2)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "lora_" not in n} == {dtype}
    shake(model)
    y = logits(model)
    assert y.dtype == dtype and torch.isfinite(y).all()
    assert {p.dtype for p in lorakit.merged(model).parameters()} == {dtype}


def test_freeze_keeps_the_effect_and_stops_training(llama):
    shake(lorakit.adapt(llama, r=2))
    y = logits(llama)
    lorakit.freeze(llama, "default")
    assert torch.equal(logits(llama), y) and lorakit.trainable(llama)[0] == 0


def test_one_layer_used_twice_is_one_slot():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    lorakit.adapt(model, LoRA(2), target_modules=["0"])
    assert len(host.slots(model)) == 1 and model[0] is model[2]
    shake(model)
    assert lorakit.trainable(model)[0] == 16
    lorakit.detach(model)
    assert type(shared) is nn.Linear


@pytest.mark.xfail(strict=True, reason="norms of the base's rows are kept until `_version` changes, which an edit through `.data` does not do: "
                                       "DoRA then divides by stale norms. PEFT's merge and many averaging scripts edit through `.data`.")
def test_norms_follow_an_edit_of_the_base_through_data():
    model, x = Two(), x12()
    shake(lorakit.adapt(model, "dora", r=2, target_modules=["wide"]))
    model(x)
    model.wide.weight.data.mul_(2.0)
    slot = model.wide.slot
    want = slot.site.op(x, slot.map({"default": 1.0}).weight()) + model.wide.bias
    assert float((model.wide(x) - want).detach().abs().max()) < 1e-4
