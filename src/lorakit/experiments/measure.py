"""What a comparison measures beside a run's own metrics: F1, ROUGE-L, BLEU, forgetting, bytes saved for backward, what merging changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError, extra
from lorakit.planning.memory import counting_saved
from lorakit.training import data as d
from lorakit.training import measure as m
from lorakit.training.config import Data, Run
from lorakit.training.prepare import Prepared, prepare

GENERATED = ("messages", "sharegpt", "alpaca", "prompt_completion")  # shapes of rows with an answer


def given(p: Prepared) -> tuple[str, ...]:
    """The metrics beside a run's own that this data has."""
    return ("f1",) if p.labels else ("rouge_l", "bleu") if p.shape in GENERATED else ()


def check(names: Sequence[str], p: Prepared) -> None:
    """LorakitError where a metric does not fit the data, or needs a package that is not installed."""
    for name in names:
        if name not in given(p):
            raise LorakitError(f"metrics: {name} is not measured on data of shape {p.shape}" + (f", only {', '.join(given(p))}" if given(p) else ""))
        if name in TEXTS:
            TEXTS[name]([""], [""])


def extras(names: Sequence[str], model: nn.Module, p: Prepared) -> dict[str, float]:
    """The named metrics on the held-out rows."""
    out: dict[str, float] = {}
    with m.evaluating(model):
        if "f1" in names:
            out["f1"] = f1(*classes(model, p))
        if texts := [n for n in names if n in TEXTS]:
            said, wanted = answers(model, p)
            out |= {n: TEXTS[n](said, wanted) for n in texts}
    return out


def classes(model: nn.Module, p: Prepared) -> tuple[list[int], list[int]]:
    """(true, predicted) of the held-out rows."""
    true, found, device = [], [], next(model.parameters()).device
    for b in m._batches(p.heldout.rows, p.run.train.eval_batch_size, p.tokenizer.pad_token_id, device):
        true += b.pop("labels").tolist()
        found += model(**b).logits.argmax(-1).tolist()
    return true, found


def f1(true: Sequence[int], found: Sequence[int]) -> float:
    """The mean over classes of 2·hits / (rows of the class + rows called so), over the classes that occur in either."""
    scores = []
    for k in {*true, *found}:
        hits = sum(a == b == k for a, b in zip(true, found, strict=True))
        scores.append(2 * hits / (true.count(k) + found.count(k)))
    return sum(scores) / len(scores)


def answers(model: nn.Module, p: Prepared) -> tuple[list[str], list[str]]:
    """(greedy answers, expected answers), an answer no longer than the longest expected one."""
    pairs = m._prompts(p, p.held)
    longest = max(len(p.tokenizer(a, add_special_tokens=False)["input_ids"]) for _, a in pairs)
    return m.generate(model, p.tokenizer, [i for i, _ in pairs], longest + 1), [a for _, a in pairs]


def rouge_l(said: Sequence[str], wanted: Sequence[str]) -> float:
    """Mean F-measure of the longest common subsequence of words, by rouge-score."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as e:
        raise extra("rouge-score", "metrics") from e
    scorer = RougeScorer(["rougeL"])
    return sum(scorer.score(b, a)["rougeL"].fmeasure for a, b in zip(said, wanted, strict=True)) / len(said)


def bleu(said: Sequence[str], wanted: Sequence[str]) -> float:
    """BLEU of the whole set, 0 to 100, by sacrebleu."""
    try:
        import sacrebleu
    except ImportError as e:
        raise extra("sacrebleu", "metrics") from e
    return float(sacrebleu.corpus_bleu(list(said), [list(wanted)]).score)


TEXTS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {"rouge_l": rouge_l, "bleu": bleu}


class Elsewhere:
    """Other data, all of it held out: its loss before and after tells what was forgotten."""

    def __init__(self, run: Run, what: dict[str, Any], p: Prepared):
        data = Data(train=what["data"], split=what["split"], columns=what["columns"], limit=what["limit"], eval_fraction=0, max_length=run.data.max_length,
                    answer_only=run.data.answer_only)
        self.batch, self.pad, self.labels = run.train.eval_batch_size, p.tokenizer.pad_token_id, p.labels
        if p.labels:
            rows = d.read_rows(data.train, data.split, data.limit)
            rows = d.normalise(rows, "classification", data.columns or None)
            length = data.max_length or min(getattr(p.tokenizer, "model_max_length", 1024) or 1024, 1024)
            self.rows = d.encode_labels(rows, p.tokenizer, length, p.labels)[0].rows
        else:
            other = run.model_copy(update={"data": data, "task": p.task, "eval": run.eval.model_copy(update={"metrics": []})})
            self.rows = prepare(other).train.rows

    def loss(self, model: nn.Module) -> float:
        with m.evaluating(model):
            if self.labels:
                return m.accuracy(model, self.rows, self.pad, self.batch)["eval_loss"]
            return m.token_loss(model, self.rows, self.pad, self.batch)


def saved_bytes(model: nn.Module, batch: dict[str, Any]) -> int:
    """What the forward pass of one training batch keeps for the backward pass, without the model's own tensors; the random state comes back."""
    was, cpu = model.training, torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    model.train()
    with torch.enable_grad(), counting_saved(model) as found:
        out = model(**batch)
    del out
    model.train(was)
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
    return sum(found.values())


def logits(model: nn.Module, p: Prepared) -> Tensor:
    """Of one batch of held-out rows, padding left out."""
    rows = p.heldout.rows[: p.run.train.eval_batch_size]
    with m.evaluating(model):
        b = next(m._batches(rows, len(rows), p.tokenizer.pad_token_id, next(model.parameters()).device))
        b.pop("labels")
        out = model(**b).logits.float()
        return out if p.labels else out[b["attention_mask"].bool()]


def merge_loss(live: Tensor, merged: Tensor) -> float:
    """‖merged − live‖ / ‖live‖ of the logits."""
    return float((merged - live).norm() / live.norm().clamp_min(1e-30))
