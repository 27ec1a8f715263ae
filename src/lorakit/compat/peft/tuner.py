"""LoraModel: the adapters of one base, as PEFT has them between its model and the base; and the status of the layers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lorakit
from lorakit import host
from lorakit.api import untie
from lorakit.compat.peft import weights as files
from lorakit.compat.peft.config import LoraConfig, PeftConfig, plan_of
from lorakit.compat.peft.starts import begun
from lorakit.errors import LorakitError
from lorakit.spec import attach


def require_grad(model: nn.Module, on: Mapping[str, bool]) -> None:
    """Adapter -> whether what trains of it trains now. One walk, however many adapters."""
    specs = host.known(model, on).specs
    for slot in host.slots(model).values():
        for name in on.keys() & slot.methods.keys():
            leaves = slot.methods[name].leaves
            for leaf, t in slot.parameters(name).items():
                t.requires_grad_(on[name] and leaves[leaf].trains and leaf not in specs[name].freeze)


def inject(model: nn.Module, name: str, config: PeftConfig, state_dict: Mapping[str, Any] | None = None) -> None:
    """Puts a new adapter on the base and makes it active; the keys of `state_dict`, if given, name its targets."""
    paths = list(dict.fromkeys(k.partition(".lora_")[0].removeprefix("base_model.model.") for k in state_dict or () if ".lora_" in k))
    spec, plan = plan_of(config, model, paths)
    with begun(model, config, spec, plan) as found:
        attach(model, name, spec, plan, found=found)
    require_grad(model, {name: not config.inference_mode})


class LoraModel(nn.Module):
    """The adapters of one base: `model` is the base, `peft_config` says how each adapter was made."""

    prefix = "lora_"  # by which trainers tell an adapter's parameter from the base's

    def __init__(self, model: nn.Module, config: PeftConfig | Mapping[str, PeftConfig], adapter_name: str = "default", low_cpu_mem_usage: bool = False,
                 state_dict: Mapping[str, Any] | None = None, source: Path | None = None, check_base: bool = True, own_config: bool = False):
        super().__init__()
        if isinstance(getattr(model, "base_model", model), LoraModel):
            raise LorakitError("the model is a PeftModel already; mend: its add_adapter(name, config) or load_adapter(path, name) for another adapter, "
                               "or its unload() to get the base back")
        if (state := host.find_state(model)) is not None:
            raise LorakitError(f"the model carries adapters already ({', '.join(state.specs)}); mend: add_adapter on the PeftModel around it, or "
                               "lorakit.detach(model) first")
        config = config if isinstance(config, PeftConfig) or not isinstance(config, Mapping) else config[adapter_name]
        self.model, self.peft_config, self.lora_dropout = model, {}, nn.Module()
        self._hook: Any = None  # what moves the budget of ranks in training
        self._aside: dict[str, float] | None = None  # what is active, while adapters are disabled
        self._before: dict[str, float] | None = None  # what was active when others were merged
        self.put(adapter_name, config, state_dict=state_dict, source=source, check_base=check_base, own_config=own_config)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.model(*args, **kwargs)
        if torch.is_grad_enabled() and self._aside is None and getattr(out, "loss", None) is not None and (hook := self._allocator()) is not None:
            out.loss = out.loss + hook.extra_loss(self.model, out)
        return out

    def _allocator(self) -> Any:
        config = next((c for n, c in self.peft_config.items() if not c.inference_mode and n in self._active() and c.allocator() is not None), None)
        if config is not None and self._hook is None:
            self._hook = config.allocator()
            self._hook.setup(self.model)
            self._hook.start(self.model, None, None)
        return None if config is None else self._hook

    def update_and_allocate(self, global_step: int) -> None:
        """AdaLoRA's budget after step number `global_step`, the first being 1: to be called after the optimizer's step, before the gradients go."""
        hook = self._allocator()
        if hook is None:
            raise LorakitError("update_and_allocate: no active adapter has a budget of ranks; mend: AdaLoraConfig")
        hook.after_step(self.model, None, global_step - 1)

    def put(self, name: str, config: PeftConfig, *, state_dict: Mapping[str, Any] | None = None, source: Path | None = None, check_base: bool = True,
            own_config: bool = False) -> None:
        """Puts one adapter on the base and makes it active: a new one, or the one saved at `source`."""
        if name in self.peft_config:
            raise LorakitError(f"the model already has an adapter `{name}`; mend: another name, or delete_adapter({name!r}) first")
        if source is not None:
            files.load_folder(self.model, name, source, config if own_config else None, check_base)
            require_grad(self.model, {name: not config.inference_mode})
        else:
            inject(self.model, name, config, state_dict)
        self.peft_config[name] = config
        if p := max((s.dropout[name] for s in host.slots(self.model, name).values()), default=0.0):
            drop = self.lora_dropout._modules[name] = nn.Dropout(p)  # seen by those who set every dropout of a model to zero
            drop.was = p

    def sync(self) -> None:
        """Carries a change of `lora_dropout` over to the layers."""
        for name, drop in self.lora_dropout._modules.items():
            for slot in host.slots(self.model, name).values() if drop.p != drop.was else ():
                slot.dropout[name] = float(drop.p) if name not in slot.tied else 0.0
            drop.was = drop.p

    # Which adapter

    def _active(self) -> dict[str, float]:
        state = host.find_state(self.model)
        if state is None:
            return {}
        if self._aside is not None:
            return dict(self._aside)
        return dict((self._before or state.merged) if state.merged is not None else state.active)

    @property
    def active_adapters(self) -> list[str]:
        return list(self._active())

    @property
    def active_adapter(self) -> str | list[str]:
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def targeted_module_names(self) -> list[str]:
        return list(host.slots(self.model))

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Exactly these adapters are in effect, and train (unless inference_mode); the others do not."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        state = host.known(self.model, names)
        if state.merged is not None:
            warnings.warn("adapters are merged; they are unmerged before others are set", stacklevel=2)
            self.unmerge_adapter()
        if self._aside is None:
            lorakit.activate(self.model, *names)
        else:
            self._aside = dict.fromkeys(names, 1.0)
        require_grad(self.model, {n: n in names and not inference_mode for n in state.specs})

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        require_grad(self.model, dict.fromkeys(names, requires_grad))

    def disable_adapter_layers(self) -> None:
        """The base alone, until `enable_adapter_layers`. Merged adapters are unmerged."""
        state = host.find_state(self.model)
        if state is None or self._aside is not None:
            return
        if state.merged is not None:
            self.unmerge_adapter()
        self._aside, state.active = state.active, {}

    def enable_adapter_layers(self) -> None:
        state = host.find_state(self.model)
        if state is not None and self._aside is not None:
            state.active, self._aside = self._aside, None

    def add_adapter(self, adapter_name: str, config: LoraConfig) -> None:
        """Another adapter, beside those in effect: neither active nor training yet."""
        state = host.find_state(self.model)
        active = state.active if state else {}
        self.put(adapter_name, config)
        host.state_of(self.model).active = active
        require_grad(self.model, {adapter_name: False})

    def delete_adapter(self, adapter_name: str) -> None:
        active = self._active()
        lorakit.delete(self.model, adapter_name)
        del self.peft_config[adapter_name]
        self.lora_dropout._modules.pop(adapter_name, None)
        if not self.peft_config:
            self._aside = None
        elif adapter_name in active:
            left = [n for n in active if n != adapter_name] or sorted(self.peft_config)[:1]
            if list(active) == [adapter_name]:
                warnings.warn(f"the active adapter `{adapter_name}` is deleted; `{left[0]}` is active now", stacklevel=2)
            self.set_adapter(left)

    # Merging

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Writes adapters (the active ones) into the base weights until `unmerge_adapter`. Always checked for NaN and infinity."""
        state = host.known(self.model, adapter_names or ())
        had = state.merged or {}
        new = dict.fromkeys(adapter_names, 1.0) if adapter_names is not None else self._active()
        if had and not set(new) - set(had):
            warnings.warn("these adapters are merged already", stacklevel=2)
            return
        if had:
            self.unmerge_adapter()
        self.enable_adapter_layers()
        before, state.active = state.active, had | new
        try:
            lorakit.merge(self.model)
        except BaseException:
            state.active = before
            raise
        self._before = before

    def unmerge_adapter(self) -> None:
        """Puts the untouched base weights back."""
        state = host.state_of(self.model)
        if state.merged is None:
            warnings.warn("nothing is merged", stacklevel=2)
            return
        lorakit.unmerge(self.model)
        state.active, self._before = self._before if self._before is not None else state.active, None

    def merge_and_unload(self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> nn.Module:
        """The base with the adapters written into its weights, without adapters."""
        state = host.state_of(self.model)
        if state.merged is None or adapter_names is not None:
            self.merge_adapter(adapter_names)
        host.unload(self.model)
        if untie(self.model):
            warnings.warn("the input and output embeddings are not tied any more; tie_word_embeddings is False now in the configuration", stacklevel=2)
        return self._gone()

    def unload(self) -> nn.Module:
        """The very base from before the first adapter."""
        if host.find_state(self.model) is not None:
            lorakit.detach(self.model)
        return self._gone()

    def _gone(self) -> nn.Module:
        self.peft_config.clear()
        self.lora_dropout._modules.clear()
        self._aside = self._before = None
        return self.model

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str = "svd",
                             svd_rank: int | None = None, svd_clamp: float | None = None, svd_full_matrices: bool = True, svd_driver: str | None = None,
                             density: float | None = None, majority_sign_method: str = "total") -> None:
        """A new adapter made of others, by what PEFT computes (`lorakit.merges.peft`). It is neither active nor trains."""
        if adapter_name in self.peft_config:
            warnings.warn(f"there is an adapter `{adapter_name}` already; nothing is done", stacklevel=2)
            return
        self.peft_config[adapter_name] = files.add_weighted(
            self.model, self.peft_config, adapters, weights, adapter_name, combination_type, svd_rank, svd_clamp=svd_clamp,
            svd_full_matrices=svd_full_matrices, svd_driver=svd_driver, density=density, majority_sign_method=majority_sign_method)


# Status

@dataclass
class TunerLayerStatus:
    """One adapted layer, as PEFT reports it."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass
class TunerModelStatus:
    """The whole model, as PEFT reports it."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


def _all(flags: Sequence[bool | str]) -> bool | str:
    return flags[0] if flags and all(f == flags[0] for f in flags) else "irregular"


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """A line for each adapted layer."""
    base = files.base_of(model)
    state, tuner = host.state_of(base), getattr(model, "base_model", None) if base is not model else None
    active = tuner._active() if tuner is not None else state.active
    out = []
    for path, slot in host.slots(base).items():
        p = {a: list(slot.parameters(a).values()) for a in slot.methods}
        out.append(TunerLayerStatus(
            f"model.{path}" if tuner is not None else path, getattr(type(slot.site.module), "own_class", type(slot.site.module)).__name__,
            tuner is None or tuner._aside is None, list(active), list(state.merged or ()), {a: _all([t.requires_grad for t in ts]) for a, ts in p.items()},
            sorted(slot.methods), {a: sorted({t.device.type for t in ts}) for a, ts in p.items()}))
    return out


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """What holds of all adapted layers; "irregular" where they differ."""
    layers, base = get_layer_status(model), files.base_of(model)
    names, wrapped, train = sorted(host.state_of(base).specs), base is not model, lorakit.trainable(model)
    by = {a: [s for s in layers if a in s.available_adapters] for a in names}
    kinds = {n: str(getattr(c.peft_type, "value", c.peft_type)) for n, c in model.peft_config.items()} if wrapped else {}
    return TunerModelStatus(
        type(base).__name__, "LoraModel" if wrapped else "None", kinds, *train, len(layers), layers[0].enabled, layers[0].active_adapters,
        layers[0].merged_adapters, {a: _all([s.requires_grad[a] for s in ls]) for a, ls in by.items()}, names,
        {a: sorted({d for s in ls for d in s.devices[a]}) for a, ls in by.items()})
