"""PEFT's data-driven starts and optimisers: the same code with PEFT and with lorakit.compat.peft, and the numbers compared."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import sys
import types

import pytest
import tiny
import torch
from tiny import ids, logits

import lorakit
from lorakit import LorakitError, host
from lorakit.compat import peft as ours
from lorakit.compat.peft import optimizers
from lorakit.quantized import packed

theirs = pytest.importorskip("peft", minversion="0.21.2", reason="the names are those of peft 0.21.2")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")
TARGETS = ["q_proj", "down_proj"]


if importlib.util.find_spec("attr") is None:  # PEFT's corda.py takes its `dataclass` from attrs, which PEFT does not ask for
    sys.modules["attr"] = types.ModuleType("attr")
    sys.modules["attr"].dataclass = dataclasses.dataclass


class Theirs:
    """PEFT, with what it keeps in modules of its own as well."""

    PLACES = {"CordaConfig": "tuners.lora.config", "preprocess_corda": "tuners.lora.corda", "create_lorafa_optimizer": "optimizers",
              "create_loraplus_optimizer": "optimizers"}

    def __getattr__(self, name):
        return getattr(importlib.import_module(f"peft.{self.PLACES[name]}") if name in self.PLACES else theirs, name)


BOTH = [Theirs(), ours]


def gap(a, b):
    return float((a.double() - b.double()).abs().max())


def tensors(P, model):
    return {k: t.detach() for k, t in P.get_peft_model_state_dict(model).items()}


def products(P, model):
    """Target -> B A."""
    t = tensors(P, model)
    return {k.removesuffix("lora_A.weight"): t[k.replace("lora_A", "lora_B")] @ t[k] for k in t if k.endswith("lora_A.weight")}


def same_span(X, Y, tol=1e-3):
    """Whether the rows of two matrices span the same space."""
    P, Q = (torch.linalg.qr(M.double().mT)[0] for M in (X, Y))
    return P.shape == Q.shape and gap(P @ P.mT, Q @ Q.mT) < tol


def batches(n=3, rows=4):
    gen = torch.Generator().manual_seed(8)
    x = [torch.randint(4, tiny.VOCAB, (rows, 9), generator=gen) for _ in range(n)]
    return [{"input_ids": b, "labels": b.clone(), "attention_mask": torch.ones_like(b)} for b in x]


def corda(P, mode="ipm", r=3, **more):
    model = tiny.llama()
    config = P.LoraConfig(r=r, lora_alpha=2 * r, target_modules=TARGETS, init_lora_weights="corda",
                          corda_config=P.CordaConfig(corda_method=mode, **more))
    P.preprocess_corda(model, config, run_model=lambda: model(input_ids=ids(1, 20)))
    return P.get_peft_model(model, config)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_starts_as_in_peft(mode):
    a, b = (corda(P, mode) for P in BOTH)
    mine = products(ours, b)
    for k, M in products(theirs, a).items():  # one batch: what each divides it by cancels
        assert gap(M, mine[k]) < 1e-3 * float(M.abs().max()), k
    assert gap(logits(b), logits(tiny.llama())) < 1e-4


def test_cordas_two_modes_differ():
    a, b = (products(ours, corda(ours, mode)) for mode in ("ipm", "kpm"))
    assert all(gap(a[k], b[k]) > 1e-3 for k in a)


def test_cordas_covariance_file_is_pefts(tmp_path):
    """What one writes the other reads; the file then stands in for running the model."""
    for writer, reader in (BOTH, BOTH[::-1]):
        file = str(tmp_path / type(writer).__name__ / "cov.pt")
        model = corda(writer, covariance_file=file)
        again = tiny.llama()
        config = reader.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, init_lora_weights="corda",
                                   corda_config=reader.CordaConfig(covariance_file=file))
        reader.preprocess_corda(again, config)
        again = reader.get_peft_model(again, config)
        other = products(reader, again)
        for k, M in products(writer, model).items():
            assert gap(M, other[k]) < 1e-3 * float(M.abs().max()), k


def test_corda_goes_through_a_folder(tmp_path):
    model = corda(ours)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    model.save_pretrained(tmp_path)
    assert gap(logits(ours.PeftModel.from_pretrained(tiny.llama(), tmp_path)), logits(model)) < 1e-4


def test_starts_that_look_at_data_ask_for_it():
    base = tiny.llama()
    for start, name in (("corda", "preprocess_corda"), ("lora_ga", "preprocess_loraga")):
        with pytest.raises(LorakitError, match=f"looks at data first; mend: {name}"):
            ours.get_peft_model(base, ours.LoraConfig(target_modules=TARGETS, init_lora_weights=start))
    assert not any(isinstance(m, host.Host) for m in base.modules())
    model = tiny.llama()
    config = ours.LoraConfig(target_modules=TARGETS, init_lora_weights="corda", r=3)
    ours.preprocess_corda(model, config, lambda: model(input_ids=ids()))
    first = ours.get_peft_model(model, config)
    with pytest.raises(LorakitError, match="looks at data first"):
        first.add_adapter("again", config)  # what was seen is used up


def lora_ga(P, direction="ArB2r", scale="stable", **more):
    """r 4: the 16 directions that PEFT's randomised decomposition is asked for are all there are."""
    model = tiny.llama()
    config = P.LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS, init_lora_weights="lora_ga",
                          lora_ga_config=P.LoraGAConfig(direction=direction, scale=scale))

    def step():
        for b in batches():
            model(**b).loss.backward()

    P.preprocess_loraga(model, config, step, **more)
    return P.get_peft_model(model, config)


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_lora_ga_spans_what_pefts_spans(direction):
    torch.manual_seed(0)
    a, b = (lora_ga(P, direction) for P in BOTH)
    x, y = tensors(theirs, a), tensors(ours, b)
    for k in x:
        turn = (lambda t: t) if "lora_A" in k else (lambda t: t.mT)
        if direction != "ArBr":  # of which A has the odd directions here and the even ones there
            assert same_span(turn(x[k]), turn(y[k])), k
    base = tiny.llama()
    assert gap(logits(b), logits(base)) < 1e-4
    assert all(p.grad is None for p in b.parameters())


def test_lora_gas_gradients_go_through_a_file(tmp_path):
    for writer, reader in (BOTH, BOTH[::-1]):
        file = str(tmp_path / type(writer).__name__ / "grads.pt")
        a = tensors(writer, lora_ga(writer, cache_file=file))
        model = tiny.llama()
        config = reader.LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS, init_lora_weights="lora_ga", lora_ga_config=reader.LoraGAConfig())
        reader.preprocess_loraga(model, config, None, cache_file=file)
        b = tensors(reader, reader.get_peft_model(model, config))
        assert all(same_span(a[k], b[k]) for k in a if k.endswith("lora_A.weight"))


def test_a_train_step_without_a_gradient_is_refused():
    model = tiny.llama()
    model.get_parameter("model.norm.weight").requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    config = ours.LoraConfig(target_modules=TARGETS, init_lora_weights="lora_ga", r=2)
    with pytest.raises(LorakitError, match="train_step left no gradient"):
        ours.preprocess_loraga(model, config, lambda: None)
    assert [p.requires_grad for p in model.parameters()] == flags and not model.training


def eva(P, rho=2.0, n=6):
    torch.manual_seed(0)
    model = P.get_peft_model(tiny.llama(), P.LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS, init_lora_weights="eva",
                                                        eva_config=P.EvaConfig(rho=rho)))
    with torch.no_grad():
        data = batches(n, rows=8)
        P.initialize_lora_eva_weights(model, data, show_progress_bar=False)
    return model


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva_finds_what_pefts_finds(rho):
    """PEFT's decomposition is randomised and stops early: the spans are near, the ranks the same."""
    a, b = (eva(P, rho, n=1) for P in BOTH)
    x, y = tensors(theirs, a), tensors(ours, b)
    assert set(x) == set(y)
    for k in x:
        assert x[k].shape == y[k].shape, k
        assert "lora_B" not in k or not y[k].any()
        if "lora_A" in k:
            cosines = torch.linalg.svdvals(torch.linalg.qr(x[k].mT)[0].mT @ torch.linalg.qr(y[k].mT)[0])
            assert float(cosines.min()) > 0.9, k
    one, two = a.peft_config["default"], b.peft_config["default"]
    assert one.rank_pattern == two.rank_pattern and one.alpha_pattern == two.alpha_pattern
    assert bool(one.rank_pattern) == (rho > 1)
    assert gap(logits(b), logits(tiny.llama())) < 1e-5


def test_evas_adapter_trains_and_goes_through_a_folder(tmp_path):
    model = eva(ours)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    first = model(**batches(1)[0]).loss
    first.backward()
    optimizer.step()
    assert model(**batches(1)[0]).loss < first
    model.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["rank_pattern"] == model.peft_config["default"].rank_pattern
    for P in (theirs, ours):
        assert gap(logits(P.PeftModel.from_pretrained(tiny.llama(), tmp_path)), logits(model)) < 1e-5


def test_eva_takes_directions_from_before():
    model, data = eva(ours), batches(6, rows=8)
    base = tiny.llama()
    config = ours.LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS, init_lora_weights="eva")
    found = ours.get_eva_state_dict(base, data, config)
    again = ours.get_peft_model(base, config)
    ours.initialize_lora_eva_weights(again, eva_state_dict=found)
    x, y = tensors(ours, model), tensors(ours, again)
    assert all(torch.equal(x[k], y[k]) for k in x) and set(x) == set(y)
    before = tensors(ours, again)
    with pytest.raises(LorakitError, match="directions of 5 numbers"):
        ours.initialize_lora_eva_weights(again, eva_state_dict={k: t[:, :5] for k, t in found.items()})
    assert all(torch.equal(before[k], t) for k, t in tensors(ours, again).items())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_loftq_packs_the_targets_and_is_nearer_the_base(bits):
    base = tiny.llama()
    want = logits(base)
    dense = {n: base.get_submodule(n).weight.detach().clone() for n, m in base.named_modules() if n.endswith(tuple(TARGETS))}
    plain = lorakit.quantize(tiny.llama(), {2: "nf2", 4: "nf4", 8: "int8"}[bits], target_modules=TARGETS)
    model = ours.get_peft_model(base, ours.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="loftq",
                                                      loftq_config=ours.LoftQConfig(loftq_bits=bits, loftq_iter=3)))
    assert set(packed(base)) == set(dense) and all(layer.original is None for layer in packed(base).values())
    for path, slot in host.slots(base).items():
        p = slot.parameters("default")
        made = base.get_submodule(path).weight + p["B"] @ p["A"] * slot.methods["default"].s
        assert (dense[path] - made).norm() < (dense[path] - plain.get_submodule(path).weight).norm()
    assert bits == 8 or gap(logits(model), want) < gap(logits(plain), want)


def test_loftq_that_fails_leaves_the_base():
    base = tiny.llama()
    before = {k: t.clone() for k, t in base.state_dict().items()}
    with pytest.raises(LorakitError, match="directions do not fit"):
        ours.get_peft_model(base, ours.LoraConfig(r=64, target_modules=TARGETS, init_lora_weights="loftq", loftq_config=ours.LoftQConfig()))
    assert not packed(base) and all(torch.equal(before[k], t) for k, t in base.state_dict().items())
    assert getattr(base.config, "quantization_config", None) is None
    with pytest.raises(LorakitError, match="needs a `loftq_config`"):
        ours.LoraConfig(init_lora_weights="loftq")


@pytest.mark.parametrize("name", ["EvaConfig", "CordaConfig", "LoraGAConfig", "LoftQConfig"])
def test_settings_are_pefts(name):
    a, b = (getattr(P, name) for P in BOTH)
    assert {f.name: getattr(a(), f.name) for f in dataclasses.fields(a)} == {f.name: getattr(b(), f.name) for f in dataclasses.fields(b)}
    field, start = next((f, s) for s, (f, cls) in ours.config.MADE.items() if cls is b)
    one, two = (P.LoraConfig(init_lora_weights=start, **{field: cls()}).to_dict()[field] for P, cls in zip(BOTH, (a, b), strict=True))
    as_dict = one if isinstance(one, dict) else dataclasses.asdict(one)
    assert as_dict == two, "as a file says it"
    assert getattr(ours.LoraConfig(init_lora_weights=start, **{field: two}), field) in (b(), two), "and reads it"


@pytest.mark.parametrize("field,value", [("eva_config", {"rho": 0.5}), ("eva_config", {"roh": 2.0}), ("corda_config", {"corda_method": "xpm"}),
                                         ("lora_ga_config", {"scale": "stabel"}), ("loftq_config", {"loftq_bits": 3})])
def test_settings_that_mean_nothing_are_refused(field, value):
    start = next(s for s, (f, _) in ours.config.MADE.items() if f == field)
    with pytest.raises(LorakitError):
        ours.LoraConfig(init_lora_weights=start, **{field: value})


def groups(P, model, optimizer):
    names = {id(p): n.removesuffix(".weight") for n, p in model.named_parameters()}
    return [([names[id(p)] for p in g["params"]], g["lr"], g["weight_decay"]) for g in optimizer.param_groups]


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"bias": "lora_only", "modules_to_save": ["norm"]}], ids=["lora", "dora", "biases"])
def test_lora_plus_has_pefts_groups(options):
    made = []
    for P in BOTH:
        targets = ["c_attn", "wte"] if not options.get("use_dora") else ["c_attn"]
        model = P.get_peft_model(tiny.gpt2(), P.LoraConfig(r=2, target_modules=targets, **{k: v if v != ["norm"] else ["ln_f"] for k, v in options.items()}))
        optimizer = P.create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.1, betas=(0.8, 0.9))
        assert optimizer.defaults["betas"] == (0.8, 0.9)
        made.append([({_plain(n) for n in g}, lr, wd) for g, lr, wd in groups(P, model, optimizer)])
    assert made[0] == made[1]
    assert any(g for g, _, _ in made[0])


def _plain(name):
    """A parameter's name, however a wrapper spells what is beside the factors."""
    for word in (".base_layer_bias", ".base_layer.bias"):
        name = name.replace(word, ".bias")
    for word in (".modules_to_save", "_adapter", ".default", ".weight"):
        name = name.replace(word, "")
    return name


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lora_fas_steps_are_pefts(decay):
    """PEFT corrects the gradient in bfloat16; the steps of Adam hardly see it."""
    out = []
    for P in BOTH:
        model = P.get_peft_model(tiny.llama(), P.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, rank_pattern={"down_proj": 2}))
        given = {k: torch.randn(t.shape, generator=torch.Generator().manual_seed(n)) * 0.1 for n, (k, t) in enumerate(sorted(tensors(P, model).items()))}
        P.set_peft_model_state_dict(model, given)
        optimizer = P.create_lorafa_optimizer(model, r=3, lora_alpha=6, lr=1e-2, weight_decay=decay)
        for b in batches(2):
            optimizer.zero_grad()
            model(**b).loss.backward()
            optimizer.step()
        assert all(torch.equal(t, given[k]) for k, t in tensors(P, model).items() if "lora_A" in k)
        out.append({k: t - given[k] for k, t in tensors(P, model).items() if "lora_B" in k})
    for k, t in out[0].items():
        far = (t - out[1][k]).abs()
        assert float(far.mean()) < 0.02 * float(t.abs().mean()) and float(far.max()) < 0.01, k


def test_lora_fas_optimizer_resumes():
    def steps(model, optimizer, data):
        for b in data:
            optimizer.zero_grad()
            model(**b).loss.backward()
            optimizer.step()

    def fresh():
        torch.manual_seed(1)
        model = ours.get_peft_model(tiny.llama(), ours.LoraConfig(r=2, target_modules=TARGETS))
        return model, optimizers.create_lorafa_optimizer(model, 2, 8, 1e-2)

    data = batches(4)
    model, optimizer = fresh()
    steps(model, optimizer, data)
    half, optimizer = fresh()
    steps(half, optimizer, data[:2])
    kept, state = tensors(ours, half), optimizer.state_dict()
    again, optimizer = fresh()
    ours.set_peft_model_state_dict(again, kept)
    optimizer.load_state_dict(state)
    steps(again, optimizer, data[2:])
    assert all(torch.equal(t, tensors(ours, again)[k]) for k, t in tensors(ours, model).items())


def test_packed_bases_are_prepared_as_quantised_ones():
    model = lorakit.quantize(tiny.llama().bfloat16(), "nf4")
    ours.prepare_model_for_kbit_training(model)
    assert model.is_gradient_checkpointing and not any(p.requires_grad for p in model.parameters())
    assert all(p.dtype == torch.float32 for p in model.parameters())
    wrapped = ours.get_peft_model(model, ours.LoraConfig(r=2, target_modules=TARGETS)).train()
    wrapped(**batches(1)[0]).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for n, p in wrapped.named_parameters() if "lora_B" in n)
    assert not ours.prepare_model_for_kbit_training(tiny.llama()).is_gradient_checkpointing
