"""Targets that are read and not called (attention projections, fused experts, any parameter), what is trained beside the targets, and weights that are tied."""

from __future__ import annotations

import copy
import pickle

import pytest
import tiny
import torch
from torch import nn

import lorakit
from lorakit import host
from lorakit.errors import LorakitError
from lorakit.methods.lora import LoRA
from lorakit.methods.tokens import Tokens
from lorakit.testing import check_method

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@torch.no_grad()
def shake(model, name="default", seed=1, size=0.2):
    g = torch.Generator().manual_seed(seed)
    for _, slot in sorted(host.slots(model, name).items()):
        for _, t in sorted(slot.params(name).items()):
            if t.is_floating_point() and name not in slot.tied:
                t.add_(torch.randn(t.shape, generator=g) * size)
    return model


def gap(a, b):
    return float((a - b).detach().abs().max())


class Attention(nn.Module):
    """torch's attention in all its forms: one width or three, batch first or not, with both masks."""

    def __init__(self, packed=True, batch_first=True, heads=2):
        super().__init__()
        torch.manual_seed(0)
        widths = {} if packed else {"kdim": 6, "vdim": 4}
        self.widths, self.first = (8, 6, 4) if not packed else (8, 8, 8), batch_first
        self.attn = nn.MultiheadAttention(8, heads, batch_first=batch_first, **widths)

    def forward(self, seed: int = 0, rows: int = 4, masks: bool = True, pick=None):
        g = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(rows, n, w, generator=g) for n, w in zip((3, 5, 5), self.widths, strict=True))
        pad = torch.rand(rows, 5, generator=g) < 0.3
        pad[:, 0] = False
        mask = torch.randn(rows, self.attn.num_heads, 3, 5, generator=g)
        if pick is not None:
            q, k, v, pad, mask = (t[pick: pick + 1] for t in (q, k, v, pad, mask))
        if not self.first:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        more = {"key_padding_mask": torch.zeros(pad.shape).masked_fill(pad, -1e4), "attn_mask": mask.flatten(0, 1)} if masks else {}
        y, w = self.attn(q, k, v, **more)
        return (y if self.first else y.transpose(0, 1)), w


# Attention


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("method", ["lora", "dora", "lora-nonzero", "full"])
def test_every_projection_of_an_attention_is_adapted(method, packed, batch_first, tmp_path):
    def build():
        return Attention(packed, batch_first).eval()

    model = shake(lorakit.adapt(build(), method, target_modules=["attn"], **({} if method == "full" else {"r": 2})))
    want = {"in_proj_weight"} if packed else {"q_proj_weight", "k_proj_weight", "v_proj_weight"}
    assert set(host.slots(model)) == {f"attn.{n}" for n in want | {"out_proj"}}
    y, base = model()[0], build()()[0]
    assert gap(y, base) > 1e-2
    assert gap(lorakit.merged(model)()[0], y) < 1e-5
    for slot in host.slots(model).values():  # each of them matters
        again = copy.deepcopy(model)
        twin = host.slots(again)[slot.path]
        twin.methods.pop("default")
        assert gap(again()[0], y) > 1e-3, slot.path
    lorakit.save(model, tmp_path)
    assert gap(lorakit.load(build(), tmp_path)()[0], y) < 1e-5  # torch has another way through it where nothing trains
    y.square().sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for n, p in model.named_parameters() if p.requires_grad)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin()[0], y)
    lorakit.detach(model)
    assert type(model.attn) is nn.MultiheadAttention and torch.equal(build()(masks=False)[0], model(masks=False)[0])


@torch.no_grad()
@pytest.mark.parametrize("batch_first", [True, False])
def test_rows_of_an_attention_bring_their_masks(batch_first):
    model = Attention(batch_first=batch_first).eval()
    for k, n in enumerate("ab"):
        shake(lorakit.adapt(model, ["lora", "dora"][k], r=2 + k, name=n, target_modules=["attn"]), n, k)
    names = ["b", "a", None, "b", "a"]
    with lorakit.rows(model, names):
        y, w = model(rows=5)
    for k, n in enumerate(names):
        lorakit.activate(model, *([n] if n else []))
        alone, weights = model(rows=5, pick=k)
        assert gap(y[k: k + 1], alone) < 1e-5 and gap(w[k: k + 1], weights) < 1e-5, f"row {k}"


@torch.no_grad()
def test_one_projection_alone_and_by_name():
    model = lorakit.adapt(Attention(), r=2, target_modules=["out_proj"])
    assert set(host.slots(model)) == {"attn.out_proj"}
    model = lorakit.adapt(Attention(), r=2, target_parameters=["in_proj_weight"])
    assert set(host.slots(model)) == {"attn.in_proj_weight"}
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [f"attn.in_proj_weight_adapter.lora_{x}.default" for x in "AB"]


@torch.no_grad()
def test_a_whole_encoder_of_torch(tmp_path):
    """all-linear takes the attention's projections too; PEFT wraps out_proj alone, where nothing calls it."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(3, 5, 8)
    with pytest.raises(LorakitError, match=r"in_proj_weight: TransformerEncoderLayer reads .* mend: torch\.backends\.mha\.set_fastpath_enabled\(False\)"):
        lorakit.adapt(model, r=2)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        base = model(x)
        lorakit.adapt(model, r=2)
        assert {p.rpartition(".")[2] for p in host.slots(model)} == {"in_proj_weight", "out_proj", "linear1", "linear2"}
        y = shake(model)(x)
        assert gap(y, base) > 1e-2 and gap(lorakit.merged(model)(x), y) < 1e-5
        with lorakit.rows(model, ["default", None, "default"]):
            mixed = model(x)
        assert gap(mixed[1], base[1]) < 1e-5 and gap(mixed[[0, 2]], y[[0, 2]]) < 1e-5
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


# Experts


@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("method", ["lora", "dora", "rslora", "lora-nonzero", "full"])
def test_fused_experts(method, way, tmp_path):
    def build():
        model = tiny.mixtral()
        model.set_experts_implementation(way)
        return model

    model = shake(lorakit.adapt(build(), method, target_parameters="experts", **({} if method == "full" else {"r": 2})))
    assert set(host.slots(model)) == {f"model.layers.{k}.mlp.{e}" for k in (0, 1) for e in EXPERTS}
    y, base = tiny.logits(model), tiny.logits(build())
    assert gap(y, base) > 1e-2 and gap(tiny.logits(lorakit.merged(model)), y) < 2e-5
    lorakit.save(model, tmp_path)
    assert gap(tiny.logits(lorakit.load(build(), tmp_path)), y) < 1e-5
    assert lorakit.verify(tmp_path, build()).ok
    model(tiny.ids(), labels=tiny.ids()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad(), lorakit.rows(model, ["default", None, "default"]):
        mixed = tiny.logits(model)
    assert gap(mixed[1], base[1]) < 1e-5 and gap(mixed[[0, 2]], y[[0, 2]]) < 2e-5


def test_every_expert_has_its_own_matrices():
    model = lorakit.adapt(tiny.mixtral(), r=3, target_parameters=EXPERTS)
    slot = host.slots(model)["model.layers.0.mlp.experts.gate_up_proj"]
    assert {k: tuple(t.shape) for k, t in slot.params("default").items()} == {"A": (4, 3, 16), "B": (4, 48, 3)}
    A = slot.params("default")["A"]
    assert gap(A[0], A[1]) > 1e-2, "experts start alike"
    assert lorakit.trainable(model)[0] == 2 * 4 * 3 * (16 + 48 + 24 + 16)


def test_a_stack_starts_from_its_own_matrices():
    """DoRA's magnitude is the row norms of each expert, a start taken out of the base is taken out of each."""
    model = lorakit.adapt(tiny.mixtral(), "dora", r=2, target_parameters=EXPERTS)
    slot = host.slots(model)["model.layers.1.mlp.experts.down_proj"]
    assert torch.allclose(slot.params("default")["m"], slot.site.store.read().norm(dim=-1))
    base = tiny.mixtral()
    took = lorakit.adapt(tiny.mixtral(), "lora", r=2, target_parameters=EXPERTS, init={"name": "nonzero", "storage": "base"})
    assert gap(tiny.logits(took), tiny.logits(base)) < 1e-5
    assert gap(took.model.layers[0].mlp.experts.down_proj, base.model.layers[0].mlp.experts.down_proj) > 1e-4
    lorakit.detach(took)
    assert torch.equal(tiny.logits(took), tiny.logits(base))


def test_names_of_parameters_must_exist():
    with pytest.raises(LorakitError, match=r"target_parameters: no parameter is called `experts.gate_proj`; did you mean `experts.gate_up_proj`"):
        lorakit.adapt(tiny.mixtral(), target_parameters=["experts.gate_proj"])
    with pytest.raises(LorakitError, match="this LlamaForCausalLM has no fused experts"):
        lorakit.adapt(tiny.llama(), target_parameters="experts")
    with pytest.raises(LorakitError, match=r"`experts` is a MixtralExperts.* target_parameters: \[experts.gate_up_proj\]"):
        lorakit.adapt(tiny.mixtral(), target_modules=["experts"])


def test_the_weight_of_a_plain_layer_is_the_layer():
    model = lorakit.adapt(tiny.llama(), r=2, target_parameters=["q_proj.weight"])
    assert set(host.slots(model)) == {f"model.layers.{k}.self_attn.q_proj" for k in (0, 1)}


def test_a_layer_with_a_forward_of_its_own_is_adapted_by_its_parameter(tmp_path):
    """OPT looks positions up two rows further down, so its class is no plain embedding."""
    with pytest.raises(LorakitError, match=r"has a forward of its own.* target_parameters: \[embed_positions.weight\]"):
        lorakit.adapt(tiny.opt(), r=2, target_modules=["embed_positions"])
    model = shake(lorakit.adapt(tiny.opt(), r=2, target_parameters=["embed_positions.weight"]))
    y = tiny.logits(model)
    assert gap(y, tiny.logits(tiny.opt())) > 1e-2 and gap(tiny.logits(lorakit.merged(model)), y) < 1e-5
    lorakit.save(model, tmp_path)
    assert torch.equal(tiny.logits(lorakit.load(tiny.opt(), tmp_path)), y)


def test_an_adapter_on_a_layer_and_one_on_its_parameter_do_not_mix():
    model = lorakit.adapt(tiny.llama(), r=2, name="a", target_modules=["embed_tokens"])
    with pytest.raises(LorakitError, match=r"embed_tokens.weight: another adapter is on the layer itself"):
        lorakit.adapt(model, r=2, name="b", target_parameters=["embed_tokens.weight"])
    assert list(lorakit.adapters(model)) == ["a"] and not any(isinstance(m, host.Holder) for m in model.modules())


# What trains beside the targets


def test_biases_belong_to_their_adapter(tmp_path):
    """PEFT trains the base's own biases, so they stay when the adapter is off; here they go with it."""
    model, base = tiny.opt(), tiny.logits(tiny.opt())
    for k, n in enumerate(("a", "b")):
        shake(lorakit.adapt(model, "lora", r=2, name=n, target_modules=["q_proj"], bias="all"), n, k)
    biases = [n for n, _ in tiny.opt().named_parameters() if "bias" in n]
    assert len([n for n, p in model.named_parameters() if p.requires_grad and "bias" in n]) == 2 * len(biases)
    out = {}
    for n in ("a", "b"):
        lorakit.activate(model, n)
        out[n] = tiny.logits(model)
    assert gap(out["a"], out["b"]) > 1e-2
    with lorakit.disabled(model):
        assert torch.equal(tiny.logits(model), base)
    with torch.no_grad(), lorakit.rows(model, ["b", None, "a"]):
        mixed = tiny.logits(model)
    for k, want in enumerate((out["b"], base, out["a"])):
        assert gap(mixed[k], want[k]) < 1e-5
    lorakit.save(model, tmp_path, "b")
    assert torch.equal(tiny.logits(lorakit.load(tiny.opt(), tmp_path)), out["b"])


def test_bitfit_needs_biases():
    with pytest.raises(LorakitError, match=r"q_proj: bitfit trains a bias, and this layer has none"):
        lorakit.adapt(tiny.llama(), "bitfit", target_modules=["q_proj"])
    model = lorakit.adapt(tiny.opt(), "bitfit")
    assert all(n.endswith("modules_to_save_bias.default") for n, p in model.named_parameters() if p.requires_grad)
    with pytest.raises(LorakitError, match="bias: unknown `lora`; did you mean `lora_only`"):
        lorakit.adapt(tiny.opt(), bias="lora")


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.ln, self.out = nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.LayerNorm(5), nn.Linear(5, 2)

    def forward(self, x):
        return self.out(self.ln(self.bn(self.conv(x))))


def test_norms_are_trained_whole_with_their_running_statistics(tmp_path):
    model, x = Norms(), torch.randn(6, 3, 7)
    lorakit.adapt(model, r=2, target_modules=["conv"], modules_to_save=["bn", "ln"])
    was = {k: v.clone() for k, v in Norms().state_dict().items()}
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.02)
    for _ in range(3):
        model.train()(x).square().sum().backward()
        opt.step()
        opt.zero_grad()
    model.eval()
    y = model(x)
    assert gap(model.bn.running_mean_adapter.modules_to_save.default.flatten(), was["bn.running_mean"]) > 1e-3, "the copy's statistics stand still"
    assert all(torch.equal(v, was[k]) for k, v in lorakit.detach(copy.deepcopy(model)).state_dict().items() ), "the base moved"
    assert int(model.bn.num_batches_tracked_adapter.modules_to_save.default) == 3
    lorakit.save(model, tmp_path)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "running" in n)
    assert gap(lorakit.load(Norms().eval(), tmp_path)(x), y) < 1e-6
    assert gap(lorakit.merged(model)(x), y) < 1e-5


def test_modules_to_save_names_what_is_there():
    with pytest.raises(LorakitError, match="modules_to_save: no module is called `nrom`; did you mean `norm`"):
        lorakit.adapt(tiny.llama(), r=2, modules_to_save=["nrom"])


# Token rows


def test_only_the_named_rows_move(tmp_path):
    model = lorakit.adapt(tiny.llama(tied=True), r=2, target_modules=["q_proj"], trainable_token_indices=[5, 40])
    table = model.model.embed_tokens.weight.detach().clone()
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    x = torch.tensor([[5, 6, 40, 7, 5, 9]])
    for _ in range(2):
        model(input_ids=x, labels=x).loss.backward()
        opt.step()
        opt.zero_grad()
    slots = host.slots(model)
    now, head = (slots[p].map({"default": 1.0}).weight() for p in ("model.embed_tokens", "lm_head"))
    moved = (now.mT - table).abs().sum(1) > 0
    assert moved.nonzero().flatten().tolist() == [5, 40] and torch.equal(now.mT, head), "other rows moved, or the tied head did not follow"
    y = tiny.logits(model)
    merged = lorakit.merged(model)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight and merged.config.tie_word_embeddings
    assert gap(tiny.logits(merged), y) < 1e-5
    lorakit.save(model, tmp_path)
    assert gap(tiny.logits(lorakit.load(tiny.llama(tied=True), tmp_path)), y) < 1e-6
    assert [n for n, p in model.named_parameters() if p.requires_grad and "token" in n] == ["model.embed_tokens.token_adapter_trainable_tokens_delta.default"]


def test_new_tokens_are_rows_of_the_adapter():
    """Added tokens start at random in every process; the file replaces them, it does not add to them."""
    def grown(seed):
        model = tiny.llama(tied=True)
        torch.manual_seed(seed)
        model.resize_token_embeddings(tiny.VOCAB + 2, mean_resizing=False)
        return model.eval()

    model = shake(lorakit.adapt(grown(1), r=2, target_modules=["q_proj"], trainable_token_indices=[tiny.VOCAB, tiny.VOCAB + 1]))
    x = torch.tensor([[4, tiny.VOCAB, 9, tiny.VOCAB + 1]])
    y = tiny.logits(model, x)
    import tempfile

    with tempfile.TemporaryDirectory() as tmp:
        lorakit.save(model, tmp)
        other = lorakit.load(grown(2), tmp, check_base=False)
    assert gap(tiny.logits(other, x), y) < 1e-5
    with pytest.raises(LorakitError, match=r"model.embed_tokens: tokens: there is no row 48, the table has 48; mend: resize"):
        lorakit.adapt(tiny.llama(), r=2, trainable_token_indices=[tiny.VOCAB])
    with pytest.raises(LorakitError, match="different numbers of rows"):
        lorakit.adapt(tiny.llama(), r=2, trainable_token_indices=[3, 3])


def test_rows_of_a_table_that_is_looked_up():
    assert check_method(Tokens((6, 4, 9), "in"), layers=["embedding"], dtypes=["float32", "float64"]) > 30


# Ties


def test_a_tied_head_follows_the_embedding_through_everything(tmp_path):
    model = lorakit.adapt(tiny.llama(tied=True), r=3, target_modules=["embed_tokens", "v_proj"], ensure_weight_tying=True)
    untied = lorakit.adapt(tiny.llama(tied=True), r=3, target_modules=["embed_tokens", "v_proj"])
    assert lorakit.trainable(model)[0] == lorakit.trainable(untied)[0], "a tie costs nothing"
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05)
    for _ in range(3):
        model(tiny.ids(), labels=tiny.ids()).loss.backward()
        opt.step()
        opt.zero_grad()
    slots, one = host.slots(model), {"default": 1.0}
    assert torch.equal(slots["lm_head"].map(one).weight(), slots["model.embed_tokens"].map(one).weight().mT)
    y = tiny.logits(model)
    lorakit.save(model, tmp_path / "adapter")
    again = lorakit.load(tiny.llama(tied=True), tmp_path / "adapter", trainable=True)
    assert torch.equal(tiny.logits(again), y)
    e, h = again.model.embed_tokens, again.lm_head
    assert e.lora_embedding_A.default is h.lora_embedding_A.default if hasattr(h, "lora_embedding_A") else e.lora_embedding_A.default is h.lora_A.default
    lorakit.save_merged(model, tmp_path / "merged")
    merged = lorakit.models.load_base(tmp_path / "merged")
    assert merged.config.tie_word_embeddings and merged.lm_head.weight is merged.model.embed_tokens.weight
    assert gap(tiny.logits(merged), y) < 1e-5
    assert lorakit.verify(tmp_path / "adapter", tiny.llama(tied=True), merged=tmp_path / "merged").ok
    lorakit.merge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    lorakit.unmerge(model)
    assert torch.equal(tiny.logits(model), y)
    lorakit.detach(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight and torch.equal(tiny.logits(model), tiny.logits(tiny.llama(tied=True)))


@pytest.mark.parametrize("method", ["dora", "lora-nonzero", "full"])
def test_any_method_can_be_tied(method, tmp_path):
    more = {} if method == "full" else {"r": 2}
    model = shake(lorakit.adapt(tiny.llama(tied=True), method, target_modules=["embed_tokens"], ensure_weight_tying=True, **more))
    slots, one = host.slots(model), {"default": 1.0}
    assert gap(slots["lm_head"].map(one).weight(), slots["model.embed_tokens"].map(one).weight().mT) < 1e-6
    y = tiny.logits(model)
    assert gap(y, tiny.logits(tiny.llama(tied=True))) > 1e-2 and gap(tiny.logits(lorakit.merged(model)), y) < 1e-4
    lorakit.save(model, tmp_path)
    assert gap(tiny.logits(lorakit.load(tiny.llama(tied=True), tmp_path)), y) < 1e-5


def test_all_tables_of_an_encoder_decoder_are_tied():
    """T5 keeps one table under four names; PEFT's tie leaves the encoder's and the decoder's out."""
    model = lorakit.adapt(tiny.t5(), r=2, target_modules=["shared"], ensure_weight_tying=True)
    assert set(host.slots(model)) == {"shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"}
    y, base = tiny.logits(shake(model)), tiny.logits(tiny.t5())
    assert gap(y, base) > 1e-2 and gap(tiny.logits(lorakit.merged(model)), y) < 1e-5


def test_a_start_out_of_the_base_does_not_part_a_tie():
    with pytest.raises(LorakitError, match=r"would part lm_head from the weight it is tied to; mend: storage: offset"):
        lorakit.adapt(tiny.llama(tied=True), r=2, target_modules=["embed_tokens"], ensure_weight_tying=True, init={"name": "nonzero", "storage": "base"})


# Mixed batches


def many(model, targets):
    """Adapters of different kinds and ranks, and what each alone makes of the batch."""
    out = {}
    with torch.no_grad():
        out[None] = tiny.logits(model)
        for k, (n, method) in enumerate({"a": "lora", "b": "dora", "c": "rslora"}.items()):
            shake(lorakit.adapt(model, method, r=1 + k, name=n, target_modules=targets), n, k)
            out[n] = tiny.logits(model)
    return out


@torch.no_grad()
@pytest.mark.parametrize(("build", "targets"), [
    (tiny.llama, "all-linear"), (tiny.gpt2, ["c_attn", "wpe", "wte"]), (tiny.opt, "all-linear"), (tiny.bert, ["query", "position_embeddings"]),
    (tiny.t5, ["q", "wi", "shared"]), (tiny.bart, ["q_proj", "fc1"]), (tiny.gemma3, ["embed_tokens", "q_proj"])], ids=lambda v: getattr(v, "__name__", None))
def test_rows_of_whole_models(build, targets):
    model = build()
    out = many(model, targets)
    for names in (["a", "b", "c"], ["c", None, "c"], [None, None, "b"]):
        with lorakit.rows(model, names):
            y = tiny.logits(model)
        for k, n in enumerate(names):
            assert gap(y[k], out[n][k]) < 1e-5, f"row {k} of {names}"


def test_a_mixed_training_batch_has_the_gradients_of_separate_ones():
    model = tiny.llama()
    many(model, ["q_proj", "down_proj"])
    x, names = tiny.ids(6), ["a", "b", None, "a", "c", "b"]
    params = {n: p for n, p in model.named_parameters() if "lora" in n}
    for p in params.values():
        p.requires_grad_(True)

    def loss(ids):
        return torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")

    with lorakit.rows(model, names):
        loss(x).backward()
    mixed = {n: p.grad.clone() for n, p in params.items()}
    model.zero_grad()
    for a in "abc":
        lorakit.activate(model, a)
        loss(x[[k for k, n in enumerate(names) if n == a]]).backward()
    for n, p in params.items():
        assert gap(mixed[n], p.grad) < 1e-4 * max(1.0, float(p.grad.abs().max())), n


@torch.no_grad()
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("build", [tiny.llama, tiny.t5, tiny.bart], ids=lambda b: b.__name__)
def test_generate_follows_the_rows(build, how):
    model = build()
    many(model, "all-linear")
    for p in model.parameters():
        p.requires_grad_(False)
    x, names = tiny.ids(), ["b", None, "a"]
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | how
    with lorakit.rows(model, names):
        mixed = model.generate(x, attention_mask=torch.ones_like(x), **how)
    n = how.get("num_return_sequences", 1)
    for k, a in enumerate(names):
        lorakit.activate(model, *([a] if a else []))
        alone = model.generate(x[k: k + 1], attention_mask=torch.ones_like(x[:1]), **how)
        assert mixed[k * n: (k + 1) * n, : alone.shape[1]].tolist() == alone.tolist(), f"row {k}"
    assert "generate" not in vars(model)


def test_a_batch_of_another_size_is_refused_also_when_it_is_a_multiple():
    model = tiny.llama()
    many(model, ["q_proj"])
    with lorakit.rows(model, ["a", "b"]):
        for n in (3, 4, 1):
            with pytest.raises(LorakitError, match=f"a mixed batch of 2 rows got an input whose first dimension is {n}"):
                model(tiny.ids(n))


class Chosen(nn.Module):
    """Experts as separate layers: each is called with the tokens that were sent to it."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        flat, y = x.flatten(0, 1), torch.zeros(x.shape[0] * x.shape[1], 4)
        for k, e in enumerate(self.experts):
            y[k::2] = e(flat[k::2])
        return y.view_as(x)


def test_rows_are_refused_where_a_layer_gets_a_choice_of_tokens():
    model = lorakit.adapt(Chosen(), r=2)
    with pytest.raises(LorakitError, match=r"experts.0 does not get the rows of the batch but a choice of tokens"), lorakit.rows(model, ["default", None]):
        model(torch.randn(2, 4, 4))


def test_rows_of_a_merged_model_are_refused():
    model = tiny.llama()
    many(model, ["q_proj"])
    lorakit.merge(model)
    with pytest.raises(LorakitError, match="are merged into the base"), lorakit.rows(model, ["a"]):
        pass


# Names


@pytest.mark.parametrize(("build", "options", "words"), [
    (tiny.llama, {"target_modules": ["q_proj", "embed_tokens"]}, {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}),
    (tiny.llama, {"target_modules": ["q_proj"], "use_dora": True}, {"lora_A", "lora_B", "lora_magnitude_vector"}),
    (tiny.mixtral, {"target_parameters": "experts"}, {"lora_A", "lora_B"}),
    (Attention, {"target_modules": ["attn"]}, {"lora_A", "lora_B"})], ids=["layers", "dora", "experts", "attention"])
def test_scripts_find_parameters_by_the_usual_names(build, options, words):
    model = lorakit.adapt(build(), r=2, **options)
    paths = {p.replace(".out_proj", "") if build is Attention else p for p in host.slots(model)}
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert {part for n in names for part in n.split(".") if part.startswith("lora_")} == words
    assert all(any(n.startswith(p) for p in paths) for n in names)


def test_a_method_that_cannot_be_tied_or_stacked_says_so():
    with pytest.raises(LorakitError, match="transposed around transposed means nothing"):
        LoRA().transposed().inner.transposed().__class__(LoRA().transposed())


def test_verbs_take_a_wrapper_in_the_way_of_peft(tmp_path):
    from lorakit.compat.peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    shake(wrapped.get_base_model())
    y = tiny.logits(wrapped)
    lorakit.save(wrapped, tmp_path)
    assert torch.equal(tiny.logits(lorakit.load(tiny.llama(), tmp_path)), y) and gap(tiny.logits(lorakit.merged(wrapped)), y) < 1e-5
    lorakit.load(wrapped, tmp_path, "again")
    assert torch.equal(tiny.logits(wrapped), y)
