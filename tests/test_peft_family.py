"""PEFT 0.21.2 → lorakit → PEFT for the methods beside LoRA: the same function, live and merged, both ways; where it differs, PEFT's fault is named."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn

import lorakit

peft = pytest.importorskip("peft", minversion="0.21.2", reason="parity is stated against peft 0.21.2")
TOL = 1e-5
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


class Convs(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.c1 = nn.Linear(6, 12), nn.Conv1d(4, 8, 3, padding=1)
        self.c2, self.long, self.point = nn.Conv2d(4, 8, 2, padding=1), nn.Conv2d(4, 8, (4, 1)), nn.Conv2d(4, 8, 1)

    def forward(self, seed: int = 0):
        g = torch.Generator().manual_seed(seed)
        image = torch.randn(2, 4, 6, 6, generator=g)
        out = [self.linear(torch.randn(3, 6, generator=g)), self.c1(torch.randn(2, 4, 9, generator=g)), self.c2(image), self.long(image), self.point(image)]
        return torch.cat([y.flatten() for y in out])


BUILD = {"llama": tiny.llama, "gpt2": tiny.gpt2, "convs": Convs, "opt": tiny.opt}
LLAMA, GPT2 = ["q_proj", "v_proj", "down_proj"], ["c_attn", "c_fc"]
CASES = {
    "loha": ("LoHaConfig", "llama", {"target_modules": LLAMA, "r": 3, "alpha": 5}),
    "loha patterns": ("LoHaConfig", "llama", {"target_modules": LLAMA, "r": 3, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 7}}),
    "loha convs": ("LoHaConfig", "convs", {"target_modules": ["linear", "c1", "c2", "long"], "r": 2}),
    "lokr": ("LoKrConfig", "llama", {"target_modules": LLAMA, "r": 1, "alpha": 3}),
    "lokr both": ("LoKrConfig", "llama", {"target_modules": LLAMA, "r": 1, "decompose_both": True, "rank_pattern": {"q_proj": 2}}),
    "lokr factor": ("LoKrConfig", "llama", {"target_modules": LLAMA, "r": 4, "decompose_factor": 2, "init_weights": "lycoris"}),
    "loha tucker": ("LoHaConfig", "convs", {"target_modules": ["linear", "c1", "c2", "long", "point"], "r": 2, "use_effective_conv2d": True}),
    "lokr convs": ("LoKrConfig", "convs", {"target_modules": ["linear", "c1", "c2", "long", "point"], "r": 1, "alpha": 3, "decompose_both": True}),
    "lokr convs full": ("LoKrConfig", "convs", {"target_modules": ["linear", "c1", "c2", "long", "point"], "r": 4, "alpha": 3}),
    "lokr tucker": ("LoKrConfig", "convs", {"target_modules": ["linear", "c2", "point"], "r": 1, "alpha": 3, "use_effective_conv2d": True}),
    "ia3": ("IA3Config", "llama", {"target_modules": LLAMA, "feedforward_modules": ["down_proj"]}),
    "ia3 bias": ("IA3Config", "opt", {"target_modules": ["k_proj", "fc2"], "feedforward_modules": ["fc2"]}),
    "ia3 none": ("IA3Config", "llama", {"target_modules": LLAMA, "feedforward_modules": []}),
    "ia3 gpt2": ("IA3Config", "gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True}),
    "ia3 conv": ("IA3Config", "convs", {"target_modules": ["c2", "linear"], "feedforward_modules": []}),
    "oft": ("OFTConfig", "llama", {"target_modules": LLAMA, "oft_block_size": 4, "use_cayley_neumann": False}),
    "oft series": ("OFTConfig", "llama", {"target_modules": LLAMA, "oft_block_size": 4}),
    "oft blocks": ("OFTConfig", "llama", {"target_modules": LLAMA, "r": 2, "oft_block_size": 0, "block_share": True, "use_cayley_neumann": False}),
    "oft conv": ("OFTConfig", "convs", {"target_modules": ["point", "linear"], "oft_block_size": 2, "use_cayley_neumann": False}),
    "boft": ("BOFTConfig", "llama", {"target_modules": LLAMA, "boft_block_size": 4}),
    "boft blocks": ("BOFTConfig", "llama", {"target_modules": LLAMA, "boft_block_size": 0, "boft_block_num": 2}),
    "boft conv": ("BOFTConfig", "convs", {"target_modules": ["c2", "point"], "boft_block_size": 2}),
    "hra": ("HRAConfig", "llama", {"target_modules": LLAMA, "r": 4}),
    "hra gram-schmidt": ("HRAConfig", "llama", {"target_modules": LLAMA, "r": 3, "apply_GS": True}),
    "hra conv": ("HRAConfig", "convs", {"target_modules": ["c2", "point"], "r": 2}),
    "fourierft": ("FourierFTConfig", "llama", {"target_modules": LLAMA, "n_frequency": 30, "random_loc_seed": 5, "n_frequency_pattern": {"q_proj": 9}}),
    "fourierft gpt2": ("FourierFTConfig", "gpt2", {"target_modules": GPT2, "n_frequency": 30, "fan_in_fan_out": True}),
    "miss": ("MissConfig", "llama", {"target_modules": LLAMA, "r": 5}),
    "miss mini": ("MissConfig", "llama", {"target_modules": ["q_proj", "down_proj"], "r": 4, "mini_r": 4, "init_weights": "mini"}),
    "miss bat": ("MissConfig", "llama", {"target_modules": LLAMA, "r": 4, "init_weights": "bat"}),
    "vera": ("VeraConfig", "llama", {"target_modules": LLAMA, "r": 6, "projection_prng_key": 3}),
    "vera seed": ("VeraConfig", "llama", {"target_modules": LLAMA, "r": 6, "projection_prng_key": 3, "save_projection": False}),
    "vera gpt2": ("VeraConfig", "gpt2", {"target_modules": GPT2, "r": 6, "fan_in_fan_out": True}),
    "vblora": ("VBLoRAConfig", "llama", {"target_modules": LLAMA, "r": 2, "num_vectors": 9, "vector_length": 4}),
    "vblora topk": ("VBLoRAConfig", "llama", {"target_modules": LLAMA, "r": 2, "num_vectors": 9, "vector_length": 4, "save_only_topk_weights": True}),
    "vblora gpt2": ("VBLoRAConfig", "gpt2", {"target_modules": GPT2, "r": 2, "num_vectors": 9, "vector_length": 4, "fan_in_fan_out": True}),
    "ln": ("LNTuningConfig", "llama", {"target_modules": ["input_layernorm", "model.norm"]}),
    "ln gpt2": ("LNTuningConfig", "gpt2", {}),
    "adalora": ("AdaLoraConfig", "llama", {"target_modules": LLAMA, "init_r": 5, "lora_alpha": 3, "total_step": 10}),
}


@torch.no_grad()
def out(model):
    return model() if any(isinstance(m, Convs) for m in model.modules()) else tiny.logits(model)


@torch.no_grad()
def random_peft(config, kind, kw):
    torch.manual_seed(3)
    model = peft.get_peft_model(BUILD[kind](), getattr(peft, config)(**kw)).eval()
    for n, p in model.named_parameters():
        if p.requires_grad and "vblora_vector" not in n:
            p.add_(torch.randn_like(p) * 0.3)
    return model


def close(a, b):
    assert float((a - b).abs().max()) <= TOL * max(1.0, float(b.abs().max())), float((a - b).abs().max())


@torch.no_grad()
def random_adapter(model):
    g = torch.Generator().manual_seed(4)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(torch.randn(p.shape, generator=g) * 0.3)
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case, tmp_path):
    config, kind, kw = CASES[case]
    model = random_peft(config, kind, kw)
    want = out(model)
    assert float((want - out(BUILD[kind]())).abs().max()) > 1e-3
    model.save_pretrained(tmp_path / "peft")
    mine = lorakit.load(BUILD[kind](), tmp_path / "peft").eval()
    close(out(mine), want)
    close(out(lorakit.merged(mine)), want)
    lorakit.save(mine, tmp_path / "ours")
    told = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    was = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert told["peft_type"] == was["peft_type"]
    cls = getattr(peft, config)
    fields = set(cls.__dataclass_fields__)
    assert set(told) <= fields, set(told) - fields
    assert type(peft.PeftConfig.from_pretrained(tmp_path / "ours")) is cls
    if not case.endswith("topk"):
        a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "peft"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    theirs = peft.PeftModel.from_pretrained(BUILD[kind](), tmp_path / "ours").eval()
    close(out(theirs), want)
    close(out(theirs.merge_and_unload()), want)
    close(out(lorakit.load(BUILD[kind](), tmp_path / "ours")), want)


def test_fault_oft_on_patches_that_overlap_is_not_what_peft_merges(tmp_path):
    """PEFT folds the turned patches back into an image before it convolves: its live model and its merged one differ; ours is the merged one."""
    model = random_peft("OFTConfig", "convs", {"target_modules": ["c2"], "oft_block_size": 4, "use_cayley_neumann": False})
    model.save_pretrained(tmp_path / "peft")
    live = out(model)
    mine = lorakit.load(Convs(), tmp_path / "peft").eval()
    merged = out(model.merge_and_unload())
    assert float((live - merged).abs().max()) > 0.1
    close(out(mine), merged)
    lorakit.save(mine, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["peft_type"] == "LORAKIT"
    close(out(lorakit.load(Convs(), tmp_path / "ours")), merged)


OWN = {
    "lokr of two full factors on a Conv1d": ("lokr", "convs", {"targets": ["c1"], "r": 2}),
    "hra on a kernel that is not square": ("hra", "convs", {"targets": ["long"], "r": 2}),
    "boft with two factors": ("boft", "llama", {"targets": ["q_proj"], "block_size": 4, "factors": 2}),
    "vera with a magnitude": ("dvora", "llama", {"targets": ["q_proj"], "r": 4}),
    "loha on an embedding": ("loha", "llama", {"targets": ["embed_tokens"], "r": 2}),
    "oft on an embedding": ("oft", "llama", {"targets": ["embed_tokens"], "block_size": 4}),
    "two ranks where PEFT has no pattern": ("hra", "llama", {"targets": ["q_proj", "v_proj"], "r": 2, "rank_pattern": {"q_proj": 4}}),
}


@pytest.mark.parametrize("case", OWN)
def test_what_peft_cannot_say_is_our_own_format(case, tmp_path):
    recipe, kind, kw = OWN[case]
    model = lorakit.adapt(BUILD[kind](), recipe, **kw).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2)
    want = out(model)
    lorakit.save(model, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"] == "LORAKIT"
    close(out(lorakit.load(BUILD[kind](), tmp_path / "a")), want)


def test_a_pruned_adalora(tmp_path):
    model = random_peft("AdaLoraConfig", "llama", {"target_modules": ["q_proj", "v_proj"], "init_r": 5, "lora_alpha": 3, "total_step": 10})
    rank, keep = {}, {"q_proj": [True, False, True, False, True], "v_proj": [False, True, True, False, False]}
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_E" in n:
                mask = next(v for k, v in keep.items() if k in n)
                p[~torch.tensor(mask)] = 0
                rank[n.removeprefix("base_model.model.")] = mask
    model.peft_config["default"].rank_pattern = rank
    want = out(model)
    model.save_pretrained(tmp_path / "peft")
    mine = lorakit.load(tiny.llama(), tmp_path / "peft").eval()
    assert {(m.r, m.left) for s in lorakit.host.slots(mine).values() for m in s.methods.values()} == {(5, 3), (5, 2)}
    close(out(mine), want)
    lorakit.save(mine, tmp_path / "ours")
    told = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert told["init_r"] == 5 and told["lora_alpha"] == 3
    assert {k: sum(v) for k, v in told["rank_pattern"].items()} == {k.removesuffix(".default"): sum(v) for k, v in rank.items()}
    there = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "ours").eval()
    close(out(there), want)
    close(out(lorakit.load(tiny.llama(), tmp_path / "ours")), want)


def test_a_pruned_adalora_with_nothing_left_somewhere(tmp_path):
    model = random_peft("AdaLoraConfig", "llama", {"target_modules": ["q_proj", "v_proj"], "init_r": 3, "total_step": 10})
    empty = {n.removeprefix("base_model.model."): [False] * 3 for n, _ in model.named_parameters() if "v_proj.lora_E" in n}
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.mul_(0 if "v_proj.lora_E" in n else 1)
    model.peft_config["default"].rank_pattern = empty
    want = out(model)
    model.save_pretrained(tmp_path / "peft")
    assert any(t.numel() == 0 for t in load_file(tmp_path / "peft" / "adapter_model.safetensors").values())
    mine = lorakit.load(tiny.llama(), tmp_path / "peft").eval()
    close(out(mine), want)
    lorakit.save(mine, tmp_path / "ours")
    close(out(peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "ours").eval()), want)


def test_ln_tuning_beside_a_head_and_of_a_part_of_a_norm(tmp_path):
    """A layer trained whole goes beside the norms as one of modules_to_save; half a norm PEFT cannot say."""
    model = random_adapter(lorakit.adapt(tiny.llama(), "ln-tuning", modules_to_save=["lm_head"]))
    lorakit.save(model, tmp_path / "a")
    there = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "a").eval()
    assert there.peft_config["default"].peft_type == "LN_TUNING" and there.peft_config["default"].modules_to_save == ["lm_head"]
    close(out(there), out(model))
    close(out(lorakit.load(tiny.llama(), tmp_path / "a")), out(model))
    half = random_adapter(lorakit.adapt(tiny.gpt2(), "ln-tuning", parameters=["ln_f.weight"]))
    lorakit.save(half, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["peft_type"] == "LORAKIT"
    close(out(lorakit.load(tiny.gpt2(), tmp_path / "b")), out(half))


TASKS = torch.tensor([2, 0])


@torch.no_grad()
def test_poly_there_and_back(tmp_path):
    model = random_peft("PolyConfig", "llama", {"target_modules": ["q_proj", "down_proj"], "r": 2, "n_tasks": 3, "n_skills": 2, "n_splits": 2,
                                                 "task_type": "CAUSAL_LM"})
    x = torch.tensor([[1, 5, 9, 3], [7, 2, 4, 8]])
    want = model(x, task_ids=TASKS).logits
    assert float((want - model(x, task_ids=TASKS.flip(0)).logits).abs().max()) > 1e-3
    model.save_pretrained(tmp_path / "peft")
    mine = lorakit.load(tiny.llama(), tmp_path / "peft").eval()
    with lorakit.given(mine, task_ids=TASKS):
        close(mine(x).logits, want)
    lorakit.save(mine, tmp_path / "ours")
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "peft"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert type(peft.PeftConfig.from_pretrained(tmp_path / "ours")) is peft.PolyConfig
    close(peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "ours").eval()(x, task_ids=TASKS).logits, want)


@pytest.mark.parametrize("config, key", [("LoHaConfig", "rank_dropout"), ("LoKrConfig", "module_dropout"), ("OFTConfig", "module_dropout"),
                                         ("BOFTConfig", "boft_dropout")])
def test_what_has_an_effect_in_training_only_is_warned_of(config, key, tmp_path):
    model = random_peft(config, "llama", {"target_modules": ["q_proj"], key: 0.25})
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=f"`{key}: 0.25` has an effect in training only") as said:
        mine = lorakit.load(tiny.llama(), tmp_path).eval()
    assert len([w for w in said if key in str(w.message)]) == 1
    close(out(mine), out(model))


@pytest.mark.parametrize("config, key, more", [("VeraConfig", "vera_dropout", {}), ("MissConfig", "miss_dropout", {}),
                                               ("VBLoRAConfig", "vblora_dropout", {"vector_length": 4})])
def test_a_dropout_on_the_input_is_taken_over(config, key, more, tmp_path):
    random_peft(config, "llama", {"target_modules": ["q_proj"], "r": 4, key: 0.25, **more}).save_pretrained(tmp_path)
    mine = lorakit.load(tiny.llama(), tmp_path)
    assert {d for s in lorakit.host.slots(mine).values() for d in s.dropout.values()} == {0.25}


# As plain LoRA

FORMS = {"loha": {"r": 2}, "lokr": {"r": 2}, "fourierft": {"n_frequency": 6}, "oft": {"block_size": 4}, "ia3": {}}


@torch.no_grad()
def trained(recipe, seed=1, **kw):
    model = lorakit.adapt(tiny.llama(), recipe, target_modules=LLAMA, **kw).eval()
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(torch.randn(p.shape, generator=g) * 0.3)
    return model


@pytest.mark.parametrize("recipe", FORMS)
def test_saved_as_plain_lora(recipe, tmp_path):
    model = trained(recipe, **FORMS[recipe])
    lorakit.save(model, tmp_path / "exact", form="lora", rank=16)
    there = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "exact").eval()
    assert there.peft_config["default"].peft_type == "LORA"
    assert float((out(there) - out(model)).abs().max()) < 1e-4
    lorakit.save(model, tmp_path / "near", form="lora", rank=2)
    said = json.loads((tmp_path / "near" / "receipt.json").read_text())["conversion_error"]
    loaded = lorakit.merged(lorakit.load(tiny.llama(), tmp_path / "near"))
    near, base, full = (dict(m.named_parameters()) for m in (loaded, tiny.llama(), lorakit.merged(model)))
    left = whole = 0.0
    for path, error in said["modules"].items():
        n = f"{path}.weight"
        a, b = float((near[n] - full[n]).norm()), float((full[n] - base[n]).norm())
        assert abs(a / b - error) < 1e-4
        left, whole = left + a * a, whole + b * b
    assert 1e-3 < said["overall"] < 1 and abs(said["overall"] - (left / whole) ** 0.5) < 1e-3


def test_saved_as_lora_needs_a_rank_and_says_which(tmp_path):
    model = trained("oft", block_size=4)
    with pytest.raises(lorakit.LorakitError, match=r"rank=16 would be exact"):
        lorakit.save(model, tmp_path / "a", form="lora")
    with pytest.raises(lorakit.LorakitError, match="form='lora'"):
        lorakit.save(model, tmp_path / "a", rank=4)


@pytest.mark.parametrize("recipe", ["lora", "rslora", "vera"])
def test_shrink_is_the_best_of_its_rank(recipe):
    model = trained(recipe, r=6)
    base, full = dict(tiny.llama().named_parameters()), dict(lorakit.merged(model).named_parameters())
    errors = lorakit.shrink(model, "default", 2, "small")
    assert lorakit.active(model) == {"default": 1.0}
    small = dict(lorakit.merged(lorakit.activate(model, "small")).named_parameters())
    for path in errors.keys() - {"overall"}:
        n = f"{path}.weight"
        S = torch.linalg.svdvals((full[n] - base[n]).double())
        want = float(S[2:].norm() / S.norm())
        assert abs(errors[path] - want) < 1e-5 and abs(float((small[n] - full[n]).norm() / (full[n] - base[n]).norm()) - want) < 1e-4
    assert lorakit.shrink(model, "default", 6, "same")["overall"] < 1e-6
    close(out(lorakit.activate(model, "same")), out(lorakit.activate(model, "default")))
    with pytest.raises(lorakit.LorakitError, match="no product of two factors"):
        lorakit.shrink(trained("ia3"), "default", 2, "small")
