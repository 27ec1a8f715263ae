"""Which modules: keywords, names, expressions, ranges on real architectures; every error names the nearest modules."""

from __future__ import annotations

import pytest
import tiny
from torch import nn

from lorakit import LorakitError
from lorakit.recipes import compose
from lorakit.targets import classifier, heads, layer_index, layer_numbers, select

MODELS = tiny.MODELS | {"vit": tiny.vit, "tied": lambda: tiny.llama(tied=True)}
LAST = {  # last names by keyword, as a person who knows the architecture would list them
    "llama": ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}, set()),
    "tied": ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}, set()),
    "gpt2": ({"c_attn", "c_proj"}, {"c_fc", "c_proj"}, set()),
    "opt": ({"q_proj", "k_proj", "v_proj", "out_proj"}, {"fc1", "fc2"}, set()),
    "bert": ({"query", "key", "value", "dense"}, {"dense"}, {"dense"}),  # the last: the pooler
    "vit": None,
}


def last(paths):
    return {p.rsplit(".", 1)[-1] for p in paths}


@pytest.mark.parametrize("kind", MODELS)
def test_keywords(kind):
    model = MODELS[kind]()
    every, attention, mlp = (select(model, word) for word in ("all-linear", "attention", "mlp"))
    modules = dict(model.named_modules())
    kinds = {type(modules[p]).__name__ for p in every}
    assert kinds <= {"Linear", "Conv1D"} and every == [n for n in modules if n in set(every)], "in model order"
    assert not set(attention) & set(mlp) and set(attention) | set(mlp) <= set(every)
    assert attention and mlp and all(("attn" in p or "attention" in p) for p in attention) and not any("attn" in p or ".attention" in p for p in mlp)
    out = model.get_output_embeddings()
    assert not any(modules[p] is out for p in every) and not {"lm_head", "classifier", "score"} & last(every), "the head is no target"
    if LAST[kind]:
        a, m, rest = LAST[kind]
        assert last(attention) == a and last(mlp) == m and last(set(every) - set(attention) - set(mlp)) == rest
    numbers = {layer_index(p) for p in attention} | {layer_index(p) for p in mlp}
    assert numbers == {0, 1}, "both layers"


def test_all_linear_is_every_linear_but_the_head():
    model = tiny.llama()
    assert set(select(model, "all-linear")) == {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    bert = tiny.bert()
    assert set(select(bert, "all-linear")) == {n for n, m in bert.named_modules() if isinstance(m, nn.Linear)} - {"classifier"}
    assert heads(bert) == {id(bert.classifier)} and classifier(bert) == ["classifier"] and classifier(model) == []


def test_a_plain_model_of_one_layer():
    assert select(nn.Sequential(nn.Linear(2, 2)), "all-linear") == ["0"]


@pytest.mark.parametrize(("targets", "count"), [
    (["q_proj"], 2), ("q_proj", 2), ("q_proj,v_proj", 4), ("q_proj, v_proj", 4), (["layers.1.self_attn.q_proj"], 1), ("model.layers.0.mlp.up_proj", 1),
    (["q_proj", "model.layers.0.self_attn.q_proj"], 2), (["lm_head"], 1), (["embed_tokens"], 1), (r".*\.layers\.[01]\..*_proj", 14), (r".*\.1\.mlp\..*", 3),
    (r"(?!.*\.0\.).*proj", 7), (("k_proj", "o_proj"), 4)])
def test_names_and_expressions(targets, count):
    found = select(tiny.llama(), targets)
    assert len(found) == len(set(found)) == count


def test_a_name_is_a_whole_last_part():
    """`proj` is not `q_proj`, `1` is not layer 11."""
    with pytest.raises(LorakitError, match="no module is called `proj`; did you mean"):
        select(tiny.llama(), ["proj"])
    model = nn.ModuleDict({"a1": nn.Linear(2, 2), "b": nn.ModuleDict({"a": nn.Linear(2, 2)})})
    assert select(model, ["a"]) == ["b.a"]


@pytest.mark.parametrize(("layers", "want"), [(0, {0}), ([1], {1}), ("0", {0}), ("0-1", {0, 1}), ("1,0", {0, 1}), ([0, 1], {0, 1})])
def test_layer_ranges(layers, want):
    found = select(tiny.llama(), ["q_proj", "up_proj"], layers=layers)
    assert {layer_index(p) for p in found} == want and len(found) == 2 * len(want)


def test_layer_numbers_and_patterns():
    assert layer_numbers("0-2,5") == {0, 1, 2, 5} == layer_numbers([0, 1, 2, 5]) and layer_numbers(5) == {5}
    assert layer_index("encoder.3.block.7.q") == 3 and layer_index("encoder.3.block.7.q", "block") == 7 and layer_index("head") is None
    assert layer_index("h.12.attn", "h") == 12 and layer_index("wh.12.attn", "h") is None


def test_exclude():
    model = tiny.llama()
    assert last(select(model, "all-linear", exclude=["k_proj", "down_proj"])) == {"q_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    assert select(model, ["q_proj"], exclude=r".*\.0\..*") == ["model.layers.1.self_attn.q_proj"]
    assert not last(select(model, "all-linear", exclude="attention")) & {"q_proj", "o_proj"}


@pytest.mark.parametrize(("options", "why"), [
    ({"targets": ["q_prj"]}, "target_modules: no module is called `q_prj`; did you mean `q_proj`"),
    ({"targets": "q_proj,up_poj"}, "target_modules: no module is called `up_poj`; did you mean `up_proj`"),
    ({"targets": ["zzz"]}, "no module is called `zzz`; known are .*q_proj"),
    ({"targets": ["self_attn"]},
     "`self_attn` is a LlamaAttention, which no adapter can be put on; mend: name the layers inside it: k_proj, o_proj, q_proj, v_proj"),
    ({"targets": ["input_layernorm"]}, "`input_layernorm` is a LlamaRMSNorm, which no adapter can be put on"),
    ({"targets": r".*\.layer\..*"}, r"matches no adaptable module's whole path; one path is `lm_head`"),
    ({"targets": r".*q_proj["}, "target_modules: .* is not a regular expression: unterminated character set"),
    ({"targets": ["q_proj"], "exclude": ["k_prj"]}, "exclude_modules: no module is called `k_prj`; did you mean `k_proj`"),
    ({"targets": ["q_proj"], "exclude": ["q_proj"]}, "leaves nothing to adapt; adaptable modules are called .*q_proj"),
    ({"targets": ["q_proj"], "layers": [0, 7]}, "layers_to_transform: no target in layer 7; there are layers 0 to 1"),
    ({"targets": ["q_proj"], "layers": "0-x"}, "layers: '0-x' is not a list of numbers and ranges like 0-3,7"),
    ({"targets": ["lm_head"], "layers": [0]}, "no target in layer 0"),
    ({"targets": ["q_proj"], "rank_pattern": {"k_proj": 2}}, "rank_pattern: no target matches `k_proj`; did you mean `q_proj`"),
    ({"targets": ["q_proj"], "rank_pattern": {"[qk]_pro": 2}}, r"rank_pattern: no target matches `\[qk\]_pro`"),
    ({"targets": ["q_proj"], "alpha_pattern": {"q_prj": 2}}, "alpha_pattern: no target matches `q_prj`; did you mean `q_proj`"),
    ({"targets": ["q_proj"], "rank_pattern": {"q_proj[": 2}}, "rank_pattern: a key is not a regular expression"),
    ({"targets": ["q_proj"], "modules_to_save": ["lm_haed"]}, "no module is called `lm_haed`; did you mean `lm_head`"),
])
def test_every_error_names_what_is_near(options, why):
    with pytest.raises(LorakitError, match=why):
        compose("lora", **options).plan(tiny.llama())


def test_nothing_adaptable_says_so():
    with pytest.raises(LorakitError, match=r"leaves nothing to adapt; adaptable modules are called \(none\)"):
        select(nn.Sequential(nn.LayerNorm(3)), "all-linear")


def test_the_classification_head_is_saved_whole_without_asking(bert):
    plan = compose("lora", targets=["query"]).plan(bert)
    assert [p for p, m in plan.items() if m.replaces] == ["classifier"] and len(plan) == 3
    both = compose("lora", targets=["query"], modules_to_save=["classifier"]).plan(bert)
    assert list(both) == list(plan), "named and known: once"


def test_a_head_of_several_layers_is_saved_whole():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "score": nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))})
    plan = compose("lora", targets=["body"], modules_to_save=["score"]).plan(model)
    assert [p for p, m in plan.items() if m.replaces] == ["score.0", "score.2"]


def test_what_is_saved_whole_gets_no_adapter(llama):
    plan = compose("lora", targets=["q_proj", "up_proj"], modules_to_save=["up_proj"]).plan(llama)
    assert {p.rsplit(".", 1)[-1]: m.name for p, m in plan.items()} == {"q_proj": "lora", "up_proj": "full"}


def test_targets_are_the_same_with_an_adapter_there(whole):
    import lorakit

    before = {word: select(whole, word) for word in ("all-linear", "attention", "mlp")}
    lorakit.adapt(whole, "dora", r=2)
    assert {word: select(whole, word) for word in before} == before
