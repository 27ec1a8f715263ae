"""What is measured before and after: loss by the token, perplexity, exact match of generated answers, accuracy; samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.training import data as d
from lorakit.training.prepare import Prepared


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the training mode and the random state come back after."""
    was, rng = model.training, torch.get_rng_state()
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was)
        torch.set_rng_state(rng)


def evaluate(model: nn.Module, p: Prepared) -> dict[str, float]:
    """Metrics on the held-out rows; {} where there are none."""
    if p.heldout is None:
        return {}
    with evaluating(model):
        if p.labels:
            return accuracy(model, p.heldout.rows, p.tokenizer.pad_token_id, p.run.train.eval_batch_size)
        loss = token_loss(model, p.heldout.rows, p.tokenizer.pad_token_id, p.run.train.eval_batch_size)
        out = {"eval_loss": loss, "perplexity": math.exp(min(loss, 700))}
        if p.shape == "preference":
            out["preference_accuracy"] = preferred(model, p)
        if "exact_match" in p.run.eval.metrics:
            out["exact_match"] = exact_match(model, p)
        return out


def _batches(rows: Sequence[dict], size: int, pad: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    order = sorted(rows, key=lambda r: len(r["input_ids"]))  # rows of one length together: less padding
    collate = d.Collator(pad)
    for n in range(0, len(order), size):
        yield {k: v.to(device) for k, v in collate(order[n : n + size]).items()}


def token_loss(model: nn.Module, rows: Sequence[dict], pad: int, batch: int) -> float:
    """Mean negative log-likelihood of the trained tokens, each token counted once, in nats."""
    total, count, device = 0.0, 0, next(model.parameters()).device
    for b in _batches(rows, batch, pad, device):
        labels = b.pop("labels")[:, 1:]
        logits = model(**b, use_cache=False).logits[:, :-1].float()
        total += float(F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=d.IGNORED, reduction="sum"))
        count += int((labels != d.IGNORED).sum())
    return total / max(count, 1)


def accuracy(model: nn.Module, rows: Sequence[dict], pad: int, batch: int) -> dict[str, float]:
    """Share of rows whose highest logit is the label, and the mean loss."""
    right, total, device = 0, 0.0, next(model.parameters()).device
    for b in _batches(rows, batch, pad, device):
        labels = b.pop("labels")
        logits = model(**b).logits.float()
        right += int((logits.argmax(-1) == labels).sum())
        total += float(F.cross_entropy(logits, labels, reduction="sum"))
    return {"eval_loss": total / len(rows), "accuracy": right / len(rows)}


def preferred(model: nn.Module, p: Prepared) -> float:
    """Share of held-out pairs whose chosen answer is the likelier one, by the token."""
    pad, length, right = p.tokenizer.pad_token_id, max(len(r["input_ids"]) for r in p.train.rows), 0
    for row in p.held:
        loss = [token_loss(model, d.encode([d.side(row, k)], p.tokenizer, length, True, p.run.data.template).rows, pad, 1) for k in ("chosen", "rejected")]
        right += loss[0] < loss[1]
    return right / len(p.held)


def _prompts(p: Prepared, rows: Sequence[dict]) -> list[tuple[list[int], str]]:
    """(prompt ids, expected answer) as training saw them; rows without an answer are left out."""
    out = []
    for row in rows:
        row = d.side(row, "chosen") if "chosen" in row else row
        if "completion" in row:
            prompt, answer = d.split_prompt(row, p.run.data.template)
            out.append((d.prompt_ids(p.tokenizer, prompt), answer))
        elif "messages" in row and row["messages"][-1]["role"] == "assistant":
            template = None if p.tokenizer.chat_template else d.CHAT
            ids = p.tokenizer.apply_chat_template(row["messages"][:-1], chat_template=template, add_generation_prompt=True, return_dict=False)
            out.append((list(ids), row["messages"][-1]["content"]))
    return out


def generate(model: nn.Module, tok: Any, prompts: Sequence[list[int]], new_tokens: int, temperature: float = 0.0, batch: int = 32) -> list[str]:
    """Continuations of prompts given as ids; padded on the left, stopped at the end token."""
    device = next(model.parameters()).device
    limit = getattr(model.config, "max_position_embeddings", None) or 10**9
    out: list[str] = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    for at in range(0, len(order), batch):
        some = [prompts[n][-(limit - 1) :] for n in order[at : at + batch]]
        width = max(map(len, some))
        ids = torch.tensor([[tok.pad_token_id] * (width - len(s)) + s for s in some], device=device)
        mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in some], device=device)
        choose = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        new = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max(1, min(new_tokens, limit - width)), pad_token_id=tok.pad_token_id, **choose)
        for n, row in zip(order[at : at + batch], new[:, width:], strict=True):
            out[n] = tok.decode(row, skip_special_tokens=True)
    return out


def exact_match(model: nn.Module, p: Prepared) -> float:
    """Share of held-out rows whose greedy answer, stripped, is the expected one."""
    pairs = _prompts(p, p.held)
    if not pairs:
        return float("nan")
    longest = max(len(p.tokenizer(a, add_special_tokens=False)["input_ids"]) for _, a in pairs)
    texts = generate(model, p.tokenizer, [i for i, _ in pairs], longest + 1)
    return sum(t.strip() == a.strip() for t, (_, a) in zip(texts, pairs, strict=True)) / len(pairs)


def samples(model: nn.Module, p: Prepared) -> list[dict[str, Any]]:
    """[{prompt, text, expected}] for the prompts the run shows."""
    if p.labels or not hasattr(model, "generate"):
        return []
    e, tok = p.run.eval, p.tokenizer
    if e.prompts:
        pairs = [(t, d.prompt_ids(tok, t), None) for t in e.prompts]
    elif p.shape == "text":
        pairs = [(t, d.prompt_ids(tok, t), None) for t in _openings(p, e.samples)]
    else:
        pairs = [(tok.decode(i, skip_special_tokens=False), i, a) for i, a in _prompts(p, p.held[: e.samples] or p.rows[: e.samples])]
    with evaluating(model):
        torch.manual_seed(p.run.train.seed)
        texts = generate(model, tok, [i for _, i, _ in pairs], e.max_new_tokens, e.temperature)
    return [{"prompt": t, "text": text, "expected": a} for (t, _, a), text in zip(pairs, texts, strict=True)]


def _openings(p: Prepared, n: int) -> list[str]:
    """Beginnings of lines spread over the held-out text."""
    lines = [line for row in (p.held or p.rows) for line in row["text"].splitlines() if len(line.split()) >= 6]
    return [" ".join(line.split()[:5]) for line in lines[:: max(1, len(lines) // max(n, 1))][:n]]
