"""Whole modules that a method goes around: a model's call, or an attention's. Their weights stay; what goes in or comes out changes.

A model is described by the table of its input embeddings, canonical (o, i) = (width, vocabulary), which is what a learnt token may start
from; an attention by its projections.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.sites.layers import Site
from lorakit.stores import store_for

BY_MASK = ("OPTDecoder", "BloomModel")  # classes that count the tokens of the attention mask where they are told no positions
BY_DISTANCE = ("T5Attention", "MT5Attention", "UMT5Attention")  # classes that see how far apart tokens are, and nothing else
OWN_PLACES = ("create_position_ids_from_inputs_embeds", "get_rope_index")  # of models whose positions are more than a count from zero
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Call:
    """One call of a module: its arguments by name, whether no earlier call left anything in a cache, and whether it is `generate` that is called."""

    given: dict[str, Any]
    first: bool = True
    generates: bool = False

    def having(self, **given: Any) -> Call:
        return dataclasses.replace(self, given=self.given | given)


class WholeSite(Site):
    """A module around whose call a method goes. No matrix acts here."""

    drops, bias_name = False, None

    @property
    def called(self) -> str:
        """The name of the module's own class."""
        return getattr(type(self.module), "own_class", type(self.module)).__name__

    def _names(self) -> None:
        cls = getattr(type(self.module), "own_class", type(self.module))
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        self.names = [n for n, p in inspect.signature(cls.forward).parameters.items() if p.kind in kinds][1:]

    def bind(self, args: tuple, kwargs: dict[str, Any]) -> Call:
        """The arguments by name."""
        return Call(dict(zip(self.names, args, strict=False)) | kwargs)

    def op(self, x, M, bias=None):
        raise LorakitError(f"a method goes around {self.called}; no matrix acts on its input")

    down = op


class ModelSite(WholeSite):
    """A model with input embeddings."""

    whole, transposed, lookup = "model", True, True

    def __init__(self, module: nn.Module):
        self.module, self.store = module, store_for(module.get_input_embeddings())
        self._names()
        self._measure()

    def view(self, W):  # what a look-up gives, where the layer scales it
        scale = getattr(self.module.get_input_embeddings(), "embed_scale", None)
        return W.mT if scale is None else W.mT * torch.as_tensor(scale).to(W)

    def embed(self, ids: Tensor) -> Tensor:
        return self.module.get_input_embeddings()(ids)

    def bind(self, args, kwargs):
        call = super().bind(args, kwargs)
        cache = call.given.get("past_key_values")
        return dataclasses.replace(call, first=cache is None or not cache.get_seq_length())

    def bind_generate(self, args: tuple, kwargs: dict[str, Any]) -> Call:
        """The arguments of `generate` by the names that the model's own call has for them, its mask made where padding tells it."""
        given = dict(zip(("input_ids",), args, strict=False)) | kwargs
        given |= {"input_ids": given.pop("inputs")} if given.get("inputs") is not None else {}
        ids, pad = given.get("input_ids"), getattr(self.module.generation_config, "pad_token_id", None)
        if ids is not None and given.get("attention_mask") is None:
            given["attention_mask"] = torch.ones_like(ids) if pad is None else (ids != pad).long()
        return Call(given, generates=True)

    @property
    def pairs(self) -> bool:
        """Whether it is an encoder and a decoder."""
        return bool(getattr(getattr(self.module, "config", None), "is_encoder_decoder", False))

    @property
    def pools_last(self) -> bool:
        """Whether it classifies by the last token that is not padding."""
        return self.called.endswith("ForSequenceClassification") and hasattr(self.module, "score") and not self.pairs

    @cached_property
    def onward(self) -> bool:
        """Whether its input is read from left to right, so that what is new comes last."""
        makes = getattr(self.module, "can_generate", lambda: False)
        return not self.pairs and (self.pools_last or makes() or any(getattr(m, "is_causal", False) for m in self.module.modules()))

    @cached_property
    def positions(self) -> str:
        """How it, or its decoder, knows where a token stands: "told" by position_ids, by the "mask", by the "distance" to others, or by "itself"."""
        modules = list(self.module.modules())
        names = {c.__name__ for m in modules for c in type(m).__mro__}
        if not names.isdisjoint(BY_MASK):
            return "mask"
        if self.pairs:
            return "itself" if names.isdisjoint(BY_DISTANCE) else "distance"
        return "told" if "position_ids" in self.names and not any(hasattr(m, n) for m in modules for n in OWN_PLACES) else "itself"

    @property
    def text(self) -> Any:
        config = getattr(self.module, "config", None)
        return getattr(config, "get_text_config", lambda: config)()

    def _first(self, *names: str) -> int | None:
        return next((v for n in names if isinstance(v := getattr(self.text, n, None), int)), None)

    @property
    def cached(self) -> nn.Module | None:
        """What takes a cache: the model itself, or its body, as in BERT with a classifier."""
        body = getattr(self.module, "base_model", None)
        takes = isinstance(body, nn.Module) and "past_key_values" in inspect.signature(body.forward).parameters
        return self.module if "past_key_values" in self.names else body if takes else None

    @property
    def layers(self) -> int:
        return self._first("num_hidden_layers", "num_layers", "n_layer") or 0

    @property
    def heads(self) -> int:
        return self._first("num_key_value_heads", "num_attention_heads", "n_head", "num_heads") or 0

    @property
    def head_dim(self) -> int:
        return self._first("head_dim", "d_kv") or self.out // max(1, self._first("num_attention_heads", "n_head", "num_heads") or 1)

    def peft(self) -> dict[str, Any]:
        """What PEFT's configurations say of the model."""
        return {"token_dim": self.out, "num_layers": self.layers, "num_attention_heads": self._first("num_attention_heads", "n_head", "num_heads"),
                "num_transformer_submodules": 2 if self.pairs else 1}


class AttentionSite(WholeSite):
    """Attention with four projections and rotary positions, as Llama has it. Canonical (o, i) is that of its keys' projection."""

    whole = "attention"

    def __init__(self, module: nn.Module):
        self.module, self.store = module, store_for(module.k_proj)
        self._names()
        self._measure()

    def common(self, config):
        return self.module.config.model_type in ("llama", "mistral")

    @property
    def heads(self) -> int:
        return self.module.config.num_attention_heads

    def peft(self) -> dict[str, Any]:
        return {}


def whole_site(module: nn.Module) -> type[WholeSite] | None:
    """The site of a module that methods go around; None for any other."""
    cls = type(module).__name__
    if "Attention" in cls and all(isinstance(module._modules.get(n), nn.Module) for n in PROJECTIONS) and hasattr(module, "config"):
        return AttentionSite
    try:
        return ModelSite if isinstance(module.get_input_embeddings(), nn.Module) else None
    except (AttributeError, NotImplementedError, TypeError):
        return None
