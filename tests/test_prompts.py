"""Methods that go around a model's call: prompts, prefixes, adaption prompts. Formulas written out, PEFT in both directions, the life of an adapter."""

from __future__ import annotations

import copy
import inspect
import io
import json
import math
import warnings

import peft
import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers as tf

import lorakit
from lorakit import LorakitError, host
from lorakit.compat import peft as compat
from lorakit.recipes import compose
from lorakit.spec import Spec

warnings.filterwarnings("ignore")
X = tiny.ids()
ONES = torch.ones_like(X)
N = 4
WAYS = {
    "prompt": ("prompt-tuning", {"num_virtual_tokens": N}), "prefix": ("prefix-tuning", {"num_virtual_tokens": N}),
    "projected": ("prefix-tuning", {"num_virtual_tokens": N, "prefix_projection": True, "encoder_hidden_size": 5}),
    "mlp": ("p-tuning", {"num_virtual_tokens": N}), "lstm": ("p-tuning", {"num_virtual_tokens": N, "encoder": "lstm", "encoder_hidden_size": 6}),
    "cpt": ("cpt", {"cpt_token_ids": [5, 6, 7, 8], "cpt_tokens_type_mask": [1, 2, 3, 4]}),
    "scalar": ("adaption-prompt", {"adapter_len": N}), "heads": ("llama-adapter", {"adapter_len": N, "adapter_layers": 1}),
}
FRONT = ["prompt", "mlp", "lstm", "cpt"]


def classifier(pad: int = 0):
    torch.manual_seed(0)
    return tf.LlamaForSequenceClassification(tf.LlamaConfig(
        vocab_size=tiny.VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=32, initializer_range=0.2, pad_token_id=pad, num_labels=3)).eval()


@torch.no_grad()
def shake(model, name="default", size=0.3):
    g = torch.Generator().manual_seed(3)
    for slot in host.slots(model, name).values():
        for p in slot.parameters(name).values():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g) * size)
    return model


def made(way: str, build=tiny.llama, name="default", **more):
    recipe, options = WAYS[way]
    return shake(lorakit.adapt(build(), recipe, name=name, **options, **more), name).eval()


def leaves(model, path="", name="default"):
    return {k: v.detach() for k, v in host.slots(model, name)[path].params(name).items()}


def greedy(model, x, mask, **kw):
    model.generation_config.eos_token_id = None
    return model.generate(input_ids=x, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, **kw)


# Formulas, written out


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, tiny.opt])
def test_a_prompt_is_its_rows_before_the_embeddings(build):
    model, base = made("prompt", build), build()
    P, out = leaves(model)["P"], model(X, labels=X)
    longer = torch.cat([P.expand(len(X), N, 16), base.get_input_embeddings()(X)], 1)
    want = base(inputs_embeds=longer).logits
    assert torch.allclose(out.logits, want[:, N:], atol=1e-6) and out.logits.shape == (*X.shape, tiny.VOCAB)
    losses = [F.cross_entropy(want[b, N - 1 + t].detach(), X[b, t]) for b in range(len(X)) for t in range(X.shape[1])]  # the first real token has a label, too
    assert math.isclose(float(out.loss.detach()), float(torch.stack(losses).mean()), rel_tol=1e-5)


def test_p_tuning_encodes_its_rows():
    for way in ("mlp", "lstm"):
        model = made(way)
        p, h = leaves(model), 16 if way == "mlp" else 6
        rows = []
        if way == "mlp":
            for e in p["E"]:
                h1 = (p["W1"] @ e + p["b1"]).clamp_min(0)
                rows.append(p["W3"] @ (p["W2"] @ h1 + p["b2"]).clamp_min(0) + p["b3"])
        else:
            y = list(p["E"])
            for n in range(2):
                both = []
                for back, order in (("", range(N)), ("_reverse", reversed(range(N)))):
                    s, c, out = torch.zeros(h), torch.zeros(h), {}
                    for t in order:
                        z = (p[f"weight_ih_l{n}{back}"] @ y[t] + p[f"bias_ih_l{n}{back}"] + p[f"weight_hh_l{n}{back}"] @ s + p[f"bias_hh_l{n}{back}"])
                        i, f, g, o = z.split(h)
                        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                        s = o.sigmoid() * c.tanh()
                        out[t] = s
                    both.append(out)
                y = [torch.cat([both[0][t], both[1][t]]) for t in range(N)]
            rows = [p["W2"] @ (p["W1"] @ v + p["b1"]).clamp_min(0) + p["b2"] for v in y]
        base = tiny.llama()
        want = base(inputs_embeds=torch.cat([torch.stack(rows).expand(len(X), N, 16), base.model.embed_tokens(X)], 1)).logits[:, N:]
        assert torch.allclose(tiny.logits(model), want, atol=1e-5), way


def test_a_prefix_is_keys_and_values_in_every_layer():
    """Grouped-query attention of one layer by hand: softmax over learnt and real keys together, positions from n on, causal among the real ones."""
    model, seen = made("prefix"), {}
    attn = model.model.layers[1].self_attn
    hook = attn.register_forward_hook(lambda m, a, k, out: seen.update(x=k["hidden_states"], cs=k["position_embeddings"], y=out[0]), with_kwargs=True)
    model(X)
    hook.remove()
    P = leaves(model)["P"].view(N, 2, 2, 2, 4)  # (n, layers, key or value, heads, size)
    q, k, v = (f(seen["x"]).view(3, 7, -1, 4).transpose(1, 2) for f in (attn.q_proj, attn.k_proj, attn.v_proj))
    half = torch.arange(2) / 2
    angle = (torch.arange(7) + N)[:, None] * 10000.0 ** -half[None]
    cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))
    q, k = (s * cos + torch.cat([-s[..., 2:], s[..., :2]], -1) * sin for s in (q, k))
    heads = []
    for h in range(4):
        K = torch.cat([P[:, 1, 0, h // 2].expand(3, N, 4), k[:, h // 2]], 1)
        V = torch.cat([P[:, 1, 1, h // 2].expand(3, N, 4), v[:, h // 2]], 1)
        s = q[:, h] @ K.mT / 2
        s = s.masked_fill(torch.cat([torch.zeros(7, N), torch.ones(7, 7).triu(1)], 1).bool(), -torch.inf)
        heads.append(s.softmax(-1) @ V)
    assert torch.allclose(attn.o_proj(torch.cat(heads, -1)), seen["y"], atol=1e-5)


def test_a_projected_prefix_is_the_same_as_what_comes_out():
    model = made("projected")
    p = leaves(model)
    out = torch.stack([p["W2"] @ torch.tanh(p["W1"] @ e + p["b1"]) + p["b2"] for e in p["E"]])
    plain = lorakit.adapt(tiny.llama(), "prefix-tuning", num_virtual_tokens=N)
    leaves(plain)["P"].copy_(out)
    assert torch.allclose(tiny.logits(plain), tiny.logits(model), atol=1e-5) and p["E"].shape == (N, 8) and out.shape == (N, 2 * 2 * 8)


def test_a_zero_prefix_is_not_the_base():
    """Keys of zero still take their share of the attention."""
    model = lorakit.adapt(tiny.llama(), "prefix-tuning", num_virtual_tokens=N, start_at="zero")
    assert not leaves(model)["P"].any() and float((tiny.logits(model) - tiny.logits(tiny.llama())).abs().max()) > 0.01


@pytest.mark.parametrize("way", ["scalar", "heads"])
def test_an_adaption_prompt_is_a_gated_attention_of_its_own(way):
    model, seen = made(way), {}
    attn = model.model.layers[1].self_attn
    hook = attn.register_forward_hook(lambda m, a, k, out: seen.update(x=k["hidden_states"], cs=k["position_embeddings"], y=out[0], k=k), with_kwargs=True)
    model(X)
    hook.remove()
    with lorakit.disabled(model):
        y = attn(**seen["k"])[0]
    p = leaves(model, "model.layers.1.self_attn")
    gate = p["g"].expand(4) if way == "scalar" else p["g"].flatten().tanh()
    assert p["g"].shape == ((1,) if way == "scalar" else (1, 4, 1, 1)) and p["P"].shape == (1, N, 16)
    q = attn.q_proj(seen["x"]).view(3, 7, 4, 4)
    cos, sin = seen["cs"]
    q = q * cos[:, :, None] + torch.cat([-q[..., 2:], q[..., :2]], -1) * sin[:, :, None]
    heads = []
    for h in range(4):
        K = p["P"][0] @ attn.k_proj.weight.T[:, 4 * (h // 2) : 4 * (h // 2) + 4]
        V = p["P"][0] @ attn.v_proj.weight.T[:, 4 * (h // 2) : 4 * (h // 2) + 4]
        heads.append(gate[h] * (q[:, :, h] @ K.T / 2).softmax(-1) @ V)
    assert torch.allclose(seen["y"], y + torch.cat(heads, -1) @ attn.o_proj.weight.T, atol=1e-5)
    assert len(host.slots(model)) == (2 if way == "scalar" else 1)


def test_an_adaption_prompt_starts_at_the_base_and_gets_a_gradient():
    model = lorakit.adapt(tiny.llama(), "adaption-prompt", adapter_len=3)
    assert torch.equal(tiny.logits(model), tiny.logits(tiny.llama()))
    model(X, labels=X).loss.backward()
    assert all(s.parameters("default")["g"].grad.abs() > 0 for s in host.slots(model).values())


def test_cpt_moves_rows_no_further_than_their_type_may():
    types = [1, 2, 3, 4, 5, 6, 7, 8, 0]
    model = lorakit.adapt(tiny.llama(), "cpt", cpt_token_ids=[9] * 9, cpt_tokens_type_mask=types, eps=0.2, format_eps=0.1)
    E = tiny.llama().model.embed_tokens.weight[9]
    begun = tiny.logits(model)
    assert torch.allclose(begun, tiny.llama()(torch.cat([torch.full((3, 9), 9), X], 1)).logits[:, 9:], atol=1e-6), "not the model with its context"
    leaves(model)["D"].copy_(torch.randn(9, 16) * 5)
    model.train()(X, labels=X).loss.backward()
    D, far = leaves(model)["D"], (16 / 2048) ** 0.5
    for row, kind in zip(D, types, strict=True):
        want = {1: 0.1 * far, 2: 0.2 * far, 3: 0.1 * far}.get(kind % 4, 1e-10)
        assert math.isclose(float(row.norm()), want, rel_tol=1e-4)
    grad = host.slots(model)[""].parameters("default")["D"].grad
    assert [bool(g.any()) for g in grad] == [k % 4 != 0 for k in types]
    assert torch.equal(leaves(model)["E"], E.expand(9, 16))


@pytest.mark.parametrize("weighted", ["none", "decay"])
def test_cpt_counts_labels_as_peft_does(weighted):
    ids, kinds = [9, 8, 7, 6, 5, 4], [1, 2, 3, 4, 6, 8]
    config = peft.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=ids, cpt_tokens_type_mask=kinds, opt_weighted_loss_type=weighted, opt_loss_decay_factor=0.6)
    theirs = peft.get_peft_model(tiny.llama(), config)
    ours = lorakit.adapt(tiny.llama(), "cpt", cpt_token_ids=ids, cpt_tokens_type_mask=kinds, weighted=weighted, decay=0.6)
    D = torch.randn(6, 16, generator=torch.Generator().manual_seed(1)) * 0.01
    theirs.prompt_encoder["default"].delta_embedding.weight.data.copy_(D)
    leaves(ours)["D"].copy_(D)
    for mask in (None, torch.tensor([[1, 1, 2, 2, 3, 4, 4]]).expand(3, 7)):
        more = {} if mask is None else {"input_type_mask": mask.clone()}
        a, b = theirs.train()(input_ids=X, labels=X, **more), ours.train()(input_ids=X, labels=X, **copy.deepcopy(more))
        assert torch.allclose(a.loss, b.loss, atol=1e-6) and torch.allclose(a.logits[:, 6:], b.logits, atol=1e-6)
        a.loss.backward()
        b.loss.backward()
    assert torch.allclose(theirs.prompt_encoder["default"].delta_embedding.weight.grad, host.slots(ours)[""].parameters("default")["D"].grad, atol=1e-6)


# Starts


def test_where_a_prompt_starts():
    table = tiny.llama().model.embed_tokens.weight

    def begin(**kw):
        return leaves(lorakit.adapt(tiny.llama(), "prompt-tuning", **kw))["P"]

    assert 0.8 < begin(num_virtual_tokens=50).std() < 1.2
    assert 0.8 < begin(num_virtual_tokens=50, start_at="scaled").std() / table.square().mean().sqrt() < 1.2
    assert all((row == table).all(1).any() for row in begin(num_virtual_tokens=6, start_at="vocab"))
    assert torch.equal(begin(num_virtual_tokens=5, start_at="text", token_ids=[7, 3]), table[[7, 3, 7, 3, 7]])
    gemma = tiny.gemma3()
    scaled = leaves(lorakit.adapt(gemma, "prompt-tuning", num_virtual_tokens=1, start_at="text", token_ids=[7]))["P"]
    assert torch.allclose(scaled, gemma.get_input_embeddings()(torch.tensor([7])), atol=1e-6), "a scaled embedding's rows are scaled"
    for bad, why in (({"num_virtual_tokens": 0}, "at least 1, not 0"), ({"start_at": "txt"}, "unknown start_at `txt`"),
                     ({"start_at": "text"}, "needs token_ids"), ({"start_at": "text", "token_ids": [99]}, "there is no token 99")):
        with pytest.raises(LorakitError, match=why):
            begin(**bad)


# PEFT, both directions

CASES = [(b, t, c) for b, t in ((tiny.llama, "CAUSAL_LM"), (tiny.gpt2, "CAUSAL_LM"), (tiny.gemma3, "CAUSAL_LM"), (tiny.t5, "SEQ_2_SEQ_LM"),
                                (tiny.bart, "SEQ_2_SEQ_LM"), (tiny.bert, "SEQ_CLS"), (classifier, "SEQ_CLS"))
         for c in ("PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig", "CPTConfig", "AdaptionPromptConfig")
         if not (c == "CPTConfig" and t != "CAUSAL_LM") and
         not (c == "AdaptionPromptConfig" and b is not tiny.llama)]
FIELDS = {"PromptTuningConfig": {"num_virtual_tokens": N}, "PromptEncoderConfig": {"num_virtual_tokens": N, "encoder_hidden_size": 6},
          "PrefixTuningConfig": {"num_virtual_tokens": N}, "CPTConfig": {"cpt_token_ids": [5, 6, 7], "cpt_tokens_type_mask": [1, 2, 4]},
          "AdaptionPromptConfig": {"adapter_len": N, "adapter_layers": 1}}


def said(task):
    return {"CAUSAL_LM": X, "SEQ_2_SEQ_LM": X[:, :4].contiguous(), "SEQ_CLS": torch.tensor([0, 1, 2])}[task]


@torch.no_grad()
def agree(theirs, ours, task, loss=True):
    """Logits, loss, and what is generated."""
    a, b = (m.eval()(input_ids=X, attention_mask=ONES, labels=said(task)) for m in (theirs, ours))
    there = a.logits if a.logits.shape == b.logits.shape else a.logits[:, -b.logits.shape[1] :]
    assert torch.allclose(there, b.logits, atol=1e-5)
    assert not loss or torch.allclose(a.loss, b.loss, atol=1e-5)
    assert task == "SEQ_CLS" or torch.equal(greedy(theirs, X, ONES), greedy(ours, X, ONES))


@pytest.mark.parametrize(("build", "task", "config"), CASES, ids=[f"{b.__name__}-{c}" for b, _, c in CASES])
def test_files_of_peft_are_read_and_written(build, task, config, tmp_path):
    torch.manual_seed(1)
    theirs = peft.get_peft_model(build(), getattr(peft, config)(task_type=task, **FIELDS[config]))
    for p in theirs.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p) * 0.3)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    ours = lorakit.load(build(), tmp_path / "theirs")
    agree(theirs, ours, task, loss=config != "CPTConfig")  # a context's file holds its tokens, not what is a label
    lorakit.save(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(build(), tmp_path / "ours")
    agree(back, ours, task)


@pytest.mark.parametrize("way", [w for w in WAYS if w != "heads"])
def test_what_was_trained_here_runs_in_peft(way, tmp_path):
    model = made(way)
    lorakit.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] != "LORAKIT"
    agree(peft.PeftModel.from_pretrained(tiny.llama(), tmp_path), model, "CAUSAL_LM", loss=way != "cpt")


@pytest.mark.parametrize("way", ["projected", "mlp", "lstm"])
def test_the_same_weights_make_the_same_prompt_as_peft_while_training(way):
    config = {"projected": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, prefix_projection=True, encoder_hidden_size=5),
              "mlp": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, encoder_hidden_size=16),
              "lstm": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, encoder_hidden_size=6,
                                                       encoder_reparameterization_type="LSTM")}[way]()
    theirs, ours = peft.get_peft_model(tiny.llama(), config), made(way)
    slot = host.slots(ours)[""]
    own = {slot.methods["default"].key(k).removeprefix("prompt_encoder."): p for k, p in slot.parameters("default").items()}
    named = dict(theirs.prompt_encoder["default"].named_parameters())
    assert set(own) == set(named)
    for k, p in own.items():
        named[k].data.copy_(p)
    a, b = theirs.train()(input_ids=X, labels=X), ours.train()(input_ids=X, labels=X)
    a.loss.backward()
    b.loss.backward()
    assert torch.allclose(a.loss, b.loss, atol=1e-6)
    assert all(torch.allclose(named[k].grad, p.grad, atol=1e-5) for k, p in own.items())


@pytest.mark.parametrize(("build", "task", "config"), [c for c in CASES if c[0] in (tiny.llama, tiny.t5, tiny.bert)],
                         ids=[f"{b.__name__}-{c}" for b, _, c in CASES if b in (tiny.llama, tiny.t5, tiny.bert)])
def test_peft_configurations_mean_the_same(build, task, config, tmp_path):
    mine, theirs = getattr(compat, config)(task_type=task, **FIELDS[config]), getattr(peft, config)(task_type=task, **FIELDS[config])
    known = theirs.to_dict()
    assert {k: v for k, v in mine.to_dict().items() if k not in ("num_transformer_submodules", "peft_version")}.items() <= known.items()
    model = compat.get_peft_model(build(), mine)
    assert type(model).__name__ == type(peft.get_peft_model(build(), theirs)).__name__
    model.train()(input_ids=X, labels=said(task)).loss.backward()
    trains = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trains and all(dict(model.named_parameters())[n].grad is not None for n in trains)
    model.eval().save_pretrained(tmp_path)
    again = compat.PeftModel.from_pretrained(build(), tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(model(input_ids=X, labels=said(task)).logits, again(input_ids=X, labels=said(task)).logits, atol=1e-5)
    agree(peft.PeftModel.from_pretrained(build(), tmp_path), model, task, loss=config != "CPTConfig")


# Generation, masks, padding


@pytest.mark.parametrize("way", WAYS)
def test_generation_with_a_cache_is_generation_without(way):
    model, x = made(way), X
    with torch.no_grad():
        for _ in range(6):
            x = torch.cat([x, model(x).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(greedy(model, X, ONES), x) and torch.equal(greedy(model, X, ONES, use_cache=False), x)
    out = model(X[:, :4], use_cache=True)
    more = model(X[:, 4:], past_key_values=out.past_key_values)
    assert torch.allclose(torch.cat([out.logits, more.logits], 1), tiny.logits(model), atol=1e-5), "a cache carried by hand"
    assert greedy(model, X, ONES, num_beams=2).shape[0] == 3


@pytest.mark.parametrize("way", WAYS)
def test_padding_on_the_left_changes_nothing(way):
    """Each row generates what it does alone; so a mask counts, and positions behind a prompt are those of real tokens."""
    model = made(way)
    x, mask = X.clone(), ONES.clone()
    mask[0, :3] = 0
    assert torch.equal(greedy(model, x, mask)[0, 7:], greedy(model, x[:1, 3:], ONES[:1, 3:])[0, 4:])
    places = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        there = model(x, attention_mask=mask, position_ids=places).logits[0, 3:]
        assert torch.allclose(there, model(x[:1, 3:]).logits[0], atol=1e-5)
        assert torch.allclose(model(x, attention_mask=ONES).logits, model(x).logits, atol=1e-5)


@pytest.mark.parametrize("build", [tiny.t5, tiny.bart])
def test_an_encoder_gets_the_prompt_and_the_decoder_sees_all_of_it(build):
    model, base = made("prompt", build), build()
    mask = ONES.clone()
    mask[0, 5:] = 0
    P = leaves(model)["P"][:N]
    longer = torch.cat([P.expand(3, N, 16), base.get_input_embeddings()(X)], 1)
    want = base(inputs_embeds=longer, attention_mask=torch.cat([torch.ones(3, N), mask], 1), labels=X)
    got = model(X, attention_mask=mask, labels=X)
    assert torch.allclose(want.logits, got.logits, atol=1e-6) and torch.allclose(want.loss, got.loss)
    assert torch.equal(greedy(model, X, mask)[0], greedy(model, X[:1, :5], ONES[:1, :5])[0])


@pytest.mark.parametrize("build", [tiny.t5, tiny.bart])
def test_a_decoder_behind_an_encoder_has_a_prefix_of_its_own_in_each_layer(build, tmp_path):
    model = made("prefix", build)
    model(X, labels=X).loss.backward()
    P = host.slots(model)[""].parameters("default")["P"]
    assert P.grad.abs().amax(0).min() > 0, "a part of the prefix does nothing"
    x = torch.full((3, 1), model.config.decoder_start_token_id)
    with torch.no_grad():
        for _ in range(6):
            x = torch.cat([x, model(X, decoder_input_ids=x).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(greedy(model, X, ONES), x) and greedy(model, X, ONES, num_beams=2).shape[0] == 3
    lorakit.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORAKIT", "PEFT would cross its layers"
    assert torch.equal(tiny.logits(lorakit.load(build(), tmp_path)), tiny.logits(model))


@pytest.mark.parametrize("way", ["prompt", "prefix"])
def test_a_classifier_pools_the_last_real_token(way):
    """PEFT takes the last position, which is padding in a shorter row."""
    model = made(way, classifier)
    x, mask = X.clone(), ONES.clone()
    x[0, 4:], mask[0, 4:] = 0, 0
    with torch.no_grad():
        assert torch.allclose(model(x, attention_mask=mask).logits[0], model(x[:1, :4]).logits[0], atol=1e-5)
        assert torch.allclose(model(x, attention_mask=mask).logits[1:], model(X[1:]).logits, atol=1e-5)


# The life of an adapter


@pytest.mark.parametrize("way", WAYS)
def test_only_the_adapter_trains_and_detach_gives_back_the_very_model(way, tmp_path):
    recipe, options = WAYS[way]
    model = tiny.llama()
    was = {k: v.clone() for k, v in model.state_dict().items()}
    cls, objects, signature = type(model), [id(p) for p in model.parameters()], inspect.signature(model.forward)
    lorakit.adapt(model, recipe, **options)
    assert isinstance(model, cls) and inspect.signature(model.forward) == signature
    assert len(set(model.state_dict()) - set(was)) > 0
    mine = [p for p in model.parameters() if p.requires_grad]
    assert mine and not {id(p) for p in mine} & set(objects)
    begun, opt = [p.clone() for p in mine], torch.optim.AdamW(mine, 0.01)
    first = None
    for _ in range(4):
        loss = model.train()(X, labels=X).loss
        first = first if first is not None else float(loss)
        loss.backward()
        opt.step()
        opt.zero_grad()
    assert float(loss) < first and all(not torch.equal(a, b) for a, b in zip(begun, mine, strict=True))
    lorakit.save(model.eval(), tmp_path)
    assert lorakit.verify(tmp_path, tiny.llama()).ok
    assert all(torch.equal(model.state_dict()[k], v) for k, v in was.items()), "the base changed"
    lorakit.detach(model)
    assert type(model) is cls and set(model.state_dict()) == set(was) and [id(p) for p in model.parameters()] == objects
    assert torch.equal(tiny.logits(model), tiny.logits(tiny.llama())) and inspect.signature(model.forward) == signature


@pytest.mark.parametrize("way", WAYS)
def test_native_folders_keep_all_that_trains(way, tmp_path):
    model = made(way)
    lorakit.save(model, tmp_path, form="native")
    again = lorakit.load(tiny.llama(), tmp_path, trainable=True)
    for path in host.slots(model):
        a, b = leaves(model, path), leaves(again, path)
        assert set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)
    assert torch.equal(tiny.logits(model), tiny.logits(again))
    spec = lorakit.adapters(model)["default"]
    assert Spec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_several_adapters_of_all_kinds_on_one_model():
    base = tiny.logits(tiny.llama())
    model, alone = tiny.llama(), {}
    for name, way in (("a", "prompt"), ("b", "prefix"), ("c", "scalar"), ("d", "mlp")):
        recipe, options = WAYS[way]
        shake(lorakit.adapt(model, recipe, name=name, **options), name)
        alone[name] = tiny.logits(model.eval())
    shake(lorakit.adapt(model, "lora", name="l", r=2), "l")
    for name, y in alone.items():
        lorakit.activate(model, name)
        assert torch.equal(tiny.logits(model), y)
    with lorakit.disabled(model):
        assert torch.equal(tiny.logits(model), base)
    lorakit.activate(model, "a", "b", "c", "d", "l")
    all_of_them = tiny.logits(model)
    x = X
    with torch.no_grad():
        for _ in range(4):
            x = torch.cat([x, model(x).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(greedy(model, X, ONES)[:, : x.shape[1]], x)
    for name in "cdl":
        lorakit.delete(model, name)
    lorakit.activate(model, "a", "b")
    two = tiny.logits(model)
    assert not torch.allclose(two, all_of_them, atol=1e-3)
    lorakit.activate(model, "b", "a")
    assert torch.allclose(two, tiny.logits(model), atol=1e-5), "a prefix lies before a prompt in whatever order"
    with pytest.raises(LorakitError, match=r"a weight of 0\.5 means nothing"):
        lorakit.activate(model, "a", weights=[0.5])
        tiny.logits(model)
    lorakit.detach(model)
    assert torch.equal(tiny.logits(model), base) and type(model) is tf.LlamaForCausalLM


def test_two_prompts_stand_one_behind_the_other():
    model, base = tiny.llama(), tiny.llama()
    for name in "ab":
        shake(lorakit.adapt(model, "prompt-tuning", name=name, num_virtual_tokens=3), name, 0.3 if name == "a" else 0.5)
    lorakit.activate(model, "a", "b")
    rows = [leaves(model, name=n)["P"].expand(3, 3, 16) for n in "ab"]
    want = base(inputs_embeds=torch.cat([*rows, base.model.embed_tokens(X)], 1)).logits[:, 6:]
    assert torch.allclose(tiny.logits(model), want, atol=1e-6)


@pytest.mark.parametrize("prompt", ["prefix-tuning", {"method": "prompt-tuning", "num_virtual_tokens": 3}, {"method": "adaption-prompt", "adapter_len": 3}])
def test_a_prefix_and_a_lora_are_one_adapter(prompt, tmp_path):
    model = shake(lorakit.adapt(tiny.llama(), "lora", r=2, prompt=prompt)).eval()
    y = tiny.logits(model)
    assert len(host.state_of(model).specs) == 1
    lorakit.save(model, tmp_path)
    again = lorakit.load(tiny.llama(), tmp_path)
    assert torch.equal(tiny.logits(again), y) and lorakit.verify(tmp_path, tiny.llama()).ok
    lorakit.save(again, tmp_path / "again")
    assert torch.equal(tiny.logits(lorakit.load(tiny.llama(), tmp_path / "again")), y)
    assert torch.equal(tiny.logits(lorakit.detach(again)), tiny.logits(tiny.llama()))
    spec = lorakit.adapters(model)["default"]
    assert Spec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_what_cannot_be_is_refused_with_a_sentence():
    model = made("prompt")
    for act, why in ((lambda: lorakit.merge(model), "changes no weight, so there is nothing to merge"),
                     (lambda: lorakit.merged(model), "changes no weight"),
                     (lambda: greedy(model, X, ONES, cache_implementation="static"), "made for a fixed cache"),
                     (lambda: lorakit.adapt(tiny.llama(), "prompt-tuning", target_modules=["q_proj"]), "goes around a whole model, not on a layer"),
                     (lambda: lorakit.adapt(tiny.llama(), "lora", target_modules="model"), "lora is for layers and parameters"),
                     (lambda: lorakit.adapt(tiny.t5(), "cpt"), "cpt is for decoders"),
                     (lambda: lorakit.adapt(tiny.gpt2(), "adaption-prompt"), "has no attention with the layers q_proj"),
                     (lambda: lorakit.adapt(torch.nn.Linear(2, 2), "prompt-tuning"), "has no input embeddings"),
                     (lambda: compose("lora", prompt="dora"), "does not go around a model"),
                     (lambda: lorakit.adapt(tiny.llama(), "adaption-prompt", adapter_layers=3), "last-3 of 2 layers")):
        with pytest.raises(LorakitError, match=why):
            act()
    prefix = made("prefix").train()
    prefix.gradient_checkpointing_enable()
    with pytest.raises(LorakitError, match="which gradient checkpointing empties"):
        prefix(X)


@pytest.mark.parametrize("way", ["prompt", "mlp", "scalar"])
def test_gradient_checkpointing_gives_the_same_gradients(way):
    grads = []
    for on in (False, True):
        model = made(way).train()
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(X, labels=X).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_a_bfloat16_model_keeps_its_adapter_in_float32():
    for way in WAYS:
        recipe, options = WAYS[way]
        model = lorakit.adapt(tiny.llama().to(torch.bfloat16), recipe, **options)
        out = model(X, labels=X)
        out.loss.backward()
        assert out.logits.dtype == torch.bfloat16 and {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}, way


@pytest.mark.parametrize("way", WAYS)
def test_trainer_trains_and_goes_on_to_the_bit(way, tmp_path):
    from lorakit.training.bridge import AdapterTrainer

    def run(steps, resume=None):
        recipe, options = WAYS[way]
        model = lorakit.adapt(tiny.llama(), recipe, **options)
        args = tf.TrainingArguments(str(tmp_path), max_steps=steps, save_steps=2, per_device_train_batch_size=2, learning_rate=0.01, report_to=[],
                                    use_cpu=True, disable_tqdm=True, logging_strategy="no", save_total_limit=4)
        rows = [{"input_ids": r, "labels": r, "attention_mask": torch.ones_like(r)} for r in tiny.ids(6)]
        AdapterTrainer(model=model, args=args, train_dataset=rows).train(resume_from_checkpoint=resume)
        return [p for p in model.parameters() if p.requires_grad]

    straight, again = run(4), run(4, str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(straight, again, strict=True))


def test_packed_rows_are_refused():
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2]]).expand(3, 7)
    for way in ("prompt", "prefix"):
        with pytest.raises(LorakitError, match="packed into one"):
            made(way)(X, position_ids=places)


@pytest.mark.parametrize("way", WAYS)
def test_copies_pickles_and_compiled_graphs_are_the_same_function(way):
    model = made(way)
    y, file = tiny.logits(model), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(tiny.logits(copy.deepcopy(model)), y) and torch.equal(tiny.logits(torch.load(file, weights_only=False)), y)
    torch._dynamo.reset()
    with torch.no_grad():
        assert way in ("projected", "mlp", "heads") or torch.allclose(torch.compile(model, backend="eager", fullgraph=True)(input_ids=X).logits, y, atol=1e-6)


def test_a_run_trains_a_prefix_beside_a_lora_and_verifies(tmp_path):
    from lorakit.training import config
    from lorakit.training.run import train

    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(5) for b in range(5)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    adapter = {"method": "lora", "r": 2, "prompt": {"method": "prefix-tuning", "num_virtual_tokens": 4}}
    out = train(config.parse({"adapter": adapter, "data": {"train": str(tmp_path / "sums.jsonl")}, "train": {"max_steps": 8, "learning_rate": 0.01},
                              "eval": {"samples": 0}, "output": str(tmp_path / "run")}), say=lambda line: None)
    assert out["verify"]["ok"] and out["metrics"]["after"]["eval_loss"] < out["metrics"]["before"]["eval_loss"] - 1
