"""Makes `pylm`, the small language model that ships with lorakit, from text that every Python installation carries.

    python pretrain.py --steps 6000 --out .      # goes on from .pretrain-state if it was interrupted

Recipe (`corpus()`): the standard library's own sources without tests, generated tables and `pydoc_data` (that is kept
unseen: `make demo` adapts the model to it), plus the documentation of every importable module as plain text, twice.
One module in twenty-five, chosen by a hash of its name, is held out and gives `val_loss` in `training_log.csv`.

Architecture: Llama (transformers' `LlamaForCausalLM`), byte-level BPE tokenizer trained on the same text.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib
import inspect
import io
import math
import pkgutil
import re
import sys
import sysconfig
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SKIP = re.compile(
    r"(^|/)(tests?|idle_test|site-packages|dist-packages|pydoc_data|lib2to3/tests|__pycache__|ensurepip|"
    r"config-[^/]*)(/|$)|encodings/(cp|mac_|iso|koi|tis|palmos|hp_|kz|ptcp)|_sysconfigdata|turtledemo|__phello__"
)
NO_IMPORT = {"antigravity", "this", "idlelib", "turtle", "tkinter", "lib2to3", "pydoc_data", "__main__", "test"}
VOCAB, CONTEXT, BATCH = 3072, 512, 8
BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def sources(root: Path) -> dict[str, str]:
    """{name: text} of the standard library's Python files that people wrote."""
    out = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not SKIP.search(name) and path.stat().st_size < 400_000:
            out[name] = path.read_text(encoding="utf-8", errors="replace")
    return out


def documentation() -> dict[str, str]:
    """{name: text}: the documentation strings of a module and what it defines, as plain prose with headings."""
    names = sorted(set(sys.builtin_module_names) | {m.name for m in pkgutil.iter_modules() if m.name in sys.stdlib_module_names})
    out = {}
    for name in names:
        if name in NO_IMPORT or name.startswith("_py"):
            continue
        try:
            with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                module = importlib.import_module(name)
        except (Exception, SystemExit):  # a module for another platform, or one that runs something
            continue
        parts, seen = [], set()

        def add(title: str, thing: object, parts=parts, seen=seen) -> None:
            doc = inspect.getdoc(thing)
            if doc and len(doc) > 40 and doc not in seen:
                seen.add(doc)
                parts.append(f"{title}\n\n{doc}\n")

        add(name, module)
        for key, thing in sorted(vars(module).items()):
            if getattr(thing, "__module__", name) == name and callable(thing):
                add(f"{name}.{key}", thing)
                if inspect.isclass(thing):
                    for k, v in sorted(vars(thing).items()):
                        if callable(v) and not k.startswith("__"):
                            add(f"{name}.{key}.{k}", v)
        if parts:
            out[f"doc:{name}"] = "\n".join(parts)
    return out


def corpus() -> tuple[list[str], list[str]]:
    """(training documents, held-out documents)."""
    src, doc = sources(Path(sysconfig.get_paths()["stdlib"])), documentation()

    def held(name: str) -> bool:
        stem = name.removeprefix("doc:").split("/")[0].removesuffix(".py").split(".")[0]
        return int(hashlib.sha256(stem.encode()).hexdigest(), 16) % 25 == 0

    every = src | doc
    train = [t for n, t in every.items() if not held(n)] + [t for n, t in doc.items() if not held(n)]
    return train, [t for n, t in every.items() if held(n)]


def tokenizer_from(texts: list[str]) -> PreTrainedTokenizerFast:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[PAD, BOS, EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=CONTEXT)


def pack(tok: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """One long row of token ids, a document being `<s> … </s>`."""
    ids: list[int] = []
    for row in tok(texts, add_special_tokens=False)["input_ids"]:
        ids += [tok.bos_token_id, *row, tok.eos_token_id]
    return torch.tensor(ids)


def model_from(tok: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tok), hidden_size=256, intermediate_size=704, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=CONTEXT, tie_word_embeddings=True, rms_norm_eps=1e-5,
        bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id))


def rate(step: int, steps: int, peak: float = 2e-3) -> float:
    """Warm-up over 200 steps, flat, then a linear fall to 5 % over the last 35 %."""
    if step < 200:
        return peak * (step + 1) / 200
    return peak * max(0.05, min(1.0, (steps - step) / (0.35 * steps)))


@torch.no_grad()
def loss_on(model, ids: torch.Tensor, rows: int = 48) -> float:
    model.eval()
    x = ids[: rows * CONTEXT].view(-1, CONTEXT)
    total = sum(float(model(input_ids=b, labels=b).loss) * len(b) for b in x.split(BATCH))
    model.train()
    return total / len(x)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--steps", type=int, default=6000)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)

    train_text, val_text = corpus()
    if (args.out / "tokenizer.json").exists():
        tok = PreTrainedTokenizerFast.from_pretrained(args.out)
    else:
        tok = tokenizer_from(train_text)
        tok.save_pretrained(args.out)
    train, val = pack(tok, train_text), pack(tok, val_text)
    chars = sum(map(len, train_text))
    print(f"{len(train_text)} documents, {chars:,} characters, {len(train):,} tokens ({chars / len(train):.2f} characters each); "
          f"held out {len(val):,}", flush=True)

    model = model_from(tok)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    opt = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1},
                             {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}], lr=1e-3, betas=(0.9, 0.95))
    state, first = args.out / ".pretrain-state", 0
    log_path = args.out / "training_log.csv"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["opt"])
        first = saved["step"]
    else:
        log_path.write_text("step,tokens,lr,train_loss,val_loss,seconds\n")
    began, running = time.time(), []
    for step in range(first, args.steps):
        gen = torch.Generator().manual_seed(step)
        at = torch.randint(0, len(train) - CONTEXT, (BATCH,), generator=gen)
        x = torch.stack([train[i : i + CONTEXT] for i in at])
        for g in opt.param_groups:
            g["lr"] = rate(step, args.steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        running.append(loss.item())
        if (step + 1) % 250 == 0 or step + 1 == args.steps:
            row = [step + 1, (step + 1) * BATCH * CONTEXT, f"{rate(step, args.steps):.2e}", f"{sum(running) / len(running):.4f}",
                   f"{loss_on(model, val):.4f}", f"{time.time() - began:.0f}"]
            running = []
            print(*row, flush=True)
            with log_path.open("a", newline="") as f:
                csv.writer(f).writerow(row)
            torch.save({"model": model.state_dict(), "opt": opt.state_dict(), "step": step + 1}, state.with_suffix(".tmp"))
            state.with_suffix(".tmp").replace(state)
    model.to(torch.bfloat16).save_pretrained(args.out)
    bits = loss_on(model.float(), val) / math.log(2) * len(val) / len("".join(val_text).encode())
    print(f"held-out: {bits:.3f} bits per byte")
    state.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
