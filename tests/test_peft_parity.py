"""PEFT 0.21.2 → lorakit → PEFT on real module types: the same function, folder for folder, live and merged.

Everything random and non-zero; PEFT's own numbers are the reference. Where PEFT cannot do it or does it wrong, the last tests say so.
"""

from __future__ import annotations

import json
import re
import warnings

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn

import lorakit
from lorakit.formats.peft import file_paths
from lorakit.methods.lora import LoRA
from lorakit.recipes import compose

peft = pytest.importorskip("peft", minversion="0.21.2", reason="parity is stated against peft 0.21.2")
TOL = 1e-5


class Zoo(nn.Module):
    """One of each layer PEFT adapts outside transformers, each with its own input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 10)
        self.table = nn.Embedding(20, 6, padding_idx=3)
        self.c1 = nn.Conv1d(4, 8, 3, stride=2, padding=1)
        self.c2 = nn.Conv2d(4, 8, (3, 1), stride=(2, 1), padding=(1, 0))
        self.c2_square = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.c3 = nn.Conv3d(2, 8, (1, 2, 3), padding=(0, 1, 1))
        self.point = nn.Conv2d(4, 8, 1)

    def forward(self, seed: int = 0):
        g = torch.Generator().manual_seed(seed)
        image = torch.randn(2, 4, 7, 6, generator=g)
        out = [self.linear(self.table(torch.arange(12).view(2, 6))), self.c1(torch.randn(2, 4, 9, generator=g)), self.c2(image),
               self.c2_square(image), self.c3(torch.randn(2, 2, 4, 5, 4, generator=g)), self.point(image)]
        return torch.cat([y.flatten() for y in out])


class Attentive(nn.Module):
    """Two of torch's own attentions, and a layer norm between them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.norm, self.two = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8), nn.MultiheadAttention(8, 1)
        self.head = nn.Linear(8, 3)
        with torch.no_grad():
            for n, p in self.named_parameters():
                if "bias" in n:
                    p.normal_(0, 0.3)

    def forward(self, seed: int = 0):
        x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed))
        x = self.norm(self.one(x, x, x)[0]).transpose(0, 1)
        return self.head(self.two(x, x.flip(0), x)[0])


BUILD = {"llama": tiny.llama, "tied": lambda: tiny.llama(tied=True), "gpt2": tiny.gpt2, "bert": tiny.bert, "opt": tiny.opt, "zoo": Zoo,
         "attentive": Attentive, "mixtral": tiny.mixtral, "t5": tiny.t5, "bart": tiny.bart, "gemma3": tiny.gemma3, "vit": tiny.vit}
CONVS = ["c1", "c2", "c2_square", "c3", "point"]
CASES: dict[str, tuple[str, dict]] = {
    "llama linear": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "llama all-linear": ("llama", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "llama rslora": ("llama", {"target_modules": ["o_proj", "up_proj"], "use_rslora": True, "r": 5}),
    "llama dora": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "llama dora and rslora": ("llama", {"target_modules": ["k_proj", "down_proj"], "use_dora": True, "use_rslora": True}),
    "rank_pattern and alpha_pattern": ("llama", {"target_modules": ["q_proj", "v_proj", "up_proj"],
                                                 "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 5},
                                                 "alpha_pattern": {r"layers\.0\..*": 3, "up_proj": 7}}),
    "patterns that are ends of names": ("llama", {
        "target_modules": ["up_proj", "down_proj"], "rank_pattern": {"proj": 2, "p_proj": 3, "^up_proj": 6, "up": 7}}),
    "rank_pattern under rslora": ("llama", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "rank_pattern": {"q_proj": 9}}),
    "layers_to_transform": ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    "layers_to_transform, pattern": ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}),
    "exclude_modules": ("llama", {"target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.0.mlp.up_proj"]}),
    "exclude_modules regex": ("llama", {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.layers\.0\..*"}),
    "regex targets": ("llama", {"target_modules": r".*\.layers\.[01]\..*(q|up)_proj"}),
    "whole paths": ("llama", {"target_modules": ["model.layers.1.self_attn.q_proj", "layers.0.mlp.down_proj"]}),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding dora": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "tied embedding": ("tied", {"target_modules": ["embed_tokens", "v_proj"]}),
    "modules_to_save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "modules_to_save, layers": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["up_proj"], "use_dora": True}),
    "gpt2 conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2 dora": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True}),
    "gpt2 embeddings": ("gpt2", {"target_modules": ["wte", "wpe"], "use_rslora": True}),
    "bert head": ("bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "bert head dora": ("bert", {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS", "use_dora": True}),
    "opt": ("opt", {"target_modules": ["q_proj", "fc1", "out_proj"]}),
    "zoo conv": ("zoo", {"target_modules": CONVS}),
    "zoo conv dora": ("zoo", {"target_modules": CONVS, "use_dora": True}),
    "zoo conv patterns": ("zoo", {"target_modules": CONVS, "rank_pattern": {"c2": 2, "c3": 1}, "alpha_pattern": {"c1": 5}}),
    "zoo all": ("zoo", {"target_modules": [*CONVS, "linear", "table"], "use_dora": True, "use_rslora": True}),
    "zoo embedding": ("zoo", {"target_modules": ["table"]}),
    "attention": ("attentive", {"target_modules": ["one", "two"]}),
    "attention and patterns": ("attentive", {"target_modules": ["one", "two", "head"], "rank_pattern": {"two": 2}, "alpha_pattern": {"one": 3}}),
    "experts": ("mixtral", {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    "one of the experts' parameters": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}),
    "experts, router, rslora": ("mixtral", {"target_modules": ["v_proj"], "target_parameters": ["experts.gate_up_proj", "gate.weight"], "use_rslora": True}),
    "experts and patterns": ("mixtral", {"target_modules": ["v_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
                                         "rank_pattern": {"experts.gate_up_proj": 2}, "alpha_pattern": {r"layers\.1\..*down_proj": 3}}),
    "t5": ("t5", {"target_modules": ["q", "v", "wi", "wo"], "task_type": "SEQ_2_SEQ_LM"}),
    "t5 head": ("t5", {"target_modules": ["q", "lm_head"]}),
    "bart": ("bart", {"target_modules": ["q_proj", "fc1", "out_proj"], "use_dora": True, "task_type": "SEQ_2_SEQ_LM"}),
    "bart scaled embedding": ("bart", {"target_modules": ["encoder.embed_tokens", "k_proj"]}),
    "gemma3 scaled embedding": ("gemma3", {"target_modules": ["embed_tokens", "q_proj"]}),
    "gemma3 tied": ("gemma3", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "vit": ("vit", {"target_modules": ["q_proj", "v_proj", "fc1", "projection"], "modules_to_save": ["classifier"]}),
    "bias lora_only": ("opt", {"target_modules": ["q_proj", "fc1"], "bias": "lora_only"}),
    "bias all": ("opt", {"target_modules": ["q_proj", "fc1"], "bias": "all"}),
    "bias all, dora": ("bert", {"target_modules": ["query", "dense"], "bias": "all", "use_dora": True, "task_type": "SEQ_CLS"}),
    "lora_bias": ("opt", {"target_modules": ["q_proj", "fc1"], "lora_bias": True}),
    "lora_bias where there is none": ("llama", {"target_modules": ["q_proj", "up_proj"], "lora_bias": True, "use_rslora": True}),
    "lora_bias and bias": ("opt", {"target_modules": ["q_proj", "fc1"], "lora_bias": True, "bias": "lora_only"}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 9, 5]}),
    "tokens, tied": ("tied", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 9, 5]}),
    "tokens, scaled and tied": ("gemma3", {"target_modules": ["q_proj"], "trainable_token_indices": [8, 9]}),
    "tokens by table": ("llama", {"target_modules": ["v_proj"], "trainable_token_indices": {"embed_tokens": [5, 6, 7], "lm_head": [6, 2]}}),
    "ensure_weight_tying": ("tied", {"target_modules": ["embed_tokens", "v_proj"], "ensure_weight_tying": True}),
    "ensure_weight_tying, saved": ("tied", {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "modules_to_save, norms": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "model.norm", "embed_tokens"]}),
    "modules_to_save, a container": ("opt", {"target_modules": ["q_proj"], "modules_to_save": ["layers.1"]}),
}
TIED = ("tied embedding", "gpt2 embeddings", "bart scaled embedding", "gemma3 scaled embedding", "gemma3 tied", "ensure_weight_tying", "t5 head")
NO_PLACE = "lora_bias where there is none"  # PEFT cannot merge a bias into a layer without one
UNMATCHED = "patterns that are ends of names"  # PEFT skips a pattern that matches nothing; as an option we refuse it


@torch.no_grad()
def out(model):
    base = getattr(model, "base_model", model)
    inner = getattr(base, "model", None)
    if any(isinstance(m, Zoo | Attentive) for m in (model, inner)):
        return model()
    if "pixel_values" in (getattr(model, "main_input_name", ""), getattr(inner, "main_input_name", "")):
        return model(pixel_values=torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))).logits
    return tiny.logits(model)


@torch.no_grad()
def shake(model):
    """Random non-zero values on everything PEFT trains."""
    g = torch.Generator().manual_seed(7)
    for n, p in model.named_parameters():
        if "lora_" in n or "modules_to_save" in n or "trainable_tokens" in n or p.requires_grad:
            p.add_(torch.randn(p.shape, generator=g) * 0.2)


def by_peft(build, options, path):
    """A folder written by PEFT, its output live and merged, the base's output."""
    options = {"r": 4, "lora_alpha": 6} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = build()
        model = peft.get_peft_model(build(), peft.LoraConfig(**options)).eval()
        shake(model)
        model.save_pretrained(path)
        y, before = out(model), out(base)
        try:
            merged = out(model.merge_and_unload())
        except RuntimeError as e:
            assert "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias" in str(e)
            merged = y
    assert float((y - before).abs().max()) > 1e-2, "the random adapter must matter"
    return y, merged, before


def gap(a, b):
    return float((a - b).abs().max())


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case, tmp_path):
    kind, options = CASES[case]
    build = BUILD[kind]
    y, merged, before = by_peft(build, options, tmp_path / "theirs")

    model = lorakit.load(build(), tmp_path / "theirs")
    assert gap(out(model), y) <= TOL, "PEFT's folder gives another function here"
    if case in TIED:  # merging in place, PEFT changes the head that shares the table
        assert gap(merged, y) > 1e-2, "PEFT merges ties rightly now: strike TIED"
        merged = y
    assert gap(out(lorakit.merged(model)), merged) <= TOL, "merged differs from PEFT's merge_and_unload"
    with lorakit.disabled(model):  # torch's attention takes its fused path where nothing trains
        assert torch.equal(out(model), before) or (kind == "attentive" and gap(out(model), before) < 1e-6)

    lorakit.save(model, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # unknown config keys, missing and unexpected tensors are warnings in PEFT
        warnings.filterwarnings("ignore", message="`lora_bias=True` was passed but the targeted layer")
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings")
        back = peft.PeftModel.from_pretrained(build(), tmp_path / "ours").eval()
    assert gap(out(back), y) <= TOL, "PEFT reads another function from our folder"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert case in (*TIED, NO_PLACE) or gap(out(back.merge_and_unload()), y) <= TOL

    again = lorakit.load(build(), tmp_path / "ours")
    assert torch.equal(out(again), out(model)), "our own folder does not come back to the bit"


@pytest.mark.parametrize("case", CASES)
def test_the_same_options_reach_the_same_modules(case):
    """Options spelled as in LoraConfig select the modules, ranks and strengths that PEFT selects."""
    kind, options = CASES[case]
    options = {"r": 4, "lora_alpha": 6} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(BUILD[kind](), peft.LoraConfig(**options))
    want = {n.removeprefix("base_model.model."): (m.r["default"], m.scaling["default"])
            for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    model = BUILD[kind]()
    spec = compose("lora", **{"targets": ()} | {k: v for k, v in options.items() if k not in ("task_type", "fan_in_fan_out")})
    if case == UNMATCHED:
        with pytest.raises(lorakit.LorakitError, match="rank_pattern: no target matches `proj`"):
            spec.plan(model)
        return
    ours = spec.plan(model)
    ours, ties = spec.tied(model, ours)
    files = file_paths(dict(model.named_modules()), {p: m for p, m in ours.items() if p not in ties})
    have = {files.get(p, p): getattr(m, "inner", m).core for p, m in ours.items()}
    assert {p: (m.r, m.s) for p, m in have.items() if isinstance(m, LoRA)} == want
    whole = {n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if isinstance(m, peft.utils.ModulesToSaveWrapper)}
    mine = {p for p, m in ours.items() if getattr(m, "inner", m).replaces}
    inside = {p: any(p == w or p.startswith(f"{w}.") for w in whole) for p in mine}
    assert all(inside[p] or (options.get("bias") == "all" and p.endswith("bias")) for p in mine)
    assert all(any(p == w or p.startswith(f"{w}.") for p in mine) for w in whole)


@pytest.mark.parametrize(("method", "options"), [("lora", {}), ("rslora", {"r": 3}), ("dora", {}), ("lora-fa", {}),
                                                 ("lora", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}})])
def test_what_we_make_runs_in_peft(method, options, tmp_path):
    model = lorakit.adapt(tiny.llama(), method, **{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]} | options)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_" in n:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))) * 0.2)
    lorakit.save(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        back = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()
    assert gap(out(back), out(model)) <= TOL


def test_our_config_has_exactly_the_keys_peft_writes(tmp_path):
    """So that no other reader finds a key it does not know, nor misses one it relies on."""
    by_peft(tiny.llama, {"target_modules": ["q_proj"]}, tmp_path / "theirs")
    lorakit.save(lorakit.load(tiny.llama(), tmp_path / "theirs"), tmp_path / "ours")
    theirs, ours = (json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("theirs", "ours"))
    assert set(ours) == set(theirs)
    same = set(theirs) - {"auto_mapping", "base_model_name_or_path", "revision", "task_type"}
    assert {k: ours[k] for k in same} == {k: theirs[k] for k in same}


def test_non_zero_start_is_a_plain_lora_in_peft(tmp_path):
    model = lorakit.adapt(tiny.llama(), "lora-nonzero", r=2, target_modules=["q_proj", "v_proj"])
    with torch.no_grad():
        for slot in lorakit.host.slots(model).values():
            slot.params("default")["B"].add_(0.3)
    lorakit.save(model, tmp_path)
    back = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()
    assert gap(out(back), out(model)) <= TOL
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4


def test_peft_refuses_what_it_does_not_know_by_name(tmp_path):
    lorakit.save(lorakit.adapt(tiny.llama(), "full", target_modules=["q_proj"]), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORAKIT"
    with pytest.raises((ValueError, KeyError), match="LORAKIT"):
        peft.PeftModel.from_pretrained(tiny.llama(), tmp_path)


@pytest.mark.parametrize(("what", "options"), [
    ("layer_replication", {"layer_replication": [[0, 2], [1, 2]]})])
def test_what_changes_the_function_and_is_not_carried_out_is_refused(what, options, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=4, target_modules=["q_proj"], **options))
        model.save_pretrained(tmp_path)
    base = tiny.llama()
    with pytest.raises(lorakit.LorakitError, match=what):
        lorakit.load(base, tmp_path)
    assert not any(isinstance(m, lorakit.host.Host) for m in base.modules())


def test_other_peft_types_are_refused_by_name(tmp_path):
    peft.get_peft_model(tiny.llama(), peft.RandLoraConfig(target_modules=["k_proj"], r=2)).save_pretrained(tmp_path)
    with pytest.raises(lorakit.LorakitError, match="RANDLORA"):
        lorakit.load(tiny.llama(), tmp_path)


# Where PEFT 0.21.2 cannot do it, or its two views disagree (shared/methods/A.md 1.3)


class One(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.conv = layer

    def forward(self, x):
        return self.conv(x)


def conv(**kw):
    torch.manual_seed(0)
    return One(nn.Conv2d(4, 8, 3, **kw)).eval()


def adapted(**kw):
    model = lorakit.adapt(conv(**kw), r=4, lora_alpha=6, target_modules=["conv"])
    with torch.no_grad():
        model.conv.lora_B.default.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("kw", [{"dilation": 2}, {"groups": 2}, {"padding_mode": "circular", "padding": 1}], ids=str)
def test_convolutions_that_peft_gets_wrong(kw, tmp_path):
    """Dilated, grouped, other padding: forward equals merged here, and the folder is one PEFT refuses rather than misreads."""
    model, x = adapted(**kw), torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        y, base = model(x), conv(**kw)(x)
        assert gap(lorakit.merged(model)(x), y) <= TOL and gap(y, base) > 1e-2
        lorakit.save(model, tmp_path)
        assert torch.equal(lorakit.load(conv(**kw), tmp_path)(x), y)
    with pytest.raises((ValueError, KeyError), match="LORAKIT"):
        peft.PeftModel.from_pretrained(conv(**kw), tmp_path)


def test_peft_on_a_grouped_convolution_is_another_function_and_is_refused(tmp_path):
    """PEFT's A sees all inputs and its B is grouped: not our matrix, so the shapes must not fit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(conv(groups=2), peft.LoraConfig(r=4, target_modules=["conv"])).save_pretrained(tmp_path)
    model = conv(groups=2)
    with pytest.raises(lorakit.LorakitError, match=re.escape("conv.lora_A.weight` has shape [4, 4, 3, 3], this model and configuration need [4, 2, 3, 3]")):
        lorakit.load(model, tmp_path)
    assert type(model.conv) is nn.Conv2d


@torch.no_grad()
def test_peft_with_circular_padding_has_two_functions_and_we_take_the_merged(tmp_path):
    kw, x = {"padding_mode": "circular", "padding": 1}, torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(2))
    theirs = peft.get_peft_model(conv(**kw), peft.LoraConfig(r=4, target_modules=["conv"])).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    live = theirs(x)
    merged = theirs.merge_and_unload()(x)
    assert gap(live, merged) > 1e-2, "PEFT agrees with itself now: strike this test"
    assert gap(lorakit.load(conv(**kw), tmp_path)(x), merged) <= TOL


@pytest.mark.parametrize("dora", [False, True])
def test_training_takes_the_same_steps(dora, tmp_path):
    """From PEFT's own start, eight AdamW steps here and there end at the same weights."""
    x = tiny.ids(4, 9)
    theirs = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", use_dora=dora, task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path / "start")
    ours = lorakit.load(tiny.llama(), tmp_path / "start", trainable=True)
    for model in (theirs, ours):
        model.train()
        opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        for _ in range(8):
            model(input_ids=x, labels=x).loss.backward()
            opt.step()
            opt.zero_grad()
    theirs.save_pretrained(tmp_path / "end")
    lorakit.save(ours, tmp_path / "ours")
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("end", "ours"))
    assert a.keys() == b.keys()
    for k in a:
        assert float((a[k] - b[k]).abs().max()) < 2e-5, k


def test_the_copy_of_a_table_that_peft_keeps_tells_another_base(tmp_path):
    """PEFT writes no receipt, but the adapted embedding's own table: an adapter put on another base must not pass."""
    theirs = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=2, target_modules=["embed_tokens"], task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path)
    lorakit.load(tiny.llama(), tmp_path)
    other = tiny.llama(seed=3)
    with pytest.raises(lorakit.LorakitError, match="trained on another base: model.embed_tokens"):
        lorakit.load(other, tmp_path)
    assert type(other.model.embed_tokens) is nn.Embedding
    lorakit.load(other, tmp_path, check_base=False)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.out = nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.Linear(5, 2)

    def forward(self, x):
        return self.out(self.bn(self.conv(x)))


def test_running_statistics_of_a_saved_norm_go_both_ways(tmp_path):
    x = torch.randn(6, 3, 7, generator=torch.Generator().manual_seed(3))
    theirs = peft.get_peft_model(Normed(), peft.LoraConfig(r=2, target_modules=["conv"], modules_to_save=["bn"]))
    shake(theirs)
    for _ in range(3):
        theirs.train()(x)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    ours = lorakit.load(Normed().eval(), tmp_path / "theirs")
    assert gap(ours(x), theirs(x)) <= TOL and gap(ours(x), Normed().eval()(x)) > 1e-2
    lorakit.save(ours, tmp_path / "ours")
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("theirs", "ours"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and int(b["base_model.model.bn.num_batches_tracked"]) == 3
    assert gap(peft.PeftModel.from_pretrained(Normed(), tmp_path / "ours").eval()(x), theirs(x)) <= TOL


SMALL = {"vocab_size": tiny.VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
         "head_dim": 8, "max_position_embeddings": 32, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def qwen3_moe():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, moe_intermediate_size=12, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1))


def qwen2_moe():
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**SMALL, moe_intermediate_size=12, shared_expert_intermediate_size=12, num_experts=4,
                                              num_experts_per_tok=2, decoder_sparse_step=1))


def gpt_oss():
    """Its experts are stored the other way round, and have biases."""
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"]))


@pytest.mark.parametrize("make", [qwen2_moe, qwen3_moe, gpt_oss], ids=lambda f: f.__name__)
def test_experts_of_other_models(make, tmp_path):
    def build():
        torch.manual_seed(0)
        return make().eval()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(build(), peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]))
        shake(theirs.eval())
        theirs.save_pretrained(tmp_path / "theirs")
        y, base = out(theirs), out(build())
    ours = lorakit.load(build(), tmp_path / "theirs")
    assert gap(out(ours), y) <= TOL and gap(y, base) > 1e-2 and gap(out(lorakit.merged(ours)), y) <= 2 * TOL
    lorakit.save(ours, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert gap(out(peft.PeftModel.from_pretrained(build(), tmp_path / "ours").eval()), y) <= TOL
    every = lorakit.adapt(build(), "dora", r=2, target_parameters="experts", name="all")
    assert {p.rpartition(".")[2] for p in lorakit.host.slots(every)} == {"gate_up_proj", "down_proj"}
    assert gap(out(every), base) < TOL
