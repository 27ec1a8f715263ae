"""The name people know -> a composition, one row each. `compose` turns a name and ecosystem options into a Spec."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorakit import methods  # noqa: F401
from lorakit.errors import LorakitError, near
from lorakit.inits import INITS
from lorakit.method import Method
from lorakit.methods.adalora import AdaLoRA
from lorakit.methods.adaption_prompt import AdaptionPrompt
from lorakit.methods.aflora import AFLoRA
from lorakit.methods.bat import Bat
from lorakit.methods.bitfit import BitFit
from lorakit.methods.boft import BOFT
from lorakit.methods.bottleneck import Bottleneck
from lorakit.methods.cpt import CPT
from lorakit.methods.diff_pruning import DiffPruning
from lorakit.methods.flora import FLoRA
from lorakit.methods.fourierft import FourierFT
from lorakit.methods.full import Full
from lorakit.methods.hra import HRA
from lorakit.methods.hydralora import HydraLoRA
from lorakit.methods.ia3 import IA3
from lorakit.methods.l_lora import LLoRA
from lorakit.methods.loha import LoHa
from lorakit.methods.lokr import LoKr
from lorakit.methods.lora import LoRA
from lorakit.methods.lora_prune import LoRAPrune
from lorakit.methods.lora_xs import LoRAXS
from lorakit.methods.loretta import LoRETTA
from lorakit.methods.loretta_adp import LoRETTAAdp
from lorakit.methods.lotr import LoTR
from lorakit.methods.low_rank_sparse import LowRankSparse
from lorakit.methods.magnitude import Magnitude
from lorakit.methods.melora import MELoRA
from lorakit.methods.miss import MiSS
from lorakit.methods.nola import NOLA
from lorakit.methods.oft import OFT
from lorakit.methods.poly import Poly
from lorakit.methods.prefix import Prefix
from lorakit.methods.prompt import Prompt
from lorakit.methods.ptuning import PTuning
from lorakit.methods.qa_lora import QALoRA
from lorakit.methods.sora import SoRA
from lorakit.methods.sparse_lora import SparseLoRA
from lorakit.methods.spectral import Spectral
from lorakit.methods.svdiff import SVDiff
from lorakit.methods.tied_lora import TiedLoRA
from lorakit.methods.trilora import TriLoRA
from lorakit.methods.vblora import VBLoRA
from lorakit.methods.vera import VeRA
from lorakit.spec import Spec


@dataclass(frozen=True)
class Recipe:
    method: Method
    title: str
    paper: str
    formula: str
    init: str | None = None
    freeze: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)  # other fields of the Spec, where the recipe has a say


# The second matrix of feed-forward parts, and the first of what (IA)³ scales, as models call them.
_MLP_OUT = r"down_proj|fc2|fc_out|lin2|wo|w2|dense_4h_to_h|mlp\.c_proj|(?<!attention\.)output\.dense"
_KEYS_AND_VALUES = r"k|v|key|value|[kv]_proj|[kv]_lin|qkv|qkv_proj|query_key_value|c_attn|Wqkv"

RECIPES: dict[str, Recipe] = {
    "lora": Recipe(LoRA(), "LoRA", "2106.09685", "W + (alpha/r) B A"),
    "rslora": Recipe(LoRA(scaling="rslora"), "rank-stabilised LoRA", "2312.03732", "W + (alpha/sqrt(r)) B A", aliases=("rank-stabilized-lora",)),
    "dora": Recipe(Magnitude(LoRA()), "DoRA", "2402.09353", "diag(m / |W + s B A|) (W + s B A)", aliases=("weight-decomposed-lora",)),
    "lora-fa": Recipe(LoRA(), "LoRA-FA", "2308.03303", "W + s B A, A frozen", freeze=("A",), aliases=("lorafa",)),
    "asymmetric-lora": Recipe(LoRA(), "Asymmetric LoRA", "2402.16842", "W + s B A, A frozen with A Aᵀ = I", "orthogonal", ("A",), ("lorasym",)),
    "lora-nonzero": Recipe(LoRA(), "LoRA from a non-zero start", "2505.23194", "W - s B0 A0 + s B A", "nonzero", aliases=("nzlora",)),
    "l-lora": Recipe(LLoRA(LoRA()), "L-LoRA", "2310.04742", "W + s [B A0 + B0 (A - A0)], A0 and B0 the start", aliases=("llora", "linearized-lora")),
    "pissa": Recipe(LoRA(), "PiSSA", "2404.02948", "W - s B0 A0 + s B A, s B0 A0 = U_r S_r V_rᵀ", "pissa"),
    "milora": Recipe(LoRA(), "MiLoRA", "2406.09044", "W - s B0 A0 + s B A, s B0 A0 = U_-r S_-r V_-rᵀ", "milora"),
    "olora": Recipe(LoRA(), "OLoRA", "2406.01775", "W - s B0 A0 + s B A, B0 A0 = Q_r R_r", "olora"),
    "corda": Recipe(LoRA(), "CorDA", "2406.05223", "W - s B0 A0 + s B A, s B0 A0 = U_r S_r V_rᵀ C⁻¹ of W C, C from data", "corda"),
    "eva": Recipe(LoRA(), "EVA", "2410.07170", "W + s B A, A0 the first directions of the inputs, ranks where they explain most", "eva"),
    "lora-ga": Recipe(LoRA(), "LoRA-GA", "2407.05000", "W - s B0 A0 + s B A, A0 and B0 singular vectors of the gradient", "lora-ga"),
    "vera": Recipe(VeRA(), "VeRA", "2310.11454", "W + diag(b) B diag(d) A, A and B frozen and shared"),
    "dvora": Recipe(Magnitude(VeRA()), "DVoRA", "2402.09353", "diag(m / |V|) V, V = W + diag(b) B diag(d) A"),
    "lotr": Recipe(LoTR(), "LoTR", "2402.01376", "W + (scale/r) B G A, A and B shared"),
    "loha": Recipe(LoHa(), "LoHa", "2108.06098", "W + (alpha/r) (w1_a w1_b) ∘ (w2_a w2_b)", aliases=("hada", "fedpara")),
    "lokr": Recipe(LoKr(), "LoKr", "2309.14859", "W + (alpha/r) W1 ⊗ W2", aliases=("krona",)),
    "fourierft": Recipe(FourierFT(), "FourierFT", "2405.03003", "W + alpha Re(ifft2(F)), F sparse", aliases=("fourier", "fourier-ft")),
    "miss": Recipe(MiSS(), "MiSS", "2409.15371", "W + Dᵀ S, S the sum over shards", aliases=("bone",)),
    "bat": Recipe(Bat(), "Bat", "2409.15371", "W + W D + D on blocks of r x r"),
    "loretta": Recipe(LoRETTA(), "LoRETTA_rep", "2402.11417", "W + (alpha/r) B A, both tensor trains", aliases=("loretta-rep",)),
    "nola": Recipe(NOLA(), "NOLA", "2310.02556", "W + (alpha/r) B A, both combinations of random bases"),
    "tied-lora": Recipe(TiedLoRA(), "Tied-LoRA", "2311.09578", "W + s diag(v) B diag(u) A, A and B shared", aliases=("tiedlora",)),
    "vb-lora": Recipe(VBLoRA(), "VB-LoRA", "2405.15179", "W + B A, pieces of A and B mixed from one bank", aliases=("vblora",)),
    "hydralora": Recipe(HydraLoRA(), "HydraLoRA", "2404.19245", "W x + s sum_k softmax(G x)_k B_k A x", aliases=("hydra-lora",)),
    "poly": Recipe(Poly(), "Poly", "2202.13914", "W + (A_t B_t)ᵀ / r, mixtures of skills for task t", aliases=("polytropon",)),
    "mhr": Recipe(Poly(n_splits=4), "Poly with multi-head routing", "2211.03831", "W + (A_t B_t)ᵀ / r, skills mixed in each split"),
    "houlsby": Recipe(Bottleneck(), "Houlsby adapters", "1902.00751", "y + U act(D y), behind attention and feed-forward parts",
                      options={"targets": "block-outputs"}),
    "pfeiffer": Recipe(Bottleneck(), "Pfeiffer adapters", "2005.00247", "y + U act(D y), behind feed-forward parts", options={"targets": "mlp-out"}),
    "ia3": Recipe(IA3(), "(IA)³", "2205.05638", "diag(l) W; W diag(l) where the MLP ends",
                  options={"targets": rf"(?:.*\.)?(?:{_KEYS_AND_VALUES}|{_MLP_OUT})", "patterns": {"side": {f"?{_MLP_OUT}": "in"}}}),
    "oft": Recipe(OFT(), "OFT", "2306.07280", "W Rᵀ, R block-diagonal and orthogonal", aliases=("oftv2", "oft-v2")),
    "coft": Recipe(OFT(eps=6e-5), "constrained OFT", "2306.07280", "W Rᵀ, R close to I"),
    "boft": Recipe(BOFT(), "BOFT", "2311.06243", "diag(m) W Rᵀ, R a product of butterfly factors"),
    "hra": Recipe(HRA(), "HRA", "2405.17484", "W (I - 2 u_1 u_1ᵀ) … (I - 2 u_r u_rᵀ)"),
    "svdiff": Recipe(SVDiff(), "SVDiff", "2303.11305", "U diag(relu(σ + scale δ)) Vᵀ"),
    "sam-parser": Recipe(SVDiff(relu=False), "SAM-PARSER", "2308.14604", "U diag(σ + δ) Vᵀ", aliases=("samparser",)),
    "spectral-adapter": Recipe(Spectral(), "Spectral Adapter", "2405.13952", "(U_r + X) S_r (V_r + Y)ᵀ + the rest of W", aliases=("spectral",)),
    "spectral-rotation": Recipe(Spectral(kind="rotation"), "Spectral Adapter, rotated", "2405.13952", "U_r R_u S_r (V_r R_v)ᵀ + the rest of W"),
    "ln-tuning": Recipe(Full(False), "LN-tuning", "2312.11420", "gains and biases of all norms", aliases=("layernorm-tuning", "norm-tuning"),
                        options={"targets": (), "parameters": ("norms",)}),
    "loretta-adp": Recipe(LoRETTAAdp(), "LoRETTA, serial", "2402.11417", "y + U act(D y), U and D tensor trains, behind attention and feed-forward parts",
                          options={"targets": "block-outputs"}),
    "trilora": Recipe(TriLoRA(), "TriLoRA", "2405.11236", "W + (alpha/r) B diag(e) A"),
    "asymmetric-lora-core": Recipe(TriLoRA(middle="matrix", begin="identity"), "Asymmetric LoRA with a middle matrix", "2402.16842",
                                   "W + s B E A, A frozen with A Aᵀ = I", "orthogonal", ("A",)),
    "adalora": Recipe(AdaLoRA(), "AdaLoRA", "2303.10512", "W + (alpha/(r + 1e-5)) P diag(λ) Q"),
    "sora": Recipe(SoRA(), "SoRA", "2311.11696", "W + (alpha/r) B diag(g) A"),
    "aflora": Recipe(AFLoRA(), "AFLoRA", "2403.13269", "W + diag(b) B diag(d) A"),
    "lora-xs": Recipe(LoRAXS(), "LoRA-XS", "2405.17604", "W + (alpha/r) B R A, A and B frozen singular vectors of W", aliases=("loraxs",)),
    "flora": Recipe(FLoRA(), "FLoRA", "2405.14739", "W + scale U Gᵀ Vᵀ, one factor more for each dimension of a kernel"),
    "melora": Recipe(MELoRA(), "MELoRA", "2402.17263", "W + (alpha/r) blockdiag(B_1 A_1, …, B_n A_n)"),
    "qa-lora": Recipe(QALoRA(), "QA-LoRA", "2309.14717", "W + (alpha/r) B A P, P the mean over groups of inputs", aliases=("qalora",)),
    "loftq": Recipe(LoRA(), "LoftQ", "2310.08659", "Q + s B A, made together: Q = q(W - L), L = SVD_r(W - Q)", "loftq"),
    "lq-lora": Recipe(LoRA(), "LQ-LoRA", "2311.12023", "Q + s B A, made together: L = SVD_r(W - Q), Q = q(W - L)", "lq-lora"),
    "lqer": Recipe(LoRA(), "LQER", "2402.02446", "q(W) + s B A, s B A = SVD_r(W - q(W))", "lqer"),
    "sparse-adapter": Recipe(SparseLoRA(keep=0.5), "SparseAdapter", "2210.04284", "W + s (B ∘ MB) (A ∘ MA), half of each factor left out"),
    "lora-prune": Recipe(LoRAPrune(), "LoRAPrune", "2305.18403", "diag(m) (W + s B A), m of zeros and ones", aliases=("loraprune",)),
    "large-sparse": Recipe(SparseLoRA(32, 64.0, 0.25), "SparseAdapter, Large-Sparse", "2210.04284", "W + s (B ∘ MB) (A ∘ MA), a quarter of 4 times the rank"),
    "roselora": Recipe(SparseLoRA(alpha=32.0), "RoseLoRA", "2406.10777", "W + s (B ∘ MB) (A ∘ MA), sparse rows of A and columns of B"),
    "structured-lora": Recipe(LowRankSparse(), "Structured LoRA", "", "W + s B A + S, S sparse", aliases=("low-rank-sparse",)),
    "diff-pruning": Recipe(DiffPruning(), "Diff pruning", "2012.07463", "W + g z ∘ w, z between 0 and 1", aliases=("diffpruning",)),
    "prompt-tuning": Recipe(Prompt(), "prompt tuning", "2104.08691", "model([P; E(x)])", options={"targets": "model"}),
    "p-tuning": Recipe(PTuning(), "P-tuning", "2103.10385", "model([f(E_p); E(x)]), f an MLP or an LSTM", options={"targets": "model"}),
    "prefix-tuning": Recipe(Prefix(), "prefix tuning", "2101.00190", "softmax(q [P_k; K]ᵀ) [P_v; V] in every layer", options={"targets": "model"}),
    "adaption-prompt": Recipe(AdaptionPrompt(), "adaption prompt, as PEFT has it", "2303.16199", "y + g softmax(q (P Wkᵀ)ᵀ) (P Wvᵀ) Woᵀ",
                              options={"targets": "attention-blocks"}),
    "llama-adapter": Recipe(AdaptionPrompt(gate="heads"), "LLaMA-Adapter", "2303.16199", "y + tanh(g_h) softmax(q (P Wkᵀ)ᵀ) (P Wvᵀ) Woᵀ",
                            options={"targets": "attention-blocks"}),
    "cpt": Recipe(CPT(), "context-aware prompt tuning", "2410.17222", "model([E(context) + D; E(x)]), every row of D short", options={"targets": "model"}),
    "full": Recipe(Full(), "full fine-tuning of the targets", "", "V", aliases=("full-fine-tuning",)),
    "bitfit": Recipe(BitFit(), "BitFit", "2106.10199", "W; b -> c"),
}

ALIASES = {  # how configurations in the wild spell our fields
    "lora_alpha": "alpha", "lora_dropout": "dropout", "lora_r": "r", "lora_rank": "r", "rank": "r", "target_modules": "targets",
    "lora_target_modules": "targets", "lora_target": "targets", "exclude_modules": "exclude", "layers_to_transform": "layers",
    "init_lora_weights": "init", "target_parameters": "parameters", "trainable_token_indices": "tokens", "ensure_weight_tying": "tie",
    "oft_block_size": "block_size", "boft_block_size": "block_size", "boft_block_num": "r", "boft_n_butterfly_factor": "factors", "apply_GS": "gram_schmidt",
    "prefix_projection": "projection", "encoder_hidden_size": "hidden", "encoder_num_layers": "lstm_layers", "cpt_token_ids": "token_ids",
    "cpt_tokens_type_mask": "types",
}
_SWITCHES = ("use_dora", "use_rslora")
_LISTS = {"feedforward_modules": ("side", "in")}  # options that list the modules on which a field has another value


def find(name: str) -> str:
    """The row that a name, in any common spelling, stands for. LorakitError with the nearest one otherwise."""
    word = name.lower().replace("_", "-").replace(" ", "-")
    names = {k: k for k in RECIPES} | {a: k for k, r in RECIPES.items() for a in r.aliases}
    if word not in names:
        raise LorakitError(f"unknown method `{name}`{near(word, names)} (see: lorakit methods)")
    return names[word]


def compose(recipe: str | Spec | Method = "lora", **options: Any) -> Spec:
    """A Spec from a recipe's name and options spelled as in PEFT or as here.

    >>> compose("dora", r=4, lora_alpha=8, target_modules=["q_proj"]).method.inner.r
    4
    """
    if isinstance(recipe, Spec):
        spec = recipe
    elif isinstance(recipe, Method):
        spec = Spec(recipe)
    else:
        name = find(recipe)
        row = RECIPES[name]
        spec = Spec(row.method, init=row.init, freeze=row.freeze, recipe=name, **row.options)
    options = {ALIASES.get(k, k): v for k, v in options.items() if v is not None}
    for k, (name, value) in _LISTS.items():
        if k in options:
            names = options.pop(k)
            at = dict.fromkeys([names] if isinstance(names, str) else names, value)
            options["patterns"] = {**spec.patterns, **options.get("patterns", {}), name: at}
    if "adapter_layers" in options:
        options["layers"] = f"last-{options.pop('adapter_layers')}"
    if options.get("parameters"):
        options.setdefault("targets", ())  # what was named is what is meant
    method = spec.method
    if options.pop("use_rslora", False):
        method = method.having(scaling="rslora")
    if options.pop("use_dora", False) and not isinstance(method, Magnitude):
        method = Magnitude(method)
    mine = {f.name for f in dataclasses.fields(Spec)} - {"method", "recipe"}
    fields = {k: v for k, v in options.items() if k not in mine}
    for k in fields:
        _known(method, k, mine)
    own = {k: _plain(k, v) for k, v in options.items() if k in mine}
    return dataclasses.replace(spec, method=method.having(**_typed(fields)) if fields else method, **_init(own))


def _known(method: Method, name: str, others: set[str]) -> None:
    fields: set[str] = set()
    m: Method | None = method
    while m is not None:
        fields |= {f.name for f in dataclasses.fields(m)} - {"inner"}
        m = getattr(m, "inner", None)
    if name not in fields:
        raise LorakitError(f"{method.core.name} has no option `{name}`{near(name, [*fields, *others, *ALIASES, *_SWITCHES])}")


def _plain(name: str, value: Any) -> Any:
    if name == "prompt" and isinstance(value, (str, Mapping)):
        told = {"method": value} if isinstance(value, str) else dict(value)
        return compose(told.pop("method"), **told).method
    if name in ("freeze", "modules_to_save", "parameters") and isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _typed(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {k: float(v) if k == "alpha" and isinstance(v, int) else v for k, v in fields.items()}


def _init(own: dict[str, Any]) -> dict[str, Any]:
    """`init` may be a name, true (the method's own start), or {name: …, storage: …} with the start's own options."""
    init = own.get("init")
    if isinstance(init, Mapping):
        own |= {k: v for k, v in init.items() if k == "storage"} | {"init": init.get("name")}
        own["init_options"] = {k: v for k, v in init.items() if k not in ("name", "storage")}
        if own["init"] is None and own["init_options"]:
            raise LorakitError("init: its options need its `name`")
    elif init is True:
        own["init"] = None
    if isinstance(own.get("init"), str):
        names = {k: k for k in INITS} | {a: k for k, i in INITS.items() for a in i.aliases}
        word = own["init"].lower().replace("_", "-")
        if fast := re.fullmatch(r"pissa-niter-(\d+)", word):
            word, own["init_options"] = "pissa", {"niter": int(fast[1])}
        if word not in names:
            raise LorakitError(f"init: unknown start `{own['init']}`{near(word, names)}")
        own["init"] = names[word]
    return own
