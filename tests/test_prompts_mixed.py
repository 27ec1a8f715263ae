"""One batch whose rows belong to adapters of every kind, prompts and prefixes among them: each row is what it is alone."""

from __future__ import annotations

import warnings

import pytest
import tiny
import torch
import transformers as tf
from test_host import shake
from test_prompts import classifier
from torch import Tensor, nn

import lorakit
from lorakit import LorakitError, host
from lorakit.method import METHODS, Around, Leaf, method, normal

warnings.filterwarnings("ignore")
PREFIX = {"method": "prefix-tuning", "num_virtual_tokens": 3}
ADAPTERS = {
    "lora": ("lora", {"r": 2}), "prefix": ("prefix-tuning", {"num_virtual_tokens": 8}), "prompt": ("prompt-tuning", {"num_virtual_tokens": 6}),
    "both": ("lora", {"r": 3, "prompt": PREFIX}), "ptuning": ("p-tuning", {"num_virtual_tokens": 2}), "cpt": ("cpt", {
        "cpt_token_ids": [5, 6, 7, 8, 9], "cpt_tokens_type_mask": [1, 2, 3, 4, 8], "weighted": "decay", "decay": 0.5}),
    "houlsby": ("houlsby", {"width": 3}), "heads": ("llama-adapter", {"adapter_len": 3, "adapter_layers": 1}),
    "scalar": ("adaption-prompt", {"adapter_len": 2}),
}
ROWS = ["lora", "prefix", "prompt", None, "both", "ptuning", "cpt", "houlsby", "prompt"]
EVERY = {tiny.llama: [*ROWS, "heads", "scalar"], tiny.gpt2: ROWS, tiny.opt: ROWS}


def made(build, names) -> nn.Module:
    model = build()
    for k, name in enumerate(dict.fromkeys(n for n in names if n is not None)):
        recipe, options = ADAPTERS[name]
        shake(lorakit.adapt(model, recipe, name=name, **options), name, k)
    return model.eval()


def only(model, name):
    """The model with one adapter in effect, or none."""
    return lorakit.activate(model, *([] if name is None else [name]))


def near(a: Tensor, b: Tensor, tol: float = 1e-5) -> bool:
    assert a.shape == b.shape
    return float((a - b).abs().max()) <= tol * max(1.0, float(b.abs().max()))


def some(rows: int) -> tuple[Tensor, Tensor]:
    """Tokens and a mask with padding on the left of a few rows."""
    x = torch.randint(4, tiny.VOCAB, (rows, 7), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(x)
    for row in range(0, rows, 3):
        mask[row, : 1 + row // 3] = 0
    return x, mask


def places(mask):
    return (mask.cumsum(1) - 1).clamp_min(0)


@torch.no_grad()
@pytest.mark.parametrize("build", EVERY)
def test_every_row_is_what_it_is_alone(build):
    names = EVERY[build]
    model, (x, mask) = made(build, names), some(len(names))
    for more in ({}, {"attention_mask": torch.ones_like(x)}, {"attention_mask": mask}, {"attention_mask": mask, "position_ids": places(mask)},
                 {"inputs_embeds": model.get_input_embeddings()(x)}):
        words = {} if "inputs_embeds" in more else {"input_ids": x}
        with lorakit.rows(model, names):
            y = model(**words, **more, output_hidden_states=True)
        assert y.logits.shape == (*x.shape, tiny.VOCAB)
        for k, name in enumerate(names):
            want = only(model, name)(**{n: t[k : k + 1] for n, t in (words | more).items()}, output_hidden_states=True)
            real = mask[k].bool() if more.get("attention_mask") is mask else slice(None)
            assert near(y.logits[k][real], want.logits[0][real]), (k, name, list(more))
            assert near(y.hidden_states[-1][k][real], want.hidden_states[-1][0][real])


def greedy(model, x, mask, **kw):
    model.generation_config.eos_token_id = None
    return model.generate(input_ids=x, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, **kw)


@pytest.mark.parametrize("build", EVERY)
def test_every_row_generates_what_it_does_alone(build):
    names = EVERY[build]
    model, (x, mask) = made(build, names), some(len(names))
    for kw in ({}, {"use_cache": False}, {"num_beams": 2}):
        with lorakit.rows(model, names):
            out = greedy(model, x, mask, **kw)
        for k, name in enumerate(names):
            assert torch.equal(out[k], greedy(only(model, name), x[k : k + 1], mask[k : k + 1], **kw)[0]), (k, name, kw)


@torch.no_grad()
@pytest.mark.parametrize("build", EVERY)
def test_a_cache_is_carried_by_hand(build):
    names = EVERY[build]
    model, (x, mask) = made(build, names), some(len(names))
    for full in (None, mask):
        with lorakit.rows(model, names):
            out = model(x[:, :4], attention_mask=None if full is None else full[:, :4])
            y = [out.logits]
            for t in (4, 5):
                out = model(x[:, t : t + 1], attention_mask=None if full is None else full[:, : t + 1], past_key_values=out.past_key_values)
                y.append(out.logits)
            last = model(x[:, 6:], attention_mask=full, past_key_values=out.past_key_values).logits
            whole = model(x, attention_mask=full).logits
        y = torch.cat([*y, last], 1)
        assert all(near(y[k][mask[k].bool()], whole[k][mask[k].bool()]) for k in range(len(names)))


def grads(model, names):
    """Name -> the gradients of each adapter's tensors, taken away."""
    out = {}
    for name in dict.fromkeys(n for n in names if n is not None):
        slots = host.slots(model, name)
        out[name] = {(p, k): t.grad.clone() for p, s in slots.items() for k, t in s.parameters(name).items() if t.grad is not None}
        assert len(out[name]) > 0
    model.zero_grad()
    return out


def same(mixed, alone):
    """Each adapter's gradients, measured by its largest."""
    for name, want in alone.items():
        assert want.keys() == mixed[name].keys()
        size = max(float(t.abs().max()) for t in want.values())
        assert all(float((mixed[name][key] - g).abs().max()) <= 1e-4 * size for key, g in want.items()), name


def no_dropout(model):
    for m in model.modules():
        for k in ("p", "dropout"):
            if isinstance(getattr(m, k, None), float):
                setattr(m, k, 0.0)
    return model.train()


@pytest.mark.parametrize("build", EVERY)
def test_every_adapter_gets_the_gradient_of_its_rows_and_the_loss_is_theirs(build):
    """A label that padding would predict does not count; the first token behind a prompt does, and so do the labels of a context."""
    names = EVERY[build]
    model, (x, mask) = no_dropout(made(build, names)), some(len(names))
    labels, kinds = x.masked_fill(mask == 0, -100), torch.tensor([[1, 2, 2, 3, 4, 4, 4]]).expand(len(x), 7)
    with lorakit.rows(model, names):
        out = model(x, attention_mask=mask, labels=labels, input_type_mask=kinds)
        out.loss.backward()
    assert out.logits.shape == (*x.shape, tiny.VOCAB)
    mixed, losses, counts = grads(model, names), [], []
    for k, name in enumerate(names):
        more = {"input_type_mask": kinds[k : k + 1]} if name == "cpt" else {}
        losses.append(only(model, name)(x[k : k + 1], attention_mask=mask[k : k + 1], labels=labels[k : k + 1], **more).loss)
        counts.append(5 if name == "cpt" else int(mask[k, 0 if name in ("prompt", "ptuning") else 1 :].sum()))
    want = sum(n * loss for n, loss in zip(counts, losses, strict=True)) / sum(counts)
    want.backward()
    assert abs(float(out.loss.detach() / want.detach()) - 1) < 1e-5
    same(mixed, grads(model, names))


@torch.no_grad()
def test_a_context_that_begins_with_a_label_is_not_predicted_by_padding():
    model = tiny.llama()
    for name, many, types in (("a", 3, [4, 1, 8]), ("b", 6, [1, 2, 3, 4, 5, 6])):
        lorakit.adapt(model, "cpt", name=name, cpt_token_ids=[7] * many, cpt_tokens_type_mask=types)
    (x, _), losses = some(2), []
    with lorakit.rows(model, ["a", "b"]):
        both = model(x, labels=x).loss
    losses = [only(model, n)(x[k : k + 1], labels=x[k : k + 1]).loss for k, n in enumerate("ab")]
    assert near(both, (8 * losses[0] + 8 * losses[1]) / 16)


# Encoders, encoders with decoders, classifiers


def token_bert():
    return tf.BertForTokenClassification(tiny.bert().config).eval()


def roberta():
    torch.manual_seed(0)
    return tf.RobertaForMaskedLM(tf.RobertaConfig(
        vocab_size=tiny.VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=32,
        initializer_range=0.2, type_vocab_size=1)).eval()


BEHIND = ["prefix", None, "both", "prompt", "lora", "ptuning"]
FRONT = ["prompt", None, "ptuning", "lora", "prompt", "houlsby"]


@pytest.mark.parametrize(("build", "names"), [(tiny.bert, [*BEHIND, "houlsby"]), (token_bert, BEHIND), (roberta, FRONT), (tiny.t5, BEHIND), (tiny.bart, FRONT),
                                              (classifier, [*BEHIND, "cpt"]), (tiny.gemma3, FRONT), (tiny.gemma3, ["prefix", None, "both", "lora", "prefix"])])
def test_other_kinds_of_models(build, names):
    """Padding on the right, as classifiers have it; answers and gradients."""
    torch.manual_seed(0)
    model, (x, mask) = no_dropout(made(lambda: build().double(), names)), some(len(names))
    x, mask = torch.where(mask > 0, x, 0).flip(1), mask.flip(1)
    given = {"input_ids": x, "attention_mask": mask} | ({"decoder_input_ids": x[:, :4]} if model.config.is_encoder_decoder else {})
    if build is tiny.bert:
        given["token_type_ids"] = (torch.arange(7) > 3).long().expand(x.shape)
    with lorakit.rows(model, names):
        y = model(**given).logits
    real = mask if y.shape[1:2] == mask.shape[1:] else torch.ones(y.shape[:2])
    weight = torch.randn(y.shape) * (real if y.dim() == 2 else real[:, :, None])
    (y * weight).sum().backward()
    mixed = grads(model, names)
    for k, name in enumerate(names):
        out = only(model, name)(**{n: t[k : k + 1] for n, t in given.items()}).logits[0]
        assert near((y[k] * (weight[k] != 0)).detach(), (out * (weight[k] != 0)).detach(), 1e-9), name
        if name is not None:
            (out * weight[k]).sum().backward()
    same(mixed, grads(model, names))


@pytest.mark.parametrize("build", [tiny.t5, tiny.bart])
def test_a_decoder_behind_an_encoder_generates_every_row(build):
    names = BEHIND if build is tiny.t5 else FRONT
    model, (x, mask) = made(build, names), some(len(names))
    x, mask = x.flip(1), mask.flip(1)
    for kw in ({}, {"use_cache": False}, {"num_beams": 2}):
        with lorakit.rows(model, names):
            out = greedy(model, x, mask, **kw)
        for k, name in enumerate(names):
            assert torch.equal(out[k], greedy(only(model, name), x[k : k + 1], mask[k : k + 1], **kw)[0]), (name, kw)


@torch.no_grad()
def test_a_decoders_cache_is_carried_by_hand():
    names = ["prefix", None, "both", "lora"]
    model, (x, _) = made(tiny.t5, names), some(4)
    with lorakit.rows(model, names):
        whole, out = model(x, decoder_input_ids=x).logits, model(x, decoder_input_ids=x[:, :3])
        y, read = [out.logits], (out.encoder_last_hidden_state,)
        for t in range(3, 7):
            out = model(encoder_outputs=read, decoder_input_ids=x[:, t : t + 1], past_key_values=out.past_key_values)
            y.append(out.logits)
    assert near(torch.cat(y, 1), whole)


@torch.no_grad()
def test_spans_are_found_where_they_are():
    model = made(lambda: tf.BertForQuestionAnswering(tf.BertConfig(**tiny.bert(num_labels=2).config.to_dict())).eval(), BEHIND)
    x, at = some(6)[0], torch.arange(6)
    with lorakit.rows(model, BEHIND):
        y = model(x).start_logits
        with pytest.raises(LorakitError, match=r"adapter `prompt` \(row 3\) .* takes the padding for answers in its loss; mend: the loss of the logits"):
            model(x, start_positions=at, end_positions=at)
    for k, name in enumerate(BEHIND):
        alone = only(model, name)(x[k : k + 1], start_positions=at[k : k + 1], end_positions=at[k : k + 1])
        assert y[k].shape == (7,) and near(y[k], alone.start_logits[0])


# One adapter, and what cannot be


@pytest.mark.parametrize("name", ["prefix", "prompt", "cpt", "heads", "both"])
def test_a_mixed_batch_of_one_adapter_is_that_adapter(name):
    model, (x, mask) = made(tiny.llama, [name]), some(4)
    for words in ({}, {"attention_mask": mask}):
        with lorakit.rows(model, [name] * 4), torch.no_grad():
            out = model(x, labels=x, **words)
        want = model(x, labels=x, **words)
        assert near(out.logits, want.logits) and near(out.loss, want.loss)
    with lorakit.rows(model, [name] * 4):
        mixed = greedy(model, x, mask)
    assert torch.equal(mixed, greedy(model, x, mask))


def test_a_prompt_and_its_factors_are_trained_with_others_at_once(tmp_path):
    from lorakit.training.together import together

    x = tiny.ids(4, 8)
    labels = x.clone()
    labels[:, :3] = -100
    batches = {n: [{"input_ids": x[k : k + 2], "labels": labels[k : k + 2]}] for k, n in enumerate(("both", "prompt", "lora"))}
    ours = made(tiny.llama, batches)
    losses = together(ours, batches, steps=3, learning_rate=0.01)
    for name in batches:
        one = made(tiny.llama, batches)
        alone = together(one, {name: batches[name]}, steps=3, learning_rate=0.01)
        assert max(abs(a - b) for a, b in zip(alone[name], losses[name], strict=True)) < 1e-4 and losses[name][2] < losses[name][0]


@pytest.fixture
def shout():
    """A method of someone else's, which says nothing of rows; registered for one test."""

    @method("shout", title="Shout", paper="none", formula="model(x) + v")
    class Shout(Around):
        v = Leaf("o", normal(1.0))

        def around(self, p, inner, call, site):
            return inner(call)

    yield Shout()
    del METHODS["shout"]


def test_what_cannot_be_mixed_says_which_adapter_and_row(shout):
    x, labels = some(3)[0], {"labels": some(3)[0]}
    for build, names, why in (
            (tiny.bart, [None, "lora", "prefix"], r"`prefix` \(row 2\) puts 8 learnt columns in front, row 0 has 0, and Bart.* counts positions by itself"),
            (tiny.gemma3, ["prefix", None, "prompt"], r"adapter `prompt` \(row 2\) .*, in a window of 16; mend: one batch for the prompts"),
            (roberta, ["both", None, "lora"], r"adapter `both` \(row 0\) puts 3 learnt columns in front, row 1 has 0, and RobertaForMaskedLM counts")):
        with lorakit.rows(made(build, names) if build else None, names) as model, pytest.raises(LorakitError, match=why):
            model(x, **labels)
    model = made(tiny.llama, ["prompt"])
    lorakit.adapt(model, shout, name="shout", targets="model")
    with lorakit.rows(model, ["prompt", None, "shout"]), pytest.raises(LorakitError, match=r"adapter `shout` \(row 2\): shout changes what every row sees"):
        model(x)
    with lorakit.rows(model, ["prompt", None, None]), pytest.raises(LorakitError, match="packed into one"):
        model(x, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2]]).expand(3, 7))
    assert near(tiny.logits(only(model, "prompt"), x), tiny.logits(model, x))
