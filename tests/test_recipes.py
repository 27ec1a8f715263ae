"""compose: names and options as people write them, errors with the nearest name, and data out and in again."""

from __future__ import annotations

import json

import probes  # noqa: F401
import pytest
import tiny
import torch
from torch import nn

import lorakit
from lorakit import LorakitError, host
from lorakit.inits import INITS
from lorakit.method import METHODS, Around
from lorakit.methods.lora import LoRA
from lorakit.methods.magnitude import Magnitude
from lorakit.recipes import ALIASES, RECIPES, compose, find
from lorakit.spec import Spec


@pytest.mark.parametrize("name", RECIPES)
def test_every_row_is_complete_and_found_in_any_spelling(name):
    row = RECIPES[name]
    assert row.title and row.formula and (row.init is None or row.init in INITS)
    for word in (name, name.upper(), name.replace("-", "_"), name.replace("-", " "), *row.aliases):
        assert find(word) == name
    assert all(find(a) == name for a in row.aliases)


def test_no_name_stands_for_two_rows():
    every = [n for k, r in RECIPES.items() for n in (k, *r.aliases)]
    assert len(every) == len(set(every))
    inits = [n for k, i in INITS.items() for n in (k, *i.aliases)]
    assert len(inits) == len(set(inits))


@pytest.mark.parametrize(("ours", "theirs", "value"), [
    ("r", "lora_r", 3), ("r", "lora_rank", 3), ("r", "rank", 3), ("alpha", "lora_alpha", 7), ("dropout", "lora_dropout", 0.25),
    ("targets", "target_modules", ["0"]),
    ("targets", "lora_target_modules", ["0"]), ("targets", "lora_target", ["0"]), ("exclude", "exclude_modules", ["0"]), ("layers", "layers_to_transform", [1]),
    ("init", "init_lora_weights", "gaussian")])
def test_options_may_be_spelled_as_elsewhere(ours, theirs, value):
    assert theirs in ALIASES and compose("lora", **{ours: value}) == compose("lora", **{theirs: value}) != compose("lora")


def test_switches_of_peft():
    assert compose("lora", use_dora=True, r=3).method == Magnitude(LoRA(3)) == compose("dora", r=3).method == compose("dora", use_dora=True, r=3).method
    assert compose("lora", use_rslora=True).method == LoRA(scaling="rslora") == compose("rslora").method
    assert compose("dora", use_rslora=True).method == Magnitude(LoRA(scaling="rslora"))
    assert compose("lora", use_dora=False, use_rslora=False, r=None) == compose("lora")


def test_options_reach_the_level_they_belong_to():
    spec = compose("dora", r=4, alpha=9, detach=False)
    assert spec.method == Magnitude(LoRA(4, 9.0), detach=False) and isinstance(spec.method.core.alpha, float)
    assert compose(LoRA(5), r=2).method == LoRA(2) and compose(compose("dora", r=3), r=2).method.core.r == 2
    assert compose("lora", modules_to_save="head").modules_to_save == ("head",)


@pytest.mark.parametrize(("options", "why"), [
    ({"lora_alfa": 3}, "lora has no option `lora_alfa`; did you mean `lora_alpha`"),
    ({"droput": 0.1}, "no option `droput`; did you mean `dropout`"),
    ({"target_module": ["q"]}, "no option `target_module`; did you mean `target_modules`"),
    ({"use_dorra": True}, "no option `use_dorra`; did you mean `use_dora`"),
    ({"r": 0}, "the rank r must be a whole number of at least 1, not 0"),
    ({"r": 2.5}, "must be a whole number of at least 1, not 2.5"),
    ({"r": True}, "must be a whole number of at least 1, not True"),
    ({"scaling": "rs-lora"}, "unknown scaling `rs-lora`; did you mean `rslora`"),
    ({"dropout": 1.0}, "lora_dropout must be at least 0 and below 1, not 1.0"),
    ({"dropout": -0.1}, "lora_dropout must be"),
    ({"init": "gausian"}, "init: unknown start `gausian`; did you mean `gaussian`"),
    ({"init": {"name": "nonzero", "stored": "base"}}, "init has no option `stored`; did you mean `storage`"),
    ({"init": {"name": "nonzero", "storage": "bass"}}, "init storage: unknown `bass`; did you mean `base`"),
    ({"freeze": ["C"]}, "freeze: lora has no leaf `C`; known are A, B"),
])
def test_errors_name_the_nearest(options, why):
    with pytest.raises(LorakitError, match=why):
        compose("lora", **options)


def test_unknown_recipes_name_the_nearest():
    with pytest.raises(LorakitError, match=r"unknown method `dorra`; did you mean `dora`.* \(see: lorakit methods\)"):
        compose("dorra")
    with pytest.raises(LorakitError, match=r"init gaussian sets the leaf A \(r i\), which full does not have"):
        compose("full", init="gaussian")
    with pytest.raises(LorakitError, match="full has no option `r`"):
        compose("full", r=3)


@pytest.mark.parametrize("init", [True, None, "default", "gaussian", {"name": "nonzero", "storage": "base"}, {"name": "kaiming-b"}])
def test_ways_to_say_where_the_leaves_start(init):
    spec = compose("lora", init=init)
    assert spec.init in (None, "kaiming", "gaussian", "nonzero", "kaiming-b")
    assert spec.storage == ("base" if isinstance(init, dict) and "storage" in init else "offset")


@pytest.mark.parametrize("name", RECIPES)
def test_a_spec_goes_through_json_and_comes_back_equal(name):
    options = {"targets": ["q_proj", "v_proj"], "exclude": "x", "layers": [0, 1], "layers_pattern": "h", "modules_to_save": ["head"], "seed": 5}
    if RECIPES[name].method.core.name == "lora":
        options |= {"r": 4, "alpha": 6, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3.0}, "dropout": 0.1}
    spec = compose(name, **options)
    again = Spec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec and again.to_dict() == spec.to_dict() and spec.recipe == name


SIZES = {"vb-lora": {"vector_length": 4}, "fourierft": {"n_frequency": 40}, "qa-lora": {"group": 16}}  # what a tiny model needs
REFUSED = {("hra", 1), ("spectral-rotation", 1)}  # one reflection is not the identity, one direction cannot turn


def starts(name):
    """Of a recipe: whether it wants a quantised base, and whether it looks at data."""
    init = INITS.get(RECIPES[name].init or "")
    return bool(init and (init.joint or init.mends)), bool(init and init.collect)


@pytest.mark.parametrize("r", [1, 2])
@pytest.mark.parametrize("name", [n for n in RECIPES if not starts(n)[0]])  # those are in test_quantised_training.py
def test_ranks_one_and_two_work_from_start_to_file(name, r, tmp_path):
    """Where a rank of 1 means something it must work; all else must refuse by name."""
    core = RECIPES[name].method.core
    options = ({"r": r} if hasattr(core, "r") else {}) | SIZES.get(name, {})
    build, targets = (tiny.opt, ["q_proj", "fc1"]) if name == "bitfit" else (tiny.llama, ["q_proj", "up_proj", "embed_tokens"])
    options |= {} if isinstance(core, Around) or RECIPES[name].options.get("targets") == () else {"target_modules": targets}
    if starts(name)[1]:
        options |= {"target_modules": targets[:2], "data": [{"input_ids": tiny.ids(), "labels": tiny.ids()}]}
    if (name, r) in REFUSED:
        with pytest.raises(LorakitError, match="need|mend"):
            lorakit.adapt(build(), name, **options)
        return
    model = lorakit.adapt(build(), name, **options)
    base = tiny.logits(build())
    core = next(iter(lorakit.adapters(model).values())).method.core
    if "identity" in core.laws:
        assert float((tiny.logits(model) - base).abs().max()) < 1e-5, "step 0 is not the base"
    base = tiny.logits(model)
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        model.train()(tiny.ids(), labels=tiny.ids()).loss.backward()
        opt.step()
    y = tiny.logits(model.eval())
    assert float((y - base).abs().max()) > 1e-5, "two steps changed nothing"
    lorakit.save(model, tmp_path)
    assert float((tiny.logits(lorakit.load(build(), tmp_path)) - y).abs().max()) < 1e-5
    if core.mergeable != "no":
        assert float((tiny.logits(lorakit.merged(model)) - y).abs().max()) < 1e-4


@pytest.mark.parametrize("name", [n for n, r in RECIPES.items() if hasattr(r.method.core, "r") and not any(starts(n))])
def test_a_rank_above_the_width_is_allowed_or_refused_by_name(name):
    model = nn.Sequential(nn.Linear(3, 4))
    try:
        lorakit.adapt(model, name, r=6, target_modules=["0"])
    except LorakitError as e:
        assert any(w in str(e) for w in ("fit", "divide", "no whole groups")) and "mend" in str(e)
    else:
        assert model(torch.ones(1, 3)).shape == (1, 4)


def test_an_embedding_starts_mirrored():
    """loralib and PEFT: A, which is looked up, starts at zero, B normal; on a linear layer the other way round."""
    model = lorakit.adapt(nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 7)), r=3, target_modules=["0", "1"])
    table, linear = (s.params("default") for s in host.slots(model).values())
    assert not table["A"].any() and table["B"].all() and linear["A"].all() and not linear["B"].any()
    names = {n for n, _ in model.named_parameters()}
    assert {"0.lora_embedding_A.default", "1.lora_A.default"} <= names


def test_an_embeddings_padding_row_does_not_train():
    """Its gradient is dropped as torch drops that of the base's own row."""
    model = lorakit.adapt(nn.Sequential(nn.Embedding(9, 5, padding_idx=2)), r=3, target_modules=["0"])
    model(torch.tensor([[2, 2, 4]])).sum().backward()
    A = model[0].lora_embedding_A.default
    assert not A.grad[:, 2].any() and A.grad[:, 4].any()


def test_every_registered_method_has_a_card():
    for name, cls in METHODS.items():
        assert cls.name == name and cls.card.title and cls.card.formula, name
        if not name.startswith("probe"):
            doc = __import__(cls.__module__, fromlist=["x"]).__doc__
            sign = "W'" if cls.mergeable != "no" else " = "
            assert doc and sign in doc, f"{name}: its file does not open with its formula"


def test_unset_options_do_not_override_a_recipe():
    assert compose("lora-nonzero", init=None).init == "nonzero"
    assert compose("lora-fa").freeze == ("A",) and compose("lora-fa", freeze=()).freeze == ()
