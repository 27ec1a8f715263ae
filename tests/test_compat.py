"""Code written for PEFT runs with one import changed: the same function body with PEFT and with lorakit.compat.peft, and the numbers compared."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import io
import json
import re
import subprocess
import sys
import warnings
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers as tf
from tiny import ids, logits
from torch import nn

import lorakit
from lorakit import LorakitError, host
from lorakit.compat import peft as ours

theirs = pytest.importorskip("peft", minversion="0.21.2", reason="the names are those of peft 0.21.2")
ROOT = Path(__file__).resolve().parents[1]
TOL = 1e-5
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


def gap(a, b):
    return float((a.double() - b.double()).abs().max())


def keys(P, model, name="default"):
    """The adapter's tensors; PEFT's files also hold a copy of an adapted embedding's or head's weight."""
    return {k: t.detach() for k, t in P.get_peft_model_state_dict(model, adapter_name=name).items() if not k.endswith("base_layer.weight")}


def values(P, model, name="default", scale=0.2):
    """The same random values under the same keys, whoever made the adapter."""
    out = {}
    for k, t in keys(P, model, name).items():
        g = torch.Generator().manual_seed(zlib.crc32(f"{name} {k}".encode()))
        begun = torch.zeros_like(t) if any(w in k for w in ("lora_A", "lora_B", "lora_embedding")) else t
        out[k] = begun + torch.randn(t.shape, generator=g) * scale
    head, table = "base_model.model.lm_head.lora_", "base_model.model.model.embed_tokens.lora_embedding_"
    if f"{head}A.weight" in out and f"{table}A" in out:  # one adapter for both
        out |= {f"{head}A.weight": out[f"{table}B"].mT, f"{head}B.weight": out[f"{table}A"].mT}
    assert not P.set_peft_model_state_dict(model, out, name).unexpected_keys
    return model


def trained(model):
    """What trains, in PEFT's and our spelling alike."""
    return {n.removesuffix(".weight").replace("modules_to_save.default", "modules_to_save") for n, p in model.named_parameters() if p.requires_grad}


def printed(model):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        model.print_trainable_parameters()
    return text.getvalue()


def both(body, *args, tmp=None):
    """What the body gives with PEFT, and what it gives with ours."""
    return [body(P, *args, *([tmp / n] if tmp else [])) for n, P in (("theirs", theirs), ("ours", ours))]


def same(a, b, tol=TOL, where=""):
    if isinstance(a, torch.Tensor):
        assert a.shape == b.shape and gap(a, b) <= tol, f"{where}: {gap(a, b)}"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), f"{where}: {set(a) ^ set(b)}"
        for k in a:
            same(a[k], b[k], tol, f"{where}.{k}")
    else:
        assert a == b, f"{where}: {a} and {b}"


# The quick tour

def quick_start(P, path):
    config = P.LoraConfig(task_type=P.TaskType.CAUSAL_LM, inference_mode=False, r=4, lora_alpha=32, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    model = values(P, P.get_peft_model(tiny.llama(), config), scale=0.05)
    out = {"text": printed(model), "counts": model.get_nb_trainable_parameters(), "class": type(model).__name__}
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    model.train()
    for step in range(6):
        loss = model(input_ids=ids(), attention_mask=torch.ones_like(ids()), labels=ids()).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        out[f"loss {step}"] = loss.detach()
    model.eval()
    out["trained"], out["tensors"] = logits(model), P.get_peft_model_state_dict(model)
    model.save_pretrained(path)
    again = P.PeftModel.from_pretrained(tiny.llama(), path)
    out["loaded"], out["training"], out["loaded trains"] = logits(again), again.training, trained(again)
    out["more"] = trained(P.PeftModel.from_pretrained(tiny.llama(), path, is_trainable=True))
    assert torch.equal(out["loaded"], out["trained"])
    merged = again.merge_and_unload()
    assert type(merged) is type(tiny.llama()) and not any("lora" in n for n, _ in merged.named_modules())
    out["merged"] = logits(merged)
    return out


def test_quick_start(tmp_path):
    a, b = both(quick_start, tmp=tmp_path)
    same(a, b, 2e-5)
    assert gap(b["merged"], b["trained"]) <= TOL and b["loss 5"] < b["loss 0"]
    files = {p.name for p in (tmp_path / "ours").iterdir()}
    assert files == {p.name for p in (tmp_path / "theirs").iterdir()} | {"receipt.json"}


def test_names_of_what_trains():
    model = ours.get_peft_model(tiny.llama(), ours.LoraConfig(target_modules=["q_proj", "embed_tokens"], use_dora=True))
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default" in names
    assert {n.split(".")[-2] for n in names} == {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"}
    assert model.base_model.model.model.layers[0].self_attn.q_proj is model.model.model.layers[0].self_attn.q_proj
    assert model.config is model.get_base_model().config and model.device.type == "cpu" and model.generation_config is not None
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing


# The LoRA guide: options

OPTIONS = {
    "rslora": {"target_modules": ["q_proj", "up_proj"], "use_rslora": True, "r": 5},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "all-linear": {"target_modules": "all-linear"},
    "regular expression": {"target_modules": r".*\.layers\.1\..*(q|up)_proj"},
    "default targets": {},
    "rank_pattern": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 3}, "alpha_pattern": {"v_proj": 3}},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "layers and pattern": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 0, "layers_pattern": ["h", "layers"]},
    "exclude": {"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "head": {"target_modules": ["lm_head"]},
    "bias": {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"},
    "every bias": {"target_modules": ["q_proj", "v_proj"], "bias": "all"},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 7, 11]},
    "tokens by name": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 7]}},
    "tokens, tied": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 7]},
    "tied": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "lora_bias": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    "experts": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
}
TIED = partial(tiny.llama, tied=True)
BUILD = {"bias": tiny.opt, "every bias": tiny.opt, "lora_bias": tiny.opt,  # PEFT cannot merge a lora_bias without a bias beside it
         "tokens, tied": TIED, "tied": TIED, "experts": tiny.mixtral}


def guide(P, case):
    build = BUILD.get(case, tiny.llama)
    model = P.get_peft_model(build(), P.LoraConfig(**{"r": 4, "lora_alpha": 6} | OPTIONS[case])).eval()
    start, base = logits(model), logits(build())
    out = {"start": start, "keys": sorted(keys(P, model))}
    if case != "tied":  # PEFT has the tied factors twice, over one memory
        out["trains"] = model.get_nb_trainable_parameters()[0]
    values(P, model)
    out["live"] = logits(model)
    assert gap(start, out["live"]) > 1e-3
    if case not in ("bias", "every bias", "tied"):  # PEFT trains the base's bias itself: it counts no second one, and its base is gone
        out["text"] = printed(model)
    with model.disable_adapter():
        assert (case in ("bias", "every bias") and P is theirs) or torch.equal(logits(model), base)
    assert torch.equal(logits(model), out["live"])
    model.merge_adapter()
    out["merged"] = logits(model)
    model.unmerge_adapter()
    out["unmerged"] = logits(model)
    out["plain"] = logits(model.merge_and_unload())
    return out


@pytest.mark.parametrize("case", OPTIONS)
def test_options_of_the_guide(case):
    a, b = both(guide, case)
    if case == "tied":  # PEFT merges both adapters into the one weight
        assert gap(a["merged"], a["live"]) > 1 and gap(b["merged"], b["live"]) <= 3e-5
        a, b = ({k: v for k, v in x.items() if k not in ("merged", "plain")} for x in (a, b))
    same(a, b, 3e-5)
    assert torch.equal(b["unmerged"], b["live"]), "unmerge gives the very weights back"


def start_of(P, init):
    torch.manual_seed(3)
    model = P.get_peft_model(nn.Sequential(nn.Linear(400, 300)), P.LoraConfig(r=16, target_modules=["0"], init_lora_weights=init))
    sd = P.get_peft_model_state_dict(model)
    A, B = (next(t.detach() for k, t in sd.items() if w in k) for w in ("lora_A", "lora_B"))
    return {"A": A, "B": B, "moved": gap(B @ A, torch.zeros(300, 400))}


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", False])
def test_starts(init):
    """Other random numbers than PEFT's, of the same kind."""
    a, b = both(start_of, init)
    assert (a["moved"] < TOL) == (b["moved"] < TOL) == (init is not False)
    for k in ("A", "B"):
        if init is not False or k == "A":
            assert abs(float(a[k].std() - b[k].std())) <= 0.05 * float(a[k].std())
    assert (float(b["B"].std()) > 0) == (float(a["B"].std()) > 0)
    torch.testing.assert_close(start_of(ours, init), b, rtol=0, atol=0)
    torch.manual_seed(4)
    other = ours.get_peft_model(nn.Sequential(nn.Linear(400, 300)), ours.LoraConfig(r=16, target_modules=["0"], init_lora_weights=init))
    assert not torch.equal(ours.get_peft_model_state_dict(other)["base_model.model.0.lora_A.weight"], b["A"]), "torch's seed decides, as in PEFT"


@pytest.mark.parametrize("init", ["mica", "lqer2"])
def test_starts_that_are_not_there_are_named(init):
    base = tiny.llama()
    with pytest.raises(LorakitError, match=f"init_lora_weights `{init}` is not there yet"):
        ours.get_peft_model(base, ours.LoraConfig(init_lora_weights=init))
    assert not any(isinstance(m, host.Host) for m in base.modules())


@pytest.mark.parametrize("name", ours.config.ABSENT)
def test_options_that_are_not_there_are_named(name):
    value = {"use_qalora": True, "layer_replication": [(0, 2), (1, 2)], "alora_invocation_tokens": [1]}.get(name, {"x": 1})
    with pytest.raises(LorakitError, match=f"`{name}` is not there yet"):
        ours.get_peft_model(tiny.llama(), ours.LoraConfig(target_modules=["q_proj"], **{name: value}))


def test_the_configuration_is_pefts():
    a, b = ({f.name: f for f in dataclasses.fields(P.LoraConfig)} for P in (theirs, ours))
    assert list(a) == list(b), "the same fields in the same order"
    mine, yours = ours.LoraConfig().to_dict(), theirs.LoraConfig().to_dict()
    assert {k: v for k, v in mine.items() if k != "peft_version"} == {k: v for k, v in yours.items() if k != "peft_version"}
    for P in (theirs, ours):
        assert P.LoraConfig(target_modules=["a", "b", "a"]).target_modules == {"a", "b"}
        assert P.LoraConfig().peft_type == "LORA" == P.PeftType.LORA and P.LoraConfig(task_type="SEQ_CLS").task_type == P.TaskType.SEQ_CLS
        assert not P.LoraConfig().is_prompt_learning
        for bad in ({"task_type": "NO"}, {"target_modules": "a", "layers_to_transform": 1}, {"layers_pattern": "h"}):
            with pytest.raises(ValueError):
                P.LoraConfig(**bad)


def test_default_targets_are_pefts():
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as table

    assert table == ours.config.TARGETS
    with pytest.raises(LorakitError, match=r"no default target_modules for Linear.*mend: target_modules='all-linear'"):
        ours.get_peft_model(nn.Linear(2, 2), ours.LoraConfig())


METHODS = [f"PeftModel.{n}" for n, f in vars(theirs.PeftModel).items() if not n.startswith("_") and callable(getattr(f, "__func__", f))]


@pytest.mark.parametrize("what", [
    "get_peft_model", "PeftModel.__init__", "inject_adapter_in_model", "get_peft_model_state_dict", "set_peft_model_state_dict",
    "prepare_model_for_kbit_training", "LoraModel.add_weighted_adapter", "LoraModel.merge_and_unload", "LoraModel.merge_adapter", "LoraModel.unload",
    "LoraModel.unmerge_adapter", "LoraModel.set_adapter", "AutoPeftModelForCausalLM.from_pretrained", *METHODS])
def test_signatures_are_pefts(what):
    if what in ("PeftModel.get_prompt", "PeftModel.get_prompt_embedding_to_save"):
        return  # prompts
    a, b = (P for P in (theirs, ours))
    for part in what.split("."):
        a, b = getattr(a, part), getattr(b, part)
    p, q = (list(inspect.signature(f).parameters.values()) for f in (a, b))
    want = [x for x in p if x.kind in (x.POSITIONAL_ONLY, x.POSITIONAL_OR_KEYWORD)]
    for x, y in zip(want, q, strict=False):
        assert x.name == y.name and (x.default == y.default or y.name == "import_allowlist"), f"{what}: {x} and {y}"
    assert {x.name for x in p} <= {y.name for y in q} or any(y.kind == y.VAR_KEYWORD for y in q)


def test_none_of_pefts_code_runs_in_our_model():
    """Where PEFT is installed our class is a subclass of its, so everything it has must be our own."""
    public = {n for n in vars(theirs.PeftModel) if not n.startswith("__") and n not in (
        "get_prompt", "get_prompt_embedding_to_save", "_setup_prompt_encoder", "_adjust_prompt_learning_kwargs", "_split_kwargs", "_update_offload",
        "_check_new_adapter_config", "_get_peft_specific_model_tags", "_prepare_model_for_gradient_checkpointing")}
    assert public <= set(vars(ours.PeftModel)) and len(public) > 25
    assert isinstance(ours.get_peft_model(tiny.llama(), ours.LoraConfig()), theirs.PeftModel)


# Several adapters

def several(P, path):
    model = values(P, P.get_peft_model(tiny.llama(), P.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])))
    model.add_adapter("b", P.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"], use_rslora=True))
    values(P, model, "b")
    model.eval()
    out = {"active": model.active_adapter, "names": sorted(model.peft_config), "trains": trained(model), "a": logits(model)}
    model.set_adapter("b")
    out |= {"b active": model.active_adapters, "b trains": trained(model), "b": logits(model)}
    model.base_model.set_adapter(["default", "b"])
    out |= {"both active": model.active_adapters, "both trains": trained(model), "both": logits(model)}
    model.merge_adapter()
    out["both merged"] = logits(model)
    model.unmerge_adapter()
    out["after"] = logits(model)
    model.set_adapter("default")
    with model.disable_adapter():
        out["off"] = logits(model)
        with model.disable_adapter():
            pass
        assert torch.equal(logits(model), out["off"]), "the inner block must not switch the outer one's adapters on"
    model.base_model.disable_adapter_layers()
    out["off again"] = logits(model)
    model.base_model.enable_adapter_layers()
    out["on"] = logits(model)
    model.save_pretrained(path)
    out["files"] = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.name.startswith("adapter_"))
    model.delete_adapter("default")
    out |= {"left": sorted(model.peft_config), "left active": model.active_adapters, "left trains": trained(model), "left y": logits(model)}
    again = P.PeftModel.from_pretrained(tiny.llama(), path)
    again.load_adapter(path / "b", "other")
    out |= {"again": logits(again), "again trains": trained(again), "again active": again.active_adapter}
    again.load_adapter(path / "b", "third", is_trainable=True)
    out["third trains"] = trained(again)
    again.set_adapter("other")
    out |= {"other": logits(again), "other trains": trained(again)}
    again.set_adapter("third", inference_mode=True)
    out["nothing trains"] = trained(again)
    out["unloaded"] = logits(again.unload())
    return out


def test_several_adapters(tmp_path):
    a, b = both(several, tmp=tmp_path)
    same(a, b)
    assert torch.equal(b["unloaded"], logits(tiny.llama()))
    assert b["files"] == ["adapter_config.json", "adapter_model.safetensors", "b/adapter_config.json", "b/adapter_model.safetensors"]


def test_the_last_adapter_can_be_deleted_and_another_added():
    model = ours.get_peft_model(tiny.llama(), ours.LoraConfig())
    y = logits(tiny.llama())
    model.delete_adapter("default")
    assert model.active_adapters == [] and model.peft_config == {} and torch.equal(logits(model), y)
    with model.disable_adapter():
        assert torch.equal(logits(model), y)
    model.add_adapter("new", ours.LoraConfig())
    assert model.active_adapters == []
    values(ours, model, "new").set_adapter("new")
    assert gap(logits(model), y) > 1e-3


def weighted(P, kind, weights, options, build=tiny.llama, ranks=(4, 4), targets=(["q_proj", "v_proj"], ["q_proj", "up_proj"]), run=logits):
    model = P.get_peft_model(build(), P.LoraConfig(r=ranks[0], lora_alpha=6, target_modules=targets[0]), "a")
    for n, r in zip("bc", ranks[1:], strict=False):
        model.add_adapter(n, P.LoraConfig(r=r, lora_alpha=3, target_modules=targets[1]))
    names = list("abc"[:len(weights)])
    for n in names:
        values(P, model, n)
    model.eval().add_weighted_adapter(names, weights, "mix", kind, **options)
    out = {"active": model.active_adapters, "r": model.peft_config["mix"].r, "alpha": model.peft_config["mix"].lora_alpha,
           "targets": model.peft_config["mix"].target_modules, "frozen": not any(".mix" in n for n in trained(model))}
    model.set_adapter("mix")
    return out | {"y": run(model), "tensors": {k: t.shape for k, t in keys(P, model, "mix").items()}}


EMBED = (["embed_tokens", "q_proj"], ["embed_tokens", "up_proj"])


@pytest.mark.parametrize(("kind", "weights", "options", "more"), [
    ("linear", [0.7, 0.3], {}, {}), ("linear", [0.7, -0.3], {}, {}), ("linear", [-1.3], {}, {}), ("linear", [0.5, 0.5], {}, {"targets": EMBED}),
    ("cat", [0.7, -0.3], {}, {}), ("cat", [1.0, 2.0], {}, {"ranks": (2, 5)}), ("cat", [1.0, 2.0, 0.5], {}, {"ranks": (2, 5, 3), "targets": EMBED}),
    ("svd", [0.7, -0.3], {}, {}), ("svd", [0.7, 0.3], {"svd_rank": 8}, {"ranks": (4, 3)}), ("svd", [0.7, 0.3], {"svd_rank": 2, "svd_clamp": 0.9}, {}),
    ("svd", [0.7, 0.3], {"svd_full_matrices": False}, {"targets": EMBED}), ("svd", [2.0], {}, {}),
    ("ties", [0.7, -0.3], {"density": 0.5}, {}), ("ties", [0.7, 0.3], {"density": 0.5, "majority_sign_method": "frequency"}, {"targets": EMBED}),
    ("ties_svd", [0.7, -0.3], {"density": 0.5}, {}), ("ties_svd", [1.0, 1.0], {"density": 0.3, "svd_rank": 6}, {"ranks": (4, 2), "targets": EMBED}),
    ("magnitude_prune", [0.7, 0.3], {"density": 0.4}, {}), ("magnitude_prune_svd", [0.7, 0.3], {"density": 0.4}, {}),
    ("dare_linear", [0.7, 0.3], {"density": 1.0}, {}), ("dare_ties_svd", [0.7, 0.3], {"density": 1.0}, {})], ids=str)
def test_weighted_adapters(kind, weights, options, more):
    a, b = (weighted(P, kind, weights, options, **more) for P in (theirs, ours))
    same({k: v for k, v in a.items() if k != "tensors" or kind != "cat"}, {k: v for k, v in b.items() if k != "tensors" or kind != "cat"}, 2e-5)


def test_what_cannot_be_combined_is_refused_by_name():
    with pytest.raises(LorakitError, match="peft-ties: density is needed"):
        weighted(ours, "ties", [1.0, 1.0], {})
    with pytest.raises(LorakitError, match="`liner` is unknown; did you mean `linear`"):
        weighted(ours, "liner", [1.0, 1.0], {})
    with pytest.raises(LorakitError, match="of one rank, these have 4, 2"):
        weighted(ours, "linear", [1.0, 1.0], {}, ranks=(4, 2))
    model = ours.get_peft_model(tiny.llama(), ours.LoraConfig(use_dora=True))
    with pytest.raises(LorakitError, match="adapter `default` is `magnitude` there; add_weighted_adapter combines plain LoRA"):
        model.add_weighted_adapter(["default"], [1.0], "mix")
    with pytest.raises(LorakitError, match="no adapter `defautl`; did you mean `default`"):
        model.add_weighted_adapter(["defautl"], [1.0], "mix")
    assert list(host.state_of(model.get_base_model()).specs) == ["default"] == list(model.peft_config)
    with pytest.warns(UserWarning, match="there is an adapter `default` already"):
        model.add_weighted_adapter(["default"], [1.0], "default")


def test_weighted_rslora_is_the_sum_here_and_too_large_there():
    """PEFT copies use_rslora from the first adapter, so its combination at alpha = r is sqrt(r) times too strong."""
    def body(P):
        config = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], "use_rslora": True}
        model = P.get_peft_model(tiny.llama(), P.LoraConfig(**config), "a")
        values(P, model, "a").eval().add_weighted_adapter(["a"], [1.0], "mix", "cat")
        y = logits(model)
        assert P is theirs or not model.peft_config["mix"].use_rslora
        model.set_adapter("mix")
        return gap(y, logits(model))

    a, b = both(body)
    assert b <= TOL < 1e-2 < a


# Mixed batches

def mixed(P, build, targets):
    model = values(P, P.get_peft_model(build(), P.LoraConfig(r=2, target_modules=targets), "a"), "a")
    model.add_adapter("b", P.LoraConfig(r=3, lora_alpha=5, target_modules=targets))
    values(P, model, "b").eval()
    names = ["b", "__base__", "a"]
    x = ids(3, 5)
    more = {"decoder_input_ids": x[:, :4]} if model.config.is_encoder_decoder else {}
    say = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        out = {"y": model(input_ids=x, adapter_names=names, **more).logits, "greedy": model.generate(input_ids=x, adapter_names=names, **say),
               "beams": model.generate(input_ids=x, adapter_names=names, num_beams=3, **say)}
        for n, name in enumerate(names):
            with model.disable_adapter() if name == "__base__" else contextlib.nullcontext():
                if name != "__base__":
                    model.set_adapter(name)
                assert gap(model(input_ids=x, **more).logits[n], out["y"][n]) <= TOL
        model.set_adapter("a")
        out["after"] = model(input_ids=x, **more).logits
    return out


@pytest.mark.parametrize(("build", "targets"), [(tiny.llama, ["q_proj", "down_proj"]), (tiny.bart, ["q_proj", "v_proj"]), (tiny.t5, ["q", "v"])])
def test_mixed_batches(build, targets):
    same(*both(mixed, build, targets))


def test_sampling_several_sequences_repeats_the_rows():
    model = values(ours, ours.get_peft_model(tiny.llama(), ours.LoraConfig())).eval()
    with torch.no_grad():
        y = model.generate(input_ids=ids(2, 4), adapter_names=["default", "__base__"], do_sample=True, num_return_sequences=3, max_new_tokens=2, pad_token_id=0)
    assert y.shape == (6, 6)


def test_mixed_batches_refuse_what_they_must():
    for P in (theirs, ours):
        model = P.get_peft_model(tiny.llama(), P.LoraConfig())
        with pytest.raises(ValueError, match="train"):
            model.train()(input_ids=ids(), adapter_names=["default"] * 3)
        with pytest.raises(ValueError, match="nobody"):
            model.eval()(input_ids=ids(), adapter_names=["nobody"] * 3)


# Other models

def bert_tokens():
    torch.manual_seed(0)
    return tf.BertForTokenClassification(tiny.bert().config).eval()


def bert_questions():
    torch.manual_seed(0)
    return tf.BertForQuestionAnswering(tiny.bert(num_labels=2).config).eval()


def bert_features():
    torch.manual_seed(0)
    return tf.BertModel(tiny.bert().config).eval()


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.seq = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2), nn.LogSoftmax(dim=-1))

    def forward(self, X):
        return self.seq(X)


class Unet(nn.Module):
    """A convolution and an attention with diffusers' names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.to_q, self.to_k, self.to_v = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, x):
        h = self.conv1(x).relu()
        t = h.flatten(2).mT
        t = nn.functional.scaled_dot_product_attention(self.to_q(t), self.to_k(t), self.to_v(t))
        return self.conv2(h + t.mT.reshape(h.shape))


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


MODELS = {  # build, LoraConfig, input, what the model gives
    "bert SEQ_CLS": (tiny.bert, {"task_type": "SEQ_CLS"}, {"input_ids": ids(), "labels": torch.tensor([0, 1, 2])}),
    "bert SEQ_CLS dora": (tiny.bert, {"task_type": "SEQ_CLS", "use_dora": True, "target_modules": ["query", "dense"]}, {"input_ids": ids()}),
    "bert TOKEN_CLS": (bert_tokens, {"task_type": "TOKEN_CLS"}, {"input_ids": ids(), "labels": ids() % 3}),
    "bert QUESTION_ANS": (bert_questions, {"task_type": "QUESTION_ANS"}, {
        "input_ids": ids(), "start_positions": torch.ones(3).long(), "end_positions": torch.ones(3).long()}),
    "bert FEATURE_EXTRACTION": (bert_features, {"task_type": "FEATURE_EXTRACTION"}, {"input_ids": ids()}),
    "bert, no task": (tiny.bert, {}, {"input_ids": ids()}),
    "bert, head by name": (tiny.bert, {"target_modules": ["query", "classifier"]}, {"input_ids": ids()}),
    "t5": (tiny.t5, {"task_type": "SEQ_2_SEQ_LM"}, {"input_ids": ids(), "labels": ids()[:, :4].clone()}),
    "bart": (tiny.bart, {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["q_proj", "fc1"]}, {"input_ids": ids(), "labels": ids()[:, :4].clone()}),
    "gpt2": (tiny.gpt2, {"task_type": "CAUSAL_LM", "fan_in_fan_out": True}, {"input_ids": ids(), "labels": ids()}),
    "gemma3": (tiny.gemma3, {"task_type": "CAUSAL_LM"}, {"input_ids": ids(), "labels": ids()}),
    "vit": (tiny.vit, {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}, {
        "pixel_values": noise(2, 3, 8, 8), "labels": torch.tensor([0, 2])}),
    "vit, head left alone": (tiny.vit, {"target_modules": ["q_proj", "v_proj"]}, {"pixel_values": noise(2, 3, 8, 8)}),
    "mlp": (Mlp, {"target_modules": ["seq.0", "seq.2"], "modules_to_save": ["seq.4"]}, {"X": noise(5, 20)}),
    "unet": (Unet, {"target_modules": ["conv1", "to_q", "to_k"], "init_lora_weights": "gaussian"}, {"x": noise(2, 3, 6, 6)}),
    "unet dora": (Unet, {"target_modules": ["conv1", "conv2", "to_v"], "use_dora": True}, {"x": noise(2, 3, 6, 6)}),
}


def first(out):
    names = ("logits", "start_logits", "last_hidden_state")
    return out if isinstance(out, torch.Tensor) else next(v for k in names if (v := getattr(out, k, None)) is not None)


def whole(P, case, path):
    build, options, x = MODELS[case]
    model = values(P, P.get_peft_model(build(), P.LoraConfig(r=4, lora_alpha=6, **options))).eval()
    out = {"class": type(model).__name__, "text": printed(model), "keys": sorted(keys(P, model))}
    y = model(**x)
    (y.loss if getattr(y, "loss", None) is not None else first(y).square().mean()).backward()
    out["y"] = first(y).detach()
    out["gradients"] = {n: p.grad.flatten() for n, p in sorted(
        (re.sub(r"\.modules_to_save_([Vc])\.default|\.modules_to_save\.default\.(weight|bias)", "", n).removesuffix(".weight"), p)
        for n, p in model.named_parameters() if p.grad is not None and "lora_" in n)}
    if model.get_base_model().__class__.__name__.endswith("ConditionalGeneration"):
        out["generated"] = model.generate(input_ids=x["input_ids"], max_new_tokens=5, do_sample=False)
    model.save_pretrained(path)
    Q = ours if P is theirs else theirs
    back = Q.PeftModel.from_pretrained(build(), path)  # the other library reads the folder
    assert gap(first(back(**x)).detach(), out["y"]) <= TOL, "another function on the other side"
    assert type(back).__name__ == type(model).__name__
    out["merged"] = first(back.merge_and_unload()(**x)).detach()
    return out


@pytest.mark.parametrize("case", MODELS)
def test_models(case, tmp_path):
    a, b = both(whole, case, tmp=tmp_path)
    same(a, b, 3e-5)
    assert b["gradients"] and gap(b["merged"], b["y"]) <= 3e-5
    configs = [json.loads((tmp_path / w / "adapter_config.json").read_text()) for w in ("theirs", "ours")]
    for key in ("task_type", "auto_mapping", "base_model_name_or_path", "peft_type", "r", "lora_alpha", "use_dora", "fan_in_fan_out"):
        assert configs[0][key] == configs[1][key], key


def test_positional_arguments_mean_what_they_mean_in_peft():
    def body(P):
        model = values(P, P.get_peft_model(tiny.bert(), P.LoraConfig(task_type="SEQ_CLS"))).eval()
        with torch.no_grad():
            return {"y": model(ids(), torch.ones_like(ids()), None, torch.tensor([0, 1, 2])).loss}

    same(*both(body))


# Tensors and folders

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


def test_multihead_attention():
    x, base = noise(2, 5, 16), Attention().eval()(noise(2, 5, 16)).detach()

    def body(P, targets):
        model = values(P, P.get_peft_model(Attention(), P.LoraConfig(target_modules=targets))).eval()
        y = model(x).detach()
        return {"y": y, "keys": sorted(keys(P, model))}

    same(*both(body, ["attn"]))
    a, b = both(body, ["out_proj"])
    assert gap(a["y"], base) <= TOL < 1e-1 < gap(b["y"], base), "by its own name PEFT's adapter is skipped, ours is not"


class Dilated(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, dilation=2)

    def forward(self, x):
        return self.conv(x)


def test_what_peft_cannot_do_is_saved_in_our_own_format(tmp_path):
    """A dilated convolution: PEFT's first factor drops the dilation, so its forward fails."""
    x, config = noise(1, 3, 9, 9), {"r": 4, "target_modules": ["conv"]}
    with pytest.raises(RuntimeError, match="size of tensor"):
        values(theirs, theirs.get_peft_model(Dilated(), theirs.LoraConfig(**config)))(x)
    model = values(ours, ours.get_peft_model(Dilated(), ours.LoraConfig(**config))).eval()
    model.save_pretrained(tmp_path)
    again = ours.PeftModel.from_pretrained(Dilated(), tmp_path)
    assert torch.equal(again(x), model(x)) and again.peft_config["default"].peft_type == ours.PeftType.LORAKIT
    with pytest.raises(LorakitError, match="own format"):
        again.add_weighted_adapter(["default"], [1.0], "mix")
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(ours.PeftModel.from_pretrained(Dilated(), tmp_path / "again")(x), model(x))
    assert gap(again.merge_and_unload()(x).detach(), model(x).detach()) <= TOL


def test_state_dicts(tmp_path):
    model = values(ours, ours.get_peft_model(tiny.llama(), ours.LoraConfig(r=4)))
    sd = ours.get_peft_model_state_dict(model)
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in sd
    other = ours.get_peft_model(tiny.llama(), ours.LoraConfig(r=4))
    some = dict(list(sd.items())[:3]) | {"base_model.model.nothing": torch.zeros(1)}
    result = ours.set_peft_model_state_dict(other, some)
    assert result.unexpected_keys == ["base_model.model.nothing"] and result.missing_keys == list(sd)[3:]
    assert all(torch.equal(ours.get_peft_model_state_dict(other)[k], sd[k]) for k in list(sd)[:3])
    wrong = {k: torch.zeros(2, t.shape[1]) if "lora_A" in k else t for k, t in sd.items()}
    with pytest.raises(LorakitError, match=r"lora_A.weight` has shape \[2, 16\], this model and configuration need \[4, 16\]"):
        ours.set_peft_model_state_dict(other, wrong)
    with pytest.warns(UserWarning, match="other shapes"):
        ours.set_peft_model_state_dict(other, wrong, ignore_mismatched_sizes=True)
    assert torch.equal(ours.get_peft_model_state_dict(other)[list(sd)[1]], sd[list(sd)[1]])
    full = {k: torch.full_like(t, 0.5) for k, t in model.state_dict().items()}
    taken = ours.get_peft_model_state_dict(model, full)
    assert taken.keys() == sd.keys() and all(bool((t == 0.5).all()) for t in taken.values())
    same(ours.get_peft_model_state_dict(model), sd, 0)
    model.save_pretrained(tmp_path, state_dict=full)
    same(ours.get_peft_model_state_dict(model), sd, 0)
    loaded = ours.get_peft_model_state_dict(ours.PeftModel.from_pretrained(tiny.llama(), tmp_path))
    assert all(bool((t == 0.5).all()) for t in loaded.values())
    with pytest.raises(LorakitError, match="no tensor of the adapter `default`"):
        model.save_pretrained(tmp_path, state_dict={"x": torch.zeros(1)})


def test_injecting_into_a_model():
    def body(P):
        model = P.inject_adapter_in_model(P.LoraConfig(r=3, target_modules=["seq.0", "seq.2"]), Mlp(), "own")
        assert type(model) is Mlp and list(model.peft_config) == ["own"]
        values(P, model, "own")
        sd = P.get_peft_model_state_dict(model, adapter_name="own")
        again = P.inject_adapter_in_model(P.LoraConfig(r=3, target_modules=["seq.4"]), Mlp(), state_dict=sd)  # the keys name the targets
        assert not P.set_peft_model_state_dict(again, sd).unexpected_keys
        return {"y": model(noise(5, 20)).detach(), "again": again(noise(5, 20)).detach(), "tensors": {k: t.detach() for k, t in sd.items()}}

    a, b = both(body)
    same(a, b)
    assert torch.equal(b["y"], b["again"]) and sorted(b["tensors"])[0] == "seq.0.lora_A.weight"


@pytest.mark.parametrize("P", [theirs, ours], ids=["theirs", "ours"])
def test_the_auto_classes(P, tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    tiny.vit().save_pretrained(tmp_path / "vit")
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = values(P, P.get_peft_model(base, P.LoraConfig(task_type="CAUSAL_LM"))).eval()
    model.save_pretrained(tmp_path / "adapter")
    for Q in (theirs, ours):
        again = Q.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", low_cpu_mem_usage=True)
        assert type(again).__name__ == "PeftModelForCausalLM" and gap(logits(again), logits(model)) <= TOL
        assert Q.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.bfloat16).dtype == torch.bfloat16
        with pytest.raises(ValueError, match=r"PeftModelForCausalLM"):
            Q.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
        with pytest.raises(OSError if Q is theirs else LorakitError, match=r"from_pretrained"):
            Q.AutoPeftModelForCausalLM()
    vit = P.get_peft_model(tf.AutoModelForImageClassification.from_pretrained(tmp_path / "vit"), P.LoraConfig(target_modules=["q_proj"]))
    vit.save_pretrained(tmp_path / "vit-adapter")
    for Q in (theirs, ours):
        assert type(Q.AutoPeftModel.from_pretrained(tmp_path / "vit-adapter").get_base_model()).__name__.endswith("ViTForImageClassification")


def test_the_auto_class_imports_nothing_unasked(tmp_path):
    ours.get_peft_model(Mlp(), ours.LoraConfig(target_modules=["seq.0"], base_model_name_or_path="x")).save_pretrained(tmp_path)
    with pytest.raises(LorakitError, match=r"base's class comes from `test_compat`, which is not imported unasked; mend: import_allowlist=\['test_compat'\]"):
        ours.AutoPeftModel.from_pretrained(tmp_path)


def test_a_given_configuration_stands_in_for_the_folders(tmp_path):
    def body(P, path):
        model = values(P, P.get_peft_model(tiny.llama(), P.LoraConfig(r=4, lora_alpha=4))).eval()
        model.save_pretrained(path)
        config = P.PeftConfig.from_pretrained(path)
        assert type(config) is P.LoraConfig and config.r == 4 and config.inference_mode
        as_is = P.PeftModel.from_pretrained(tiny.llama(), path, config=P.PeftConfig.from_pretrained(path))
        assert gap(logits(as_is), logits(model)) <= TOL
        config.lora_alpha = 12
        return {"y": logits(P.PeftModel.from_pretrained(tiny.llama(), path, config=config))}

    same(*both(body, tmp=tmp_path))


def test_saving_as_asked(tmp_path):
    model = ours.get_peft_model(tiny.llama(), ours.LoraConfig())
    model.add_adapter("b", ours.LoraConfig(r=2))
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    model.save_pretrained(tmp_path / "b", selected_adapters=["b"])
    assert [p.name for p in (tmp_path / "b").iterdir() if p.is_dir()] == ["b"] and not (tmp_path / "b" / "adapter_config.json").exists()
    with pytest.raises(LorakitError, match="no adapter `c`; known are default, b"):
        model.save_pretrained(tmp_path / "b", selected_adapters=["c"])
    with pytest.warns(UserWarning, match="writes no pickles"):
        model.save_pretrained(tmp_path / "p", safe_serialization=False)
    assert not list((tmp_path / "p").rglob("*.bin"))
    with pytest.raises(LorakitError, match="save_embedding_layers"):
        model.save_pretrained(tmp_path / "p", save_embedding_layers=True)
    with pytest.raises(LorakitError, match="path_initial_model"):
        model.save_pretrained(tmp_path / "p", path_initial_model_for_weight_conversion="x")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        model.save_pretrained(tmp_path / "file")
    report = lorakit.verify(tmp_path / "p", tiny.llama())
    assert "b" in (tmp_path / "p" / "b").name and report


def test_a_card_that_is_there_keeps_its_text(tmp_path):
    from huggingface_hub import ModelCard

    tmp_path.joinpath("README.md").write_text("---\nlicense: mit\ntags:\n- mine\n---\n\n# My words\n")
    base = tiny.llama()
    base.name_or_path = "some/base"
    ours.get_peft_model(base, ours.LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "# My words" in card.text and card.data.license == "mit"
    assert card.data.library_name == "peft" and card.data.base_model == "some/base" and {"mine", "lora"} <= set(card.data.tags)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"


def test_adapters_from_the_hub(tmp_path, monkeypatch):
    values(ours, ours.get_peft_model(tiny.llama(), ours.LoraConfig())).save_pretrained(tmp_path / "v1" / "sub")
    asked = []

    def snapshot_download(repo_id, *, allow_patterns, revision=None, token=None):
        asked.append((repo_id, revision, allow_patterns))
        return str(tmp_path / "v1")

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = ours.PeftModel.from_pretrained(tiny.llama(), "who/what", subfolder="sub", revision="v1")
    assert model.peft_config["default"].r == 8
    assert asked[0] == ("who/what", "v1", ["sub/adapter_config.json", "sub/adapter_model.safetensors", "sub/receipt.json"])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(LorakitError, match="who/what is no folder here and could not be had from the Hub: offline"):
        ours.PeftModel.from_pretrained(tiny.llama(), "who/what")


def test_low_cpu_mem_usage_is_taken_everywhere(tmp_path):
    y = logits(tiny.llama())
    model = ours.get_peft_model(tiny.llama(), ours.LoraConfig(), low_cpu_mem_usage=True)
    assert torch.equal(logits(model), y), "values from the start, not empty memory"
    model.add_adapter("b", ours.LoraConfig(), low_cpu_mem_usage=True)
    values(ours, model).save_pretrained(tmp_path)
    again = ours.PeftModel.from_pretrained(tiny.llama(), tmp_path, low_cpu_mem_usage=True)
    again.load_adapter(tmp_path / "b", "b", low_cpu_mem_usage=True)
    assert torch.equal(logits(again), logits(model))
    ours.inject_adapter_in_model(ours.LoraConfig(target_modules=["seq.0"]), Mlp(), low_cpu_mem_usage=True)


# Errors

def test_a_second_wrapping_is_refused():
    model = ours.get_peft_model(tiny.llama(), ours.LoraConfig())
    with pytest.raises(LorakitError, match=r"is a PeftModel already; mend: its add_adapter"):
        ours.get_peft_model(model, ours.LoraConfig())
    with pytest.raises(LorakitError, match=r"carries adapters already \(default\)"):
        ours.get_peft_model(model.get_base_model(), ours.LoraConfig())
    with pytest.raises(LorakitError, match=r"already has an adapter `default`"):
        model.add_adapter("default", ours.LoraConfig())
    base = model.unload()
    assert ours.get_peft_model(base, ours.LoraConfig()).active_adapter == "default"


def test_other_errors_name_the_mend(tmp_path):
    with pytest.raises(LorakitError, match=r"peft.tuners.lora.config.LoraConfig; mend: make it with lorakit.compat.peft.LoraConfig"):
        ours.get_peft_model(tiny.llama(), theirs.LoraConfig())
    with pytest.raises(LorakitError, match="mixed=True"):
        ours.get_peft_model(tiny.llama(), ours.LoraConfig(), mixed=True)
    with pytest.raises(LorakitError, match="no module is called `q_prj`; did you mean `q_proj`"):
        ours.get_peft_model(tiny.llama(), ours.LoraConfig(target_modules=["q_prj"]))
    model = ours.get_peft_model(tiny.llama(), ours.LoraConfig())
    for call in (model.set_adapter, model.delete_adapter, lambda n: model.set_adapter([n])):
        with pytest.raises(ValueError, match="no adapter `defualt`; did you mean `default`"):
            call("defualt")
    theirs.get_peft_model(tiny.llama(), theirs.RandLoraConfig(target_modules=["k_proj"], r=2)).save_pretrained(tmp_path)
    with pytest.raises(LorakitError, match="has no peft_type `RANDLORA`"):
        ours.PeftModel.from_pretrained(tiny.llama(), tmp_path)
    with pytest.raises(LorakitError, match="key_mapping"):
        model.load_adapter(tmp_path, "x", key_mapping={"a": "b"})
    with pytest.raises(LorakitError, match="aLoRA"):
        model(input_ids=ids(), alora_offsets=[1])
    with pytest.raises(LorakitError, match=r"there is no adapter_config.json"):
        ours.PeftModel.from_pretrained(tiny.llama(), tmp_path.parent)


def test_merging_like_peft_and_where_it_warns():
    model = values(ours, ours.get_peft_model(tiny.llama(), ours.LoraConfig())).eval()
    model.add_adapter("b", ours.LoraConfig(r=2))
    values(ours, model, "b")
    base, y = logits(tiny.llama()), logits(model)
    model.merge_adapter()
    assert model.active_adapters == ["default"] and model.get_model_status().merged_adapters == ["default"]
    with pytest.warns(UserWarning, match="merged already"):
        model.merge_adapter()
    model.merge_adapter(["b"])
    assert model.get_model_status().merged_adapters == ["default", "b"]
    with pytest.warns(UserWarning, match="unmerged before"):
        model.set_adapter("default")
    assert torch.equal(logits(model), y)
    with pytest.warns(UserWarning, match="nothing is merged"):
        model.unmerge_adapter()
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), base), "a merged adapter is switched off too"
    assert torch.equal(logits(model), y)
    with torch.no_grad():
        model.get_base_model().model.layers[0].self_attn.q_proj.lora_B.default.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert model.active_adapters == ["default"]
    plain = model.merge_and_unload(adapter_names=["b"])
    assert torch.isfinite(logits(plain)).all() and not any(isinstance(m, host.Host) for m in plain.modules())


def status(P):
    model = P.get_peft_model(tiny.bert(), P.LoraConfig(task_type="SEQ_CLS"))
    model.add_adapter("b", P.LoraConfig(r=2, task_type="SEQ_CLS"))
    rows = [dataclasses.asdict(model.get_model_status())]
    with model.disable_adapter():
        rows.append({k: v for k, v in dataclasses.asdict(P.get_model_status(model)).items() if k not in ("trainable_params", "requires_grad")})
    layers = {s.name: (s.enabled, s.active_adapters, s.requires_grad, s.available_adapters, s.devices) for s in model.get_layer_status()}
    injected = P.get_layer_status(P.inject_adapter_in_model(P.LoraConfig(target_modules=["seq.0"]), Mlp()))
    return {"rows": rows, "layers": layers, "injected": [(s.name, s.active_adapters) for s in injected]}


def test_status_is_pefts():
    same(*both(status))


def test_kbit_preparation_and_casts():
    def body(P):
        model = P.prepare_model_for_kbit_training(tiny.llama().to(torch.bfloat16))
        out = {"dtypes": {n: p.dtype for n, p in model.named_parameters()}, "train": trained(model), "gc": model.is_gradient_checkpointing}
        model.is_loaded_in_4bit = True
        model = P.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": True})
        out |= {"kbit gc": model.is_gradient_checkpointing, "hook": bool(model.get_input_embeddings()._forward_hooks)}
        wrapped = P.get_peft_model(tiny.llama(), P.LoraConfig(target_modules=["q_proj"]))
        P.utils.cast_mixed_precision_params(wrapped, torch.float16) if P is theirs else P.cast_mixed_precision_params(wrapped, torch.float16)
        return out, wrapped

    (a, _), (b, wrapped) = both(body)
    same(a, b)
    assert {p.dtype for n, p in wrapped.named_parameters() if "lora_" not in n} == {torch.float16}
    assert {p.dtype for n, p in wrapped.named_parameters() if "lora_" in n} == {torch.float32}


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for on in (False, True):
        base = tiny.llama()
        if on:
            base.gradient_checkpointing_enable({"use_reentrant": True})
        model = values(ours, ours.get_peft_model(base, ours.LoraConfig())).train()
        model(input_ids=ids(), labels=ids()).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0]
    same(*grads, 0)


def test_copies_are_independent():
    model = values(ours, ours.get_peft_model(tiny.llama(), ours.LoraConfig())).eval()
    y, other = logits(model), copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.delete_adapter("default")
    assert torch.equal(logits(model), y) and model.active_adapter == "default"


# Trainers

class Data(torch.utils.data.Dataset):
    def __init__(self, n=16):
        self.x = ids(n, 8)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, n):
        return {"input_ids": self.x[n], "labels": self.x[n], "attention_mask": torch.ones(8, dtype=torch.long)}


def trainer(P, out, steps=6, dora=False, dropout=0.2, **kw):
    torch.manual_seed(1)
    model = values(P, P.get_peft_model(tiny.llama(), P.LoraConfig(task_type="CAUSAL_LM", lora_dropout=dropout, use_dora=dora)), scale=0.05)
    args = tf.TrainingArguments(str(out), max_steps=steps, per_device_train_batch_size=4, save_steps=3, learning_rate=1e-2, report_to=[], use_cpu=True,
                                disable_tqdm=True, logging_steps=1, weight_decay=0.1, seed=7, **kw)
    return tf.Trainer(model, args, train_dataset=Data(), eval_dataset=Data(4))


def test_transformers_trainer_saves_adapters_and_goes_on_exactly(tmp_path):
    def body(P, path):
        t = trainer(P, path, dropout=0.0)  # PEFT draws its masks from other numbers
        t.train()
        return {"losses": torch.tensor([h["loss"] for h in t.state.log_history if "loss" in h]), "end": P.get_peft_model_state_dict(t.model)}

    a, b = both(body, tmp=tmp_path)
    same(a, b, 1e-4)
    assert len(b["losses"]) == 6
    files = {n: {p.name for p in (tmp_path / n / "checkpoint-3").iterdir()} for n in ("theirs", "ours")}
    assert files["ours"] == files["theirs"] | {"receipt.json"} and "model.safetensors" not in files["ours"]
    again = trainer(ours, tmp_path / "ours", dropout=0.0)
    again.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-3"))
    same(ours.get_peft_model_state_dict(again.model), b["end"], 0)
    there = theirs.PeftModel.from_pretrained(tiny.llama(), tmp_path / "ours" / "checkpoint-6")
    assert gap(logits(there), logits(again.model.eval())) <= TOL


def test_a_classifier_goes_on_exactly(tmp_path):
    data = [{"input_ids": x, "labels": int(x[0]) % 3} for x in ids(16, 8)]

    def run(resume=None):
        torch.manual_seed(1)
        model = ours.get_peft_model(tiny.bert(), ours.LoraConfig(task_type="SEQ_CLS"))
        args = tf.TrainingArguments(str(tmp_path), max_steps=4, per_device_train_batch_size=4, save_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True,
                                    disable_tqdm=True)
        tf.Trainer(model, args, train_dataset=data).train(resume_from_checkpoint=resume)
        return ours.get_peft_model_state_dict(model)

    end = run()
    assert "base_model.model.classifier.weight" in end
    same(run(str(tmp_path / "checkpoint-2")), end, 0)


def test_dora_goes_on_exactly(tmp_path):
    straight = trainer(ours, tmp_path, dora=True)
    straight.train()
    again = trainer(ours, tmp_path, dora=True)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    same(ours.get_peft_model_state_dict(again.model), ours.get_peft_model_state_dict(straight.model), 0)


def test_transformers_trainer_loads_the_best(tmp_path):
    t = trainer(ours, tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=3, metric_for_best_model="eval_loss", greater_is_better=True)
    t.train()
    best = ours.PeftModel.from_pretrained(tiny.llama(), t.state.best_model_checkpoint)
    same(ours.get_peft_model_state_dict(t.model), ours.get_peft_model_state_dict(best), 0)
    assert trained(t.model)


def test_weight_decay_reaches_the_adapter(tmp_path):
    t = trainer(ours, tmp_path, 1)
    t.create_optimizer()
    groups = {g["weight_decay"]: len(g["params"]) for g in t.optimizer.param_groups}
    assert groups == {0.1: len(trained(t.model)), 0.0: 0}


@pytest.fixture(scope="module")
def tokenizer():
    tk = pytest.importorskip("tokenizers")
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{n}" for n in range(tiny.VOCAB - 4))]
    inner = tk.Tokenizer(tk.models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = tk.pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def sft(P, out, tokenizer, model, **kw):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(str(out), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True, max_length=8, learning_rate=1e-2,
                     logging_steps=1, bf16=False, save_strategy="no", **kw)
    data = Dataset.from_dict({"text": ["w1 w2 w3 w4 w5", "w5 w4 w3 w2 w1"] * 4})
    return SFTTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)


def test_trl_sft(tmp_path, tokenizer):
    pytest.importorskip("trl")

    def body(P, path):
        model = values(P, P.get_peft_model(tiny.llama(), P.LoraConfig(task_type="CAUSAL_LM", r=4)), scale=0.05)
        t = sft(P, path, tokenizer, model)
        t.train()
        t.save_model(str(path / "end"))
        assert not list((path / "end").glob("model*.safetensors"))
        return {"losses": torch.tensor([h["loss"] for h in t.state.log_history if "loss" in h]), "end": P.get_peft_model_state_dict(model)}

    a, b = both(body, tmp=tmp_path)
    same(a, b, 1e-4)


@pytest.mark.parametrize("options", [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}], ids=str)
def test_trl_sft_with_an_adapted_head_is_refused(options, tmp_path, tokenizer):
    pytest.importorskip("trl")
    with pytest.raises(LorakitError, match=r"output head's weight without calling it.*exclude_modules=\['lm_head'\]"):
        sft(ours, tmp_path, tokenizer, ours.get_peft_model(tiny.llama(), ours.LoraConfig(task_type="CAUSAL_LM", **options)))


def test_a_replaced_forward_with_an_adapted_head_is_refused_at_its_first_call():
    model = ours.get_peft_model(tiny.llama(), ours.LoraConfig(target_modules=["lm_head"]))
    base = model.get_base_model()
    base.forward = lambda *a, **k: type(base).forward(base, *a, **k)
    with pytest.raises(LorakitError, match="would be skipped silently"):
        logits(model)


def test_trl_refuses_our_configuration_rather_than_use_peft(tmp_path, tokenizer):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    args = trl.SFTConfig(str(tmp_path), report_to=[], use_cpu=True, bf16=False)
    with pytest.raises(TypeError, match="`peft_config` must be a `peft.PeftConfig` instance"):
        trl.SFTTrainer(tiny.llama(), args=args, train_dataset=Dataset.from_dict({"text": ["w1 w2"]}), processing_class=tokenizer, peft_config=ours.LoraConfig())


def test_trl_dpo_measures_against_the_adapter_it_began_with(tmp_path, tokenizer):
    """The reference is a copy of the trained adapter, and dropout is off: at step 0 the loss is log 2 to the last digit."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    pairs = Dataset.from_dict({"prompt": ["w1 w2", "w5 w6"] * 4, "chosen": [" w3 w4", " w7 w8"] * 4, "rejected": [" w9 w10", " w11 w12"] * 4})

    def body(P, path):
        values(P, P.get_peft_model(tiny.llama(), P.LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.5))).save_pretrained(path / "sft")
        model = P.PeftModel.from_pretrained(tiny.llama(), path / "sft", is_trainable=True)
        args = trl.DPOConfig(str(path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=1e-2,
                             logging_steps=1, bf16=False, save_steps=2, max_length=12)
        t = trl.DPOTrainer(model, args=args, train_dataset=pairs, processing_class=tokenizer)
        t.train()
        losses = torch.tensor([h["loss"] for h in t.state.log_history if "loss" in h])
        assert abs(float(losses[0]) - 0.693147) < 1e-4 and losses[1] < losses[0]
        names = sorted(p.name for p in (path / "checkpoint-2").iterdir() if p.is_dir())
        return {"losses": losses, "end": P.get_peft_model_state_dict(model), "names": sorted(model.peft_config), "trains": trained(model), "saved": names}

    a, b = both(body, tmp=tmp_path)
    same(a, b, 1e-4)
    again = ours.PeftModel.from_pretrained(tiny.llama(), tmp_path / "ours" / "checkpoint-2" / "ref")
    assert gap(logits(again), logits(ours.PeftModel.from_pretrained(tiny.llama(), tmp_path / "ours" / "sft"))) <= TOL


# Without PEFT

BLOCKED = '''
import importlib.machinery, importlib.util, sys

real = importlib.machinery.PathFinder.find_spec

def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] == "peft" else real(name, path, target)

importlib.machinery.PathFinder.find_spec = classmethod(find_spec)
assert importlib.util.find_spec("peft") is None
try:
    import peft
except ImportError:
    pass
else:
    raise SystemExit("peft is there")
sys.path.insert(0, sys.argv[1])
import tempfile, tiny, torch
from lorakit.compat.peft import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model
model = get_peft_model(tiny.llama(), LoraConfig(task_type="CAUSAL_LM", r=4)).eval()
assert type(model) is PeftModelForCausalLM and isinstance(model, torch.nn.Module)
model.print_trainable_parameters()
model.add_adapter("b", LoraConfig(r=2))
with torch.no_grad():
    for n, p in model.named_parameters():
        if "lora_B" in n:
            p.normal_()
y = tiny.logits(model)
with tempfile.TemporaryDirectory() as d:
    model.save_pretrained(d)
    again = PeftModel.from_pretrained(tiny.llama(), d)
    again.load_adapter(d + "/b", "b")
assert torch.equal(tiny.logits(again), y)
mixed = again(input_ids=tiny.ids(), adapter_names=["b", "default", "__base__"]).logits
assert float((mixed[1] - y[1]).abs().max()) < 1e-5
with again.disable_adapter():
    assert torch.equal(tiny.logits(again), tiny.logits(tiny.llama()))
assert float((tiny.logits(again.merge_and_unload()) - y).abs().max()) < 1e-4
assert not [m for m in sys.modules if m.partition(".")[0] == "peft"]
print("fine")
'''


def test_it_runs_without_peft():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", BLOCKED, str(ROOT / "tests")], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines() == ["trainable params: 448 || all params: 5,904 || trainable%: 7.5881", "fine"], done.stderr


# The page

PAGE = ROOT / "docs" / "from-peft.md"


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) >= 3
    tiny.llama().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    space = SimpleNamespace().__dict__
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), space)


def test_sharding_by_accelerate_is_refused_before_the_first_step(monkeypatch):
    """It would save through peft's own functions, which find nothing: an empty checkpoint."""
    model = ours.get_peft_model(tiny.llama(), ours.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).train()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(LorakitError, match="checkpoints would be empty; mend: lorakit.training.AdapterTrainer"):
        model(tiny.ids())
    model.eval()(tiny.ids())


# The methods beside LoRA

FAMILY = {
    "VeraConfig": {"r": 6}, "LoHaConfig": {"r": 3, "rank_pattern": {"q_proj": 2}}, "LoKrConfig": {"r": 2}, "IA3Config": {}, "OFTConfig": {"oft_block_size": 4},
    "BOFTConfig": {}, "HRAConfig": {"r": 4}, "FourierFTConfig": {"n_frequency": 20, "n_frequency_pattern": {"v_proj": 7}},
    "VBLoRAConfig": {"r": 2, "num_vectors": 9, "vector_length": 4}, "MissConfig": {"r": 4}, "LNTuningConfig": {}, "AdaLoraConfig": {"total_step": 20},
}
NEEDED = {"AdaLoraConfig": {"total_step": 20}}  # fields without which PEFT makes none


@pytest.mark.parametrize("kind", [*FAMILY, "PolyConfig"])
def test_the_family_has_pefts_fields_and_defaults(kind):
    a, b = ({f.name: getattr(getattr(P, kind)(**NEEDED.get(kind, {})), f.name) for f in dataclasses.fields(getattr(P, kind))} for P in (theirs, ours))
    for d in (a, b):
        d.pop("runtime_config", None)
        d["peft_type"] = str(getattr(d["peft_type"], "value", d["peft_type"]))
        d.pop("peft_version")
    same(a, b)
    with pytest.raises(TypeError, match="no_such"):
        getattr(ours, kind)(no_such=1)
    with pytest.raises(lorakit.LorakitError, match="did you mean `target_modules`"):
        getattr(ours, kind)(targt_modules=["q_proj"])


def family(P, kind, path):
    torch.manual_seed(0)
    model = P.get_peft_model(tiny.llama(), getattr(P, kind)(task_type="CAUSAL_LM", **FAMILY[kind]))
    out = {"trains": model.get_nb_trainable_parameters()[0], "shapes": {k: t.shape for k, t in P.get_peft_model_state_dict(model).items()}}
    with torch.no_grad():  # one start for both
        state = P.get_peft_model_state_dict(model)
        g = torch.Generator().manual_seed(1)
        drawn = {k: torch.randn(t.shape, generator=g) * 0.3 for k, t in sorted(state.items())}
        new = {k: state[k] if "vera_A" in k or "vera_B" in k else t for k, t in drawn.items()}  # VeRA's are the same from one seed
    P.set_peft_model_state_dict(model, new)
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-2)
    out["logits"] = logits(model.eval())
    model(input_ids=ids(), labels=ids()).loss.backward()
    opt.step()
    out["stepped"] = logits(model)
    model.save_pretrained(path)
    out["loaded"] = logits(P.PeftModel.from_pretrained(tiny.llama(), path))
    out["merged"] = logits(P.PeftModel.from_pretrained(tiny.llama(), path).merge_and_unload())
    return out


@pytest.mark.parametrize("kind", FAMILY)
def test_the_family_runs_alike(kind, tmp_path):
    a, b = both(family, kind, tmp=tmp_path)
    same(a, b, 1e-4)


def poly(P, path):
    torch.manual_seed(0)
    config = P.PolyConfig(task_type="CAUSAL_LM", r=2, n_tasks=3, n_skills=2, n_splits=2, target_modules=["q_proj", "down_proj"])
    model = P.get_peft_model(tiny.llama(), config)
    out = {"trains": model.get_nb_trainable_parameters()[0]}
    state = P.get_peft_model_state_dict(model)
    g = torch.Generator().manual_seed(1)
    P.set_peft_model_state_dict(model, {k: torch.randn(t.shape, generator=g) * 0.3 for k, t in sorted(state.items())})
    rows, tasks = torch.tensor([[1, 5, 9, 3], [7, 2, 4, 8]]), torch.tensor([2, 0])
    with torch.no_grad():
        out["logits"] = model.eval()(input_ids=rows, task_ids=tasks).logits
        out["other"] = model(input_ids=rows, task_ids=tasks.flip(0)).logits
        out["text"] = model.generate(input_ids=rows, attention_mask=torch.ones_like(rows), task_ids=tasks, max_new_tokens=4, do_sample=False)
        model.save_pretrained(path)
        out["loaded"] = P.PeftModel.from_pretrained(tiny.llama(), path)(input_ids=rows, task_ids=tasks).logits
    return out


def test_poly_takes_the_tasks_of_a_batch(tmp_path):
    a, b = both(poly, tmp=tmp_path)
    assert float((a["logits"] - a["other"]).abs().max()) > 1e-3
    same(a, b, 1e-4)


def budget(P, path):
    """AdaLoRA's steps as its users write them: loss with the orthogonality term, step, allocation."""
    config = P.AdaLoraConfig(task_type="CAUSAL_LM", init_r=4, target_r=2, tinit=1, tfinal=2, deltaT=1, total_step=6, lora_alpha=8,
                             target_modules=["q_proj", "v_proj"])
    model = P.get_peft_model(tiny.llama(), config)
    state = P.get_peft_model_state_dict(model)
    g = torch.Generator().manual_seed(1)
    P.set_peft_model_state_dict(model, {k: torch.randn(t.shape, generator=g) * 0.3 for k, t in sorted(state.items())})
    opt, losses, left = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05), [], []
    model.train()
    for step in range(1, 7):
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        opt.step()
        model.base_model.update_and_allocate(step)
        opt.zero_grad()
        losses.append(loss.detach())
        left.append(sum(int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n))
    out = {"losses": torch.stack(losses), "left": left, "logits": logits(model.eval())}
    model.save_pretrained(path)
    out["loaded"] = logits(P.PeftModel.from_pretrained(tiny.llama(), path))
    return out


def test_adalora_allocates_its_budget(tmp_path):
    a, b = both(budget, tmp=tmp_path)
    assert a["left"][0] > a["left"][-1] == 8
    same(a, b, 1e-4)


def test_adalora_says_what_it_needs():
    with pytest.raises(lorakit.LorakitError, match="total_step is needed"):
        ours.AdaLoraConfig()
    with pytest.raises(lorakit.LorakitError, match="leave none to prune in"):
        ours.AdaLoraConfig(total_step=5, tinit=3, tfinal=2)
    with pytest.raises(lorakit.LorakitError, match="`use_dora` is not there yet"):
        ours.get_peft_model(tiny.llama(), ours.AdaLoraConfig(total_step=5, use_dora=True))
    with pytest.raises(lorakit.LorakitError, match="no active adapter has a budget"):
        ours.get_peft_model(tiny.llama(), ours.LoraConfig()).base_model.update_and_allocate(1)
