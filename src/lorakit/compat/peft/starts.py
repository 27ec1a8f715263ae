"""Starts that look at data, by PEFT's functions: `preprocess_corda` and `preprocess_loraga` before get_peft_model, EVA's after it.

What the first two see waits on the model, as target -> statistics, until an adapter with that start is put on it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit import host
from lorakit.compat.peft.config import LoraConfig, check, options_of
from lorakit.compat.peft.start_configs import EvaConfig, LoftQConfig
from lorakit.compat.peft.weights import base_of
from lorakit.errors import LorakitError
from lorakit.formats.peft import PREFIX as WRAPPED
from lorakit.inits import INITS, Init
from lorakit.method import Method
from lorakit.quantized import note, packed, quantize, unpack
from lorakit.recipes import compose
from lorakit.sites import Site, site_at
from lorakit.spec import Spec, attach

FOUND = "_lorakit_found"  # on a model: init -> target -> what it saw
BY = {"corda": "preprocess_corda(model, config, run_model)", "lora-ga": "preprocess_loraga(model, config, train_step)"}
Targets = dict[str, tuple[Method, Site]]


class _Calls(nn.Module):
    """A model whose forward pass is a call of the user's."""

    def __init__(self, model: nn.Module, call: Callable[..., Any]):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, **batch: Any) -> Any:
        return self.call(**batch)


def _targets(model: nn.Module, config: LoraConfig, init: Init) -> Targets:
    if config.init_lora_weights not in (init.name, *init.aliases, init.name.replace("-", "_")):
        raise LorakitError(f"the configuration starts with {config.init_lora_weights!r}; mend: init_lora_weights={init.name.replace('-', '_')!r}")
    modules = dict(host.walk(model))
    plan = compose("lora", heads=False, **options_of(check(config), model)).plan(model)
    return {p: (m, site_at(modules, p)) for p, m in plan.items() if init.unfit(m) is None}


def preprocess_corda(model: nn.Module, lora_config: LoraConfig, run_model: Callable[[], Any] | None = None,
                     hooked_model: nn.Module | None = None) -> None:
    """What the inputs of the targets look like while `run_model()` runs the model; hooked_model: the one that it runs, if another.

    Every row of an input counts, as in PEFT, those of padding too. PEFT divides a batch by |max X|, this by max |X|.
    """
    init = INITS["corda"]
    plan, file = _targets(hooked_model or model, lora_config, init), lora_config.corda_config.covariance_file
    if file is not None and Path(file).is_file():
        found = torch.load(file, map_location="cpu", weights_only=True)
        if missing := next((p for p in plan if p not in found), None):
            raise LorakitError(f"{file}: holds nothing for {missing}; mend: another covariance_file, or none")
    elif run_model is None:
        raise LorakitError("preprocess_corda: run_model is needed, a function that runs the model on data; mend: run_model=…, or a covariance_file that exists")
    else:
        found = init.collect(_Calls(hooked_model or model, run_model), plan, [{}], init.check({}))
        if file is not None:
            _write(file, found)
    vars(model).setdefault(FOUND, {})[init.name] = found


def preprocess_loraga(model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], Any], cache_file: str | None = None) -> None:
    """The gradients that `train_step()` leaves in the targets' weights: forward and backward passes, as many as it likes."""
    init = INITS["lora-ga"]
    plan = _targets(model, lora_config, init)
    if cache_file is not None and Path(cache_file).is_file():
        kept = torch.load(cache_file, map_location="cpu", weights_only=True)
        if missing := next((p for p in plan if f"{p}._peft_loraga_grad" not in kept), None):
            raise LorakitError(f"{cache_file}: holds nothing for {missing}; mend: another cache_file, or none")
        grads = {p: kept[f"{p}._peft_loraga_grad"] for p in plan}
    else:
        grads = _gradients(model, plan, train_step)
        if cache_file is not None:
            _write(cache_file, {f"{p}._peft_loraga_grad": g for p, g in grads.items()})
    vars(model).setdefault(FOUND, {})[init.name] = {p: plan[p][1].view(g.float()) for p, g in grads.items()}


def _gradients(model: nn.Module, plan: Targets, train_step: Callable[[], Any]) -> dict[str, Tensor]:
    weights = {p: site.store.read() for p, (_, site) in plan.items()}
    if odd := next((p for p, W in weights.items() if not isinstance(W, nn.Parameter) or not W.is_floating_point()), None):
        raise LorakitError(f"{odd}: LoRA-GA needs the gradient of its weight, which is quantised or computed; mend: leave it out of the targets")
    mine, flags, train = {id(W) for W in weights.values()}, [(p, p.requires_grad) for p in model.parameters()], model.training
    grads = [(p, p.grad) for p, _ in flags]
    try:
        model.train()
        for p, _ in flags:
            p.grad = None
            p.requires_grad_(id(p) in mine)
        with torch.enable_grad():
            train_step()
        out = {p: None if W.grad is None else W.grad.detach().to("cpu") for p, W in weights.items()}
    finally:
        model.train(train)
        for (p, flag), (_, g) in zip(flags, grads, strict=True):
            p.requires_grad_(flag)
            p.grad = g
    if bad := next((p for p, g in out.items() if g is None or not torch.isfinite(g).all() or not g.any()), None):
        raise LorakitError(f"{bad}: train_step left no gradient there, or one that is not finite; mend: loss.backward() in it, or leave it out of the targets")
    return out


def _write(file: str, tensors: Mapping[str, Tensor]) -> None:
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    torch.save(dict(tensors), part)
    part.replace(path)


@contextmanager
def begun(model: nn.Module, config: LoraConfig, spec: Spec, plan: Mapping[str, Method]) -> Iterator[Mapping[str, Any] | None]:
    """Inside, an adapter may be put on: gives what its start has seen, and quantises the targets where the start is LoftQ's. Undone on an error."""
    init = INITS.get(spec.init or "")
    seen = vars(model).get(FOUND, {})
    if spec.init in BY and spec.init not in seen:
        raise LorakitError(f"init_lora_weights {config.init_lora_weights!r} looks at data first; mend: {BY[spec.init]} before the adapter is put on")
    joint = init is not None and init.joint and bool(getattr(config, "loftq_config", None))
    there = packed(model)
    paths = [p for p, m in plan.items() if init.unfit(m) is None and p not in there] if joint else []
    if paths:
        quantize(model, LoftQConfig(**config.loftq_config).scheme(), target_modules=paths, keep=True)
    done = packed(model)
    try:
        yield seen.get(spec.init)
    except BaseException:
        for p in paths:
            unpack(done[p], done[p].original)
        note(model)
        raise
    for p in paths:
        done[p].original = None
    seen.pop(spec.init, None)


# EVA

@torch.no_grad()
def get_eva_state_dict(model: nn.Module, dataloader: Iterable, peft_config: LoraConfig | None = None, forward_fn: Callable | None = None,
                       prepare_model_inputs_fn: None = None, prepare_layer_inputs_fn: None = None, adapter_name: str = "default",
                       gather_distributed_inputs: bool = True, show_progress_bar: bool = True) -> dict[str, Tensor]:
    """Target -> its first principal directions (r', i), r' redistributed over the targets; r' = 0: the target is to be left alone.

    One pass over the dataloader, exact incremental PCA; PEFT cycles until directions turn by less than tau, with a randomised one. Tokens that are
    not attended to or have no label do not count. forward_fn: of model and batch. gather_distributed_inputs, show_progress_bar: accepted.
    """
    if prepare_model_inputs_fn is not None or prepare_layer_inputs_fn is not None:
        raise LorakitError("get_eva_state_dict: functions that choose inputs are not there here; mend: attention_mask or labels in the batches")
    base, wrapped = base_of(model), hasattr(model, "get_base_model")
    config, init = peft_config or getattr(model, "peft_config", {}).get(adapter_name), INITS["eva"]
    if config is None:
        raise LorakitError("get_eva_state_dict: peft_config is needed for a model without adapters")
    if wrapped:
        plan = {p: (s.methods[adapter_name], s.site) for p, s in host.slots(base, adapter_name).items()
                if adapter_name not in s.tied and init.unfit(s.methods[adapter_name]) is None}
    else:
        plan = _targets(base, config, init)
    plan = {p: (m, site) for p, (m, site) in plan.items() if not (site.lookup or site.read or site.whole)}
    call = forward_fn and (lambda **batch: forward_fn(model, batch))
    options = init.check((config.eva_config or EvaConfig()).options())
    found = init.collect(_Calls(model, call) if call else base, plan, dataloader, options)
    ranks = init.allot({p: m for p, (m, _) in plan.items()}, found, options)
    out = {}
    for p in plan:
        S, V, _ = found[p]
        r = ranks[p].core.r if ranks[p] is not None else 0
        out[f"{WRAPPED if wrapped else ''}{p}"] = V[:r] / S[:r, None] if options["whiten"] else V[:r]
    return out


def initialize_lora_eva_weights(model: nn.Module, dataloader: Iterable | None = None, eva_state_dict: Mapping[str, Tensor] | None = None,
                                forward_fn: Callable | None = None, prepare_model_inputs_fn: None = None, prepare_layer_inputs_fn: None = None,
                                adapter_name: str = "default", gather_distributed_inputs: bool = True, show_progress_bar: bool = True) -> None:
    """Puts the adapter on anew with EVA's ranks and directions, and notes the ranks in its configuration. Before an optimiser is made."""
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if config is None or not hasattr(model, "get_base_model"):
        raise LorakitError(f"initialize_lora_eva_weights: no PeftModel with an adapter `{adapter_name}`; mend: get_peft_model(model, config) first")
    if list(model.active_adapters) != [adapter_name] or config.init_lora_weights != "eva":
        raise LorakitError(f"initialize_lora_eva_weights: `{adapter_name}` must be the only active adapter and start with 'eva'; mend: init_lora_weights='eva'")
    if eva_state_dict is None and dataloader is None:
        raise LorakitError("initialize_lora_eva_weights: a dataloader is needed, or the eva_state_dict that get_eva_state_dict gave")
    found = eva_state_dict if eva_state_dict is not None else get_eva_state_dict(
        model, dataloader, config, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name)
    found = {k.removeprefix(WRAPPED): t for k, t in found.items()}
    base = base_of(model)
    slots = {p: s for p, s in host.slots(base, adapter_name).items() if adapter_name not in s.tied}
    spec, init = host.state_of(base).specs[adapter_name], INITS["eva"]
    plan, mine = {}, [p for p, s in slots.items() if init.unfit(s.methods[adapter_name]) is None]
    for path, slot in slots.items():
        method = slot.methods[adapter_name]
        if path in found and path in mine:
            (r, i), core = found[path].shape, method.core
            if i != slot.parameters(adapter_name)["A"].shape[1]:
                raise LorakitError(f"{path}: the eva_state_dict has directions of {i} numbers there, its input has {slot.site.in_}; mend: the same base")
            again = {"alpha": core.alpha * r / core.r} if config.eva_config.adjust_scaling_factors else {}
            method = None if not r else method if r == core.r else method.having(r=r, **again)
        if method is not None:
            plan[path] = method
    if left := [p for p in mine if p not in found]:
        warnings.warn(f"no directions for these targets, which keep their own start: {', '.join(left)}", stacklevel=2)
    trains = {p: {k: t.requires_grad for k, t in slots[p].parameters(adapter_name).items()} for p in plan}
    host.delete(base, adapter_name)
    attach(base, adapter_name, spec, plan)
    now = {p: s for p, s in host.slots(base, adapter_name).items() if p in plan}
    with torch.no_grad():
        for path, slot in now.items():
            for k, t in slot.parameters(adapter_name).items():
                t.requires_grad_(trains[path][k])
            if path in found and path in mine:
                slot.parameters(adapter_name)["A"].copy_(found[path])
    ranks = {p: plan[p].core for p in mine if p in plan}
    config.target_modules = sorted(ranks)
    config.rank_pattern = {p: m.r for p, m in ranks.items() if m.r != config.r}
    config.alpha_pattern = {p: m.alpha for p, m in ranks.items() if m.alpha != config.lora_alpha}
