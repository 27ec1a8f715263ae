"""The configuration of a run: YAML with the names people know, checked, with unknown keys refused by their nearest neighbour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lorakit.errors import LorakitError, near
from lorakit.recipes import compose
from lorakit.spec import Spec
from lorakit.stores.scheme import scheme_of


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class Base(Part):
    """Which model is adapted."""

    path: str = Field("embedded", description="folder or hub name; `embedded` is the small model that ships with lorakit")
    revision: str | None = Field(None, description="commit or branch on the hub")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("float32", description="how the base is kept in memory; `auto`: as on disk")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
    quantize: str | dict[str, Any] | None = Field(None, description="how the linear layers are kept: nf4, nf3, nf2, int8, int7, … int2, or "
                                                  "{name: nf4, block: 64, double_quant: true}; nf4 with an adapter is QLoRA")



class Data(Part):
    """What it learns from."""

    train: str = Field(..., description="file, folder or hub name: JSONL, JSON, CSV, Parquet, text")
    eval: str | None = Field(None, description="held-out data; without it a part of `train` is held out")
    eval_fraction: float = Field(0.1, ge=0, lt=1, description="share of `train` held out when there is no `eval`; 0: none")
    split_seed: int | None = Field(None, ge=0, description="which rows `eval_fraction` holds out; default: train's seed")
    split: str | None = Field(None, description="split of the training source")
    eval_split: str | None = Field(None, description="split of the evaluation source")
    shape: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "preference", "classification"] = Field(
        "auto", description="kind of rows; found by itself")
    columns: dict[str, str] = Field({}, description="our name -> the column's name, where the data uses other names")
    template: str | None = Field(None, description="layout of prompt and completion, e.g. \"Q: {prompt}\\nA: {completion}\"")
    max_length: int | None = Field(None, ge=2, description="longest row in tokens; default: the model's context, at most 1024")
    answer_only: bool = Field(True, description="loss on answers only")
    packing: bool = Field(False, description="several short rows in one, kept apart by their positions")
    limit: int | None = Field(None, ge=1, description="use only the first rows")
    eval_limit: int | None = Field(None, ge=1, description="use only the first held-out rows")


class Train(Part):
    """How it learns."""

    epochs: float = Field(3.0, gt=0, description="passes over the data")
    max_steps: int = Field(-1, description="optimiser steps; overrides epochs when positive")
    learning_rate: float = Field(2e-4, gt=0, description="peak learning rate")
    batch_size: int = Field(8, ge=1, description="rows per micro-batch")
    eval_batch_size: int = Field(16, ge=1, description="rows per evaluation batch")
    gradient_accumulation_steps: int = Field(1, ge=1, description="micro-batches per step")
    lr_scheduler_type: str = Field("linear", description="transformers' scheduler name")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="share of the steps in which the rate rises")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay on matrices")
    max_grad_norm: float = Field(1.0, ge=0, description="gradient clipping; 0: none")
    optim: str = Field("adamw_torch", description="transformers' optimiser name")
    seed: int = Field(0, ge=0, description="of data order, dropout and adapter start")
    logging_steps: int = Field(10, ge=1, description="steps between points of the loss curve")
    eval_steps: int | None = Field(None, ge=1, description="steps between evaluations; default: four in a run")
    save_steps: int | None = Field(None, ge=1, description="steps between checkpoints; default: two in a run")
    save_total_limit: int = Field(2, ge=1, description="checkpoints kept")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, more time")
    bf16: bool = Field(False, description="bfloat16 autocast")
    report_to: list[str] | str = Field("none", description="passed to transformers: tensorboard, wandb, …")
    dpo_beta: float = Field(0.1, gt=0, description="preference pairs: how closely DPO keeps to the model it starts from")
    threads: int | None = Field(None, ge=1, description="CPU threads")


class Eval(Part):
    """What is measured before and after."""

    metrics: list[Literal["exact_match"]] = Field(
        [], description="beside what is always measured: loss, and perplexity or accuracy by the kind of data")
    samples: int = Field(3, ge=0, description="prompts shown before and after")
    prompts: list[str] = Field([], description="prompts to show; default: from the held-out data")
    max_new_tokens: int = Field(48, ge=1, description="length of generated text")
    temperature: float = Field(0.0, ge=0, description="0: greedy")


class FromAdapter(Part):
    """Start from a saved adapter."""

    path: str = Field(..., description="its folder")
    stage: Literal["continue", "freeze", "merge"] = Field(
        "continue", description="continue: train it on; freeze: train a new one around it; merge: train a new one on the merged base")


class Run(Part):
    """One training run, from data to a verified adapter."""

    base: Base = Field(default_factory=Base)
    task: Literal["auto", "causal-lm", "sequence-classification"] = Field("auto", description="found by the kind of data")
    adapter: dict[str, Any] = Field({"method": "lora"}, description="method and its options, as for lorakit.adapt")
    hooks: list[str | dict[str, Any]] = Field([], description="what happens while training, e.g. [{lora_plus: {ratio: 16}}]")
    data: Data
    train: Train = Field(default_factory=Train)
    eval: Eval = Field(default_factory=Eval)
    from_adapter: FromAdapter | None = Field(None, description="start from a saved adapter")
    output: str = Field("runs/run", description="run folder")

    @field_validator("adapter", "hooks", mode="before")
    @classmethod
    def _numbers(cls, v: Any) -> Any:
        return _tree(v)

    def spec(self) -> Spec:
        options = dict(self.adapter)
        return compose(options.pop("method", "lora"), **{"seed": self.train.seed, **options})


FLAT = {  # keys of other tools, and where they go here
    "model_name_or_path": "base.path", "base_model": "base.path", "model": "base.path", "torch_dtype": "base.dtype", "output_dir": "output",
    "dataset": "data.train", "datasets": "data.train", "train_file": "data.train", "validation_file": "data.eval", "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length", "max_seq_length": "data.max_length", "max_length": "data.max_length", "packing": "data.packing",
    "sample_packing": "data.packing", "method": "adapter.method", "finetuning_type": "adapter.method", "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs", "per_device_train_batch_size": "train.batch_size", "micro_batch_size": "train.batch_size",
    "per_device_eval_batch_size": "train.eval_batch_size", "lr": "train.learning_rate", "lr_scheduler": "train.lr_scheduler_type",
    "optimizer": "train.optim",
} | {k: f"adapter.{k}" for k in ("r", "lora_r", "lora_rank", "lora_alpha", "lora_dropout", "target_modules", "lora_target_modules", "lora_target",
                                 "use_dora", "use_rslora", "exclude_modules", "layers_to_transform", "rank_pattern", "alpha_pattern",
                                 "modules_to_save", "init_lora_weights")} | {
    k: f"train.{k}" for k in Train.model_fields}
SHORT = {"base": "path", "data": "train", "adapter": "method", "from_adapter": "path"}  # a bare word means this field


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for p in parents:
        tree = tree.setdefault(p, {})
        if not isinstance(tree, dict):
            raise LorakitError(f"{key}: `{p}` is a single value, not a group of settings")
    tree[last] = value


def _grouped(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Bare words and other tools' flat keys to our groups."""
    out: dict[str, Any] = {}
    for k, v in raw.items():
        if k in Run.model_fields:
            v = {SHORT[k]: v} if k in SHORT and isinstance(v, str) else v
            out[k] = {**out.get(k, {}), **v} if isinstance(v, Mapping) else v
    for k, v in raw.items():
        if k not in Run.model_fields:
            if k not in FLAT:
                raise LorakitError(f"configuration: unknown key `{k}`{near(k, [*Run.model_fields, *FLAT])}")
            _put(out, FLAT[k], v)
    return out


def _explain(e: ValidationError, where: str) -> str:
    lines = []
    for err in e.errors():
        place = ".".join(map(str, err["loc"]))
        if err["type"] == "extra_forbidden":
            *parents, last = err["loc"]
            model: Any = Run
            for p in parents:
                model = next((a for a in getattr(model.model_fields.get(str(p)), "annotation", None).__args__ if hasattr(a, "model_fields")), None) if hasattr(
                    model.model_fields[str(p)].annotation, "__args__") else model.model_fields[str(p)].annotation
            lines.append(f"unknown key `{place}`{near(str(last), model.model_fields)}")
        else:
            lines.append(f"`{place}`: {err['msg'][0].lower()}{err['msg'][1:]}" + ("" if err["type"] == "missing" else f", not {err['input']!r}"))
    return f"{where}: " + "; ".join(lines)


def parse(raw: Mapping[str, Any], where: str = "configuration") -> Run:
    """A checked configuration from plain data. LorakitError naming every wrong key or value."""
    try:
        run = Run.model_validate(_grouped(raw))
    except ValidationError as e:
        raise LorakitError(_explain(e, where)) from None
    run.spec()  # the adapter's options are checked where they are defined
    if run.base.quantize is not None:
        scheme_of(run.base.quantize)
    return run


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file. LorakitError when it is not there, not YAML, or holds something else."""
    file = Path(path)
    if not file.is_file():
        beside = [p.name for p in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        raise LorakitError(f"there is no configuration file {file}{near(file.name, beside, listing=False) if beside else ''}")
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as e:
        raise LorakitError(f"{file} is not valid YAML: {' '.join(str(e).split())}") from None
    if not isinstance(raw, dict):
        raise LorakitError(f"{file} should hold `key: value` lines, not {type(raw).__name__}")
    return raw


def read(path: str | Path | None, sets: Sequence[str] = ()) -> Run:
    """A configuration from a YAML file and `key=value` words (values are YAML: 1e-4, true, [q_proj, v_proj])."""
    raw = _grouped({} if path is None else read_yaml(path))
    for word in sets:
        key, eq, value = word.partition("=")
        if not eq:
            raise LorakitError(f"--set takes key=value, not {word!r}")
        _set(raw, key.strip(), number(yaml.safe_load(value)))
    return parse(raw, str(path or "configuration"))


def _set(raw: dict[str, Any], key: str, value: Any) -> None:
    if "." in key or key in Run.model_fields:
        if key in SHORT and not isinstance(value, dict):
            key = f"{key}.{SHORT[key]}"
        if key.partition(".")[0] not in Run.model_fields:
            raise LorakitError(f"--set: unknown key `{key}`{near(key.partition('.')[0], Run.model_fields)}")
        _put(raw, key, value)
    elif key in FLAT:
        _put(raw, FLAT[key], value)
    else:
        raise LorakitError(f"--set: unknown key `{key}`{near(key, [*Run.model_fields, *FLAT])}")


def number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as a word; people mean the number."""
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() and value[0] in "0123456789.+-" else value
        except ValueError:
            return value
    return value


def _tree(value: Any) -> Any:
    """The same where no field's type says what a value is to be."""
    if isinstance(value, dict):
        return {k: _tree(v) for k, v in value.items()}
    return [_tree(v) for v in value] if isinstance(value, list) else number(value)


def example() -> str:
    """A commented YAML with every key at its default."""
    lines = ["# every key of `lorakit train`, at its default; what is commented out is empty by default", ""]
    for name, field in Run.model_fields.items():
        part = field.annotation
        if isinstance(part, type) and issubclass(part, Part):
            lines += [f"# {part.__doc__.strip()}", f"{name}:"]
            for k, f in part.model_fields.items():
                value = "data.jsonl" if f.is_required() else f.default
                dead = "# " if value in (None, [], {}) else ""
                lines.append(f"  {dead}{k}: {_yaml(value)}".ljust(44) + f" # {f.description}")
        elif name == "adapter":
            lines += ["# What is put on it: a method (`lorakit methods`) and its options, as for lorakit.adapt", "adapter:", "  method: lora", "  r: 8",
                      "  lora_alpha: 16", "  lora_dropout: 0.0", "  target_modules: all-linear"]
        else:
            value = None if field.is_required() else field.get_default(call_default_factory=True)
            lines.append(f"{'# ' if value in (None, [], {}) else ''}{name}: {_yaml(value)}".ljust(44) + f" # {field.description}")
    return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).strip().removesuffix("...").strip()
