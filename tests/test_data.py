"""lorakit.training.data: files in, canonical rows, tokens of which exactly the answers are trained, packs, batches."""

from __future__ import annotations

import builtins
import csv
import json
import os
import random
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lorakit.errors import LorakitError
from lorakit.training import data as D
from lorakit.training.data.tokens import _pieces

DATA = Path(os.environ.get("LORAKIT_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"real data not there: {DATA} (set LORAKIT_DATA)")
CRAFT, STORIES = DATA / "craftgpt-5m" / "hf-opt-fp16", DATA / "stories260k" / "hf-llama-fp32"
INST = "_[inst] {prompt}_[/inst] {completion}"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (  # no generation prompt of its own; strips, and puts spaces round an answer
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' </s>' }}{% endif %}{% endfor %}"
)
THINK = (  # as Qwen3: only the last answer has a thinking block, so no conversation is a prefix of a longer one
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORCED = CHATML.replace("assistant\n{% endif", "assistant\n{{ '<think>' }}{% endif")  # prompt is not in the whole
NO_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{{ 'assistant: ' if add_generation_prompt else '' }}"
)
BOS_TURNS = (  # a BOS before each turn does not end the turn before it
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
LAST_ONLY = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' else '' }}")

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is two and two?"},
    {"role": "assistant", "content": "It is four."},
    {"role": "user", "content": "And three more?"},
    {"role": "assistant", "content": "Seven, I think.\nYes: seven."},
]


def bpe(pre: bool = True, text: str = "", vocab: int = 400) -> PreTrainedTokenizerFast:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre)
    tok.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tok.train_from_iterator([text or " ".join(t["content"] for t in TALK) * 3], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture
def tok() -> PreTrainedTokenizerFast:
    return bpe()


@pytest.fixture(scope="module")
def craft():
    return AutoTokenizer.from_pretrained(CRAFT)


@pytest.fixture(scope="module")
def stories():
    return AutoTokenizer.from_pretrained(STORIES)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def runs(row: dict, tok) -> list[str]:
    """The decoded stretches that are trained."""
    out, last = [], False
    for i, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (i, -100)
        if label != -100:
            out = out if last else [*out, []]
            out[-1].append(i)
        last = label != -100
    return [tok.decode(ids) for ids in out]


def fails(*parts: str):
    """The error is ours and names every one of these parts."""
    return pytest.raises(LorakitError, match="(?s)" + "".join(f"(?=.*{re.escape(part)})" for part in parts))


# ---- reading


def test_jsonl_takes_objects_strings_and_pairs_and_any_unicode(tmp_path):
    lines = [json.dumps({"text": "a\u2028b ü"}, ensure_ascii=False), "", '"just text"', '["hi there", "greet"]']
    rows = D.read_rows(write(tmp_path / "a.jsonl", "\ufeff" + "\r\n".join(lines)))
    assert rows == [{"text": "a\u2028b ü"}, {"text": "just text"}, {"text": "hi there", "label": "greet"}]
    assert D.read_rows(str(tmp_path / "a.jsonl"), limit=2) == rows[:2]


def test_json_list_and_splits(tmp_path):
    plain = write(tmp_path / "l.json", json.dumps([{"text": "a"}, "b"]))
    assert D.read_rows(plain) == [{"text": "a"}, {"text": "b"}]
    splits = write(tmp_path / "s.json", json.dumps({"val": [["u", "x"]], "train": [["v", "y"], ["w", 3]]}))
    assert D.read_rows(splits) == [{"text": "v", "label": "y"}, {"text": "w", "label": 3}]
    assert D.read_rows(splits, split="val") == [{"text": "u", "label": "x"}]
    one = write(tmp_path / "one.json", json.dumps({"rows": [{"text": "z"}], "version": 2}))
    assert D.read_rows(one) == [{"text": "z"}]
    talk = write(tmp_path / "talk.json", json.dumps({"messages": TALK}))
    assert D.read_rows(talk) == [{"messages": TALK}]


def test_tables(tmp_path):
    long = "x" * 200_000
    with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([["text", "label"], ['a, "b"\nc', "007"], [long, ""]])
    assert D.read_rows(tmp_path / "t.csv") == [{"text": 'a, "b"\nc', "label": "007"}, {"text": long, "label": ""}]
    assert D.read_rows(write(tmp_path / "t.tsv", "text\tlabel\na,b\tc\n")) == [{"text": "a,b", "label": "c"}]


def test_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"messages": TALK[:3]}, {"messages": TALK[1:3]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert D.read_rows(tmp_path / "p.parquet") == rows
    with fails("bad.parquet", "not a readable parquet file", "mend"):
        D.read_rows(write(tmp_path / "bad.parquet", "no"))


def test_text_files_and_e2e(tmp_path):
    for name in ("a.txt", "a.md", "a.rst", "a.py"):
        assert D.read_rows(write(tmp_path / name, "x = 1\n\ny || z\n")) == [{"text": "x = 1\n\ny || z\n"}]
    pairs = D.read_rows(write(tmp_path / "e.txt", "a : b || c .\n\nd||e\n"))
    assert pairs == [{"prompt": "a : b", "completion": "c ."}, {"prompt": "d", "completion": "e"}]
    assert D.read_rows(write(tmp_path / "e.md", "a||b\n")) == [{"text": "a||b\n"}]


def test_folder(tmp_path):
    write(tmp_path / "b" / "test.jsonl", '{"text": "3"}')
    write(tmp_path / "a.jsonl", '{"text": "1"}\n{"text": "2"}')
    write(tmp_path / "README.md", "about the data")
    write(tmp_path / ".git" / "x.txt", "no")
    write(tmp_path / "picture.png", "no")
    assert [r["text"] for r in D.read_rows(tmp_path)] == ["1", "2", "3"]
    assert [r["text"] for r in D.read_rows(tmp_path, split="test")] == ["3"]
    assert [r["text"] for r in D.read_rows(tmp_path, limit=1)] == ["1"]
    write(tmp_path / "docs" / "README.md", "only this")
    assert D.read_rows(tmp_path / "docs") == [{"text": "only this"}]


def test_hub(monkeypatch):
    import datasets

    calls = []

    def load(name, config=None, split=None):
        calls.append((name, config, split))
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
        )
        part = datasets.Dataset.from_list(
            [{"text": t, "label": n} for t, n in [("a", 1), ("b", 0), ("c", -1)]], features=features
        )
        return part if split else datasets.DatasetDict({"train": part, "test": part.select([0])})

    monkeypatch.setattr(datasets, "load_dataset", load)
    full = [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}, {"text": "c", "label": None}]
    assert D.read_rows("someone/things") == full
    assert D.read_rows("someone/things:small", split="test", limit=1) == full[:1]
    assert D.read_rows("glue:sst2") == full
    assert calls == [("someone/things", None, None), ("someone/things", "small", "test"), ("glue", "sst2", None)]

    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with fails("someone/thongs", "no such path", "ConnectionError: no network", "mend"):
        D.read_rows("someone/thongs")


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("a.jsonl", '{"text": 1}\n\n{"text": }\n', ("a.jsonl:3:10", "broken JSON", "mend")),
        ("a.jsonl", '{"text": 1}\n7\n', ("a.jsonl:2", "not 7")),
        ("a.json", '[{"text": 1},\n {"text" 2}]', ("a.json:2:10", "broken JSON")),
        ("a.json", '{"text": 1}\n{"text": 2}', ("a.json:2:1", ".jsonl")),
        ("a.json", '{"x": 1}', ("a.json", "list of rows")),
        ("a.json", "[3]", ("a.json, row 1", "not 3")),
        ("a.json", '{"x": [], "y": []}', ("a.json", "splits x, y", "split='x'")),
        ("a.json", '{"train": [["a", "b"], ["a", "b", "c"]]}', ("split `train`, row 2",)),
        ("a.csv", "text,label\na,b\na,b,c\n", ("a.csv:3", "3 fields", "header has 2")),
        ("a.csv", "text,label\na\n", ("a.csv:2", "1 fields", "header has 2")),
        ("a.csv", 'text,label\n"a"b,c\n', ("a.csv:2", "broken table", "quotes")),
        ("a.jsonl", "\n \n", ("a.jsonl", "empty")),
        ("a.csv", "text,label\n", ("a.csv", "empty")),
        ("a.txt", "", ("a.txt", "empty")),
        ("a.json", "[]", ("a.json", "empty")),
        ("a.xml", "<a/>", ("a.xml", "`.xml`", ".jsonl")),
        ("a", "x", ("no suffix", ".jsonl")),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, text, parts):
    path = write(tmp_path / name, text)
    with fails(*parts):
        D.read_rows(path)


def test_other_reading_errors(tmp_path, monkeypatch):
    write(tmp_path / "train.jsonl", '{"text": "1"}')
    with fails("trian.jsonl", "did you mean `train.jsonl`", str(tmp_path)):
        D.read_rows(tmp_path / "trian.jsonl")
    with fails("no `dta`", str(tmp_path), "known are train.jsonl"):
        D.read_rows(tmp_path / "dta" / "x" / "train.jsonl")
    monkeypatch.chdir(tmp_path)
    with fails("no `trains` in", "`train`"):  # looks like a hub name, but its folder is here
        (tmp_path / "data" / "train").mkdir(parents=True)
        D.read_rows("data/trains")
    with fails("own/set.jsonl", "no `own`"):  # a suffix we read is never a hub name
        D.read_rows("own/set.jsonl")
    with fails("no file to read", ".jsonl"):
        D.read_rows(tmp_path / "data")
    with fails("limit=0", "mend"):
        D.read_rows(tmp_path, limit=0)
    with fails("no splits", "split='test'", "mend"):
        D.read_rows(tmp_path / "train.jsonl", split="test")
    with fails("no splits", "split='test'"):
        D.read_rows(write(tmp_path / "l.json", "[1]"), split="test")
    with fails("no split `trian`", "`train`"):
        D.read_rows(write(tmp_path / "s.json", '{"train": [], "test": []}'), split="trian")
    with fails("folder", "no file of the split `tset`", "`test`"):
        write(tmp_path / "folder" / "test.csv", "a,b\n1,2\n")
        D.read_rows(tmp_path / "folder", split="tset")
    (tmp_path / "latin.txt").write_bytes(b"one\ntwo \xe9\n")
    with fails("latin.txt:2", "UTF-8", "byte 8"):
        D.read_rows(tmp_path / "latin.txt")


@pytest.mark.parametrize(("package", "source"), [("pyarrow", "p.parquet"), ("datasets", "some/one")])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, package, source):
    write(tmp_path / "p.parquet", "x")
    actual = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return actual(name, *args, **kwargs)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with fails(f"`{package}`", "lorakit[train]"):
        D.read_rows(source)


# ---- shapes

ANSWER = {"role": "assistant", "content": "a"}
OTHER = {"role": "assistant", "content": "b"}
ASK = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("row", "shape", "canonical"),
    [
        ({"messages": [ASK, ANSWER], "id": 3}, "messages", {"messages": [ASK, ANSWER]}),
        ({"messages": [ASK | {"content": [{"type": "text", "text": "q"}]}]}, "messages", {"messages": [ASK]}),
        (
            {"conversations": [{"from": f, "value": v} for f, v in [("system", "s"), ("human", "q"), ("gpt", "a")]]},
            "sharegpt",
            {"messages": [{"role": "system", "content": "s"}, ASK, ANSWER]},
        ),
        ({"prompt": "q", "completion": "a"}, "prompt_completion", {"prompt": "q", "completion": "a"}),
        ({"question": "q", "answer": 4}, "prompt_completion", {"prompt": "q", "completion": "4"}),
        ({"input": "q", "output": "a"}, "prompt_completion", {"prompt": "q", "completion": "a"}),
        ({"chosen": "a", "rejected": "b"}, "preference", {"prompt": "", "chosen": "a", "rejected": "b"}),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "score": 1},
            "preference",
            {"prompt": "q", "chosen": "a", "rejected": "b"},
        ),
        (
            {"chosen": [ASK, ANSWER], "rejected": [ASK, OTHER]},
            "preference",
            {"prompt": [ASK], "chosen": [ANSWER], "rejected": [OTHER]},
        ),
        (
            {"prompt": "q", "chosen": [ASK, ANSWER], "rejected": [ASK, OTHER]},
            "preference",
            {"prompt": [ASK], "chosen": [ANSWER], "rejected": [OTHER]},
        ),
        (
            {"prompt": [ASK], "chosen": "a", "rejected": [OTHER]},
            "preference",
            {"prompt": [ASK], "chosen": [ANSWER], "rejected": [OTHER]},
        ),
        (
            {"chosen": [ANSWER], "rejected": [ANSWER]},
            "preference",
            {"prompt": [], "chosen": [ANSWER], "rejected": [ANSWER]},
        ),
        ({"text": "t", "label": 3}, "classification", {"text": "t", "label": "3"}),
        ({"utterance": "t", "intent": "i"}, "classification", {"text": "t", "label": "i"}),
        ({"sentence": "t", "class": "c"}, "classification", {"text": "t", "label": "c"}),
        ({"text": "t", "url": "u"}, "text", {"text": "t"}),
        ({"content": "t"}, "text", {"text": "t"}),
    ],
)
def test_detect_and_normalise(row, shape, canonical):
    before = json.dumps(row)
    assert D.detect([row]) == shape
    assert D.normalise([row, row], shape) == [canonical, canonical]
    assert json.dumps(row) == before


def test_alpaca():
    bare, full = {"instruction": "Add.", "output": "3"}, {"instruction": "Add.", "input": "1 {2}", "output": "3"}
    assert D.detect([bare]) == D.detect([full]) == "alpaca"
    a, b = D.normalise([bare, full], "alpaca")
    assert a["completion"] == b["completion"] == "3"
    assert a["prompt"].endswith("### Instruction:\nAdd.\n\n### Response:\n") and "Input" not in a["prompt"]
    assert b["prompt"].endswith("### Instruction:\nAdd.\n\n### Input:\n1 {2}\n\n### Response:\n")
    dolly = {"instruction": "Add.", "context": "1 {2}", "response": "3", "category": "sums"}
    assert D.normalise([dolly], D.detect([dolly])) == [b]


def test_columns_rename():
    rows = [{"my_q": "q", "my_a": "a", "prompt": "not this"}]
    columns = {"prompt": "my_q", "completion": "my_a"}
    assert D.detect(rows, columns) == "prompt_completion"
    assert D.normalise(rows, "prompt_completion", columns) == [{"prompt": "q", "completion": "a"}]
    with fails("row 1", "`my_qq`", "`prompt`", "did you mean `my_q`"):
        D.detect(rows, {"prompt": "my_qq"})
    with fails("row 2", "`my_q`"):
        D.normalise([*rows, {"my_a": "a"}], "prompt_completion", columns)


@pytest.mark.parametrize(
    ("rows", "shape", "parts"),
    [
        ([{"prompt": "q", "completion": "a"}, {"prompt": "q"}], "prompt_completion", ("row 2", "`completion`", "mend")),
        ([{"text": "t"}, {"text": None}], "text", ("row 2", "`text`", "null")),
        ([{"text": ["t"]}], "text", ("row 1", "`text`", "list")),
        ([{"text": "t"}], "messages", ("row 1", "`text`", "`messages`", "accepted are messages")),
        ([{"text": "t"}], "mesages", ("unknown shape", "did you mean `messages`")),
        ([{"messages": "hi"}], "messages", ("row 1", "list of {role, content}", "hi")),
        ([{"messages": []}], "messages", ("row 1", "list of {role, content}")),
        (
            [{"messages": [ASK, {"role": "assitant", "content": "a"}]}],
            "messages",
            ("row 1", "message 2", "`assistant`"),
        ),
        ([{"messages": [ASK, {"role": "assistant", "content": None}]}], "messages", ("row 1", "message 2", "NoneType")),
        ([{"chosen": [], "rejected": [ANSWER]}], "preference", ("row 1", "empty list")),
        ([{"chosen": {"a": 1}, "rejected": "b"}], "preference", ("row 1", "`chosen`", "dict")),
    ],
)
def test_a_bad_row_is_named_with_its_number(rows, shape, parts):
    with fails(*parts):
        D.normalise(rows, shape)


def test_detect_errors_list_what_is_there_and_what_is_accepted():
    with fails("`foo`, `bar`", "prompt + completion", "text + label", "columns={"):
        D.detect([{"foo": 1, "bar": 2}])
    with fails("no rows"):
        D.detect([])


# ---- messages


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["It is four.<|im_end|>", "Seven, I think.\nYes: seven.<|im_end|>"]),
        (LLAMA2, [" It is four. </s>", " Seven, I think.\nYes: seven. </s>"]),
        (THINK, ["It is four.<|im_end|>", "<think>\n\n</think>\n\nSeven, I think.\nYes: seven.<|im_end|>"]),
        (FORCED, ["It is four.<|im_end|>", "Seven, I think.\nYes: seven.<|im_end|>"]),
        (
            NO_END,
            [" It is four.", " Seven, I think.\nYes: seven.</s>"],
        ),  # " It" is one token: its space stood in the prompt
        (BOS_TURNS, ["It is four.", "Seven, I think.\nYes: seven.</s>"]),
        (None, ["It is four.</s>", "Seven, I think.\nYes: seven.</s>"]),
    ],
)
def test_exactly_the_answers_of_a_conversation_are_trained(tok, template, expected):
    tok.chat_template = template
    talk = TALK[1:] if template == LLAMA2 else TALK
    data = D.encode([{"messages": talk}], tok, 1000)
    (row,) = data.rows
    assert runs(row, tok) == expected
    text = tok.apply_chat_template(talk, tokenize=False, chat_template=template or D.CHAT)
    whole = tok(text, add_special_tokens=False)["input_ids"]
    assert row["input_ids"][: len(whole) - 3] == whole[: len(whole) - 3]
    if template not in (NO_END, BOS_TURNS):
        assert row["input_ids"] == whole
    trained = sum(x != -100 for x in row["labels"])
    assert (data.dropped, data.truncated, data.tokens, data.trained_tokens) == (0, 0, len(row["labels"]), trained)
    # what stands before each answer is what generation would start from
    if template not in (FORCED, NO_END):
        start = tok.apply_chat_template(
            talk[:-1], tokenize=False, add_generation_prompt=True, chat_template=template or D.CHAT
        )
        ids = tok(start, add_special_tokens=False)["input_ids"]
        assert row["input_ids"][: len(ids)] == ids and row["labels"][len(ids) - 1] == -100 != row["labels"][len(ids)]


def test_answer_that_merges_with_its_prompt_is_found_by_offsets(monkeypatch):
    tok = bpe(pre=False, text="assistant: yes\n" * 50, vocab=300)
    tok.chat_template = NO_END
    talk = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "yes"}]
    assert len(tok("assistant: yes")["input_ids"]) == 1  # the prompt and the answer are one token
    (row,) = D.encode([{"messages": talk}], tok, 100).rows
    assert runs(row, tok) == ["assistant: yes</s>"]  # cannot be parted: the token that holds the answer is trained
    monkeypatch.setattr(type(tok), "is_fast", False)
    with fails("row 1", "where an answer begins", "fast"):
        D.encode([{"messages": talk}], tok, 100)


def test_same_words_in_question_and_answer_are_not_mixed_up(tok):
    tok.chat_template = CHATML
    talk = [{"role": r, "content": "a"} for r in ("user", "assistant", "user", "assistant")]
    (row,) = D.encode([{"messages": talk}], tok, 100).rows
    assert runs(row, tok) == ["a<|im_end|>"] * 2
    (row,) = D.encode([{"messages": [talk[1], *talk]}], tok, 100).rows  # begins with an answer
    assert runs(row, tok) == ["a<|im_end|>"] * 3
    (row,) = D.encode([{"messages": [talk[0], ANSWER | {"content": ""}, *talk]}], tok, 100).rows
    assert runs(row, tok) == ["<|im_end|>", "a<|im_end|>", "a<|im_end|>"]


def test_conversation_errors(tok):
    tok.chat_template = LAST_ONLY
    with fails("row 2, message 3", "cannot find this answer", "mend"):
        D.encode([{"messages": TALK[:3]}, {"messages": TALK}], tok, 100)
    tok.chat_template = "{{ raise_exception('System role not supported') }}"
    with fails("row 1", "System role not supported"):
        D.encode([{"messages": TALK}], tok, 100)
    tok.chat_template = CHATML
    with fails("nothing to train", "no row has an answer"):
        D.encode([{"messages": TALK[:2]}], tok, 100)
    with fails("row 1", "template", "`messages`"):
        D.encode([{"messages": TALK}], tok, 100, template=INST)
    data = D.encode([{"messages": TALK[:2]}, {"messages": TALK}], tok, 1000)
    assert (len(data.rows), data.dropped) == (1, 1)
    tok.chat_template, tok.eos_token = None, None
    with fails("no EOS token", "mend"):
        D.encode([{"messages": TALK}], tok, 100)


def test_a_long_conversation_keeps_its_last_answer(tok):
    tok.chat_template = CHATML
    whole = D.encode([{"messages": TALK}], tok, 1000).rows[0]
    n = len(whole["input_ids"])
    for size in range(2, n):
        try:
            data = D.encode([{"messages": TALK}], tok, size)
        except LorakitError as e:
            assert f"max_length={size}" in str(e) and size < 30
            continue
        (row,) = data.rows
        found = runs(row, tok)
        assert len(row["input_ids"]) <= size and data.truncated == 1
        if size >= 30:  # the last answer fits: it is whole; no part of the first is trained without its beginning
            assert found[-1] == "Seven, I think.\nYes: seven.<|im_end|>"
            assert found[:-1] in ([], ["It is four.<|im_end|>"])
    assert D.encode([{"messages": TALK}], tok, n - 1).rows[0]["input_ids"] == whole["input_ids"][:-1]  # only a line end


def test_a_piece_in_which_only_the_first_token_is_on_trains_nothing():
    assert _pieces([1, 2, 3], [True, False, False], 5) == []
    assert _pieces([1, 2, 3], [True, False, True], 5) == [{"input_ids": [1, 2, 3], "labels": [1, -100, 3]}]


# ---- prompt and completion


def test_template(tok):
    row = {"prompt": "{completion}?", "completion": "{prompt}!"}
    assert D.split_prompt(row) == ("{completion}?", "{prompt}!")
    assert D.split_prompt(row, "Q {prompt} A {completion}.") == ("Q {completion}? A ", "{prompt}!.")
    (enc,) = D.encode([row], tok, 100, template="Q {prompt} A {completion}.").rows
    assert runs(enc, tok) == ["{prompt}!.</s>"] and tok.decode(enc["input_ids"]) == "Q {completion}? A {prompt}!.</s>"
    for bad in ("{prompt}", "{completion}{prompt}", "{prompt}{completion}{completion}", "x {completion}"):
        with fails("template", bad, "after it"):
            D.encode([row], tok, 100, template=bad)
    with fails("{promt}", "did you mean `prompt`"):
        D.encode([row], tok, 100, template="{promt} {completion}")


def test_eos_comes_once_and_prompts_only_on_demand(tok):
    rows = [{"prompt": "It is", "completion": " four."}, {"prompt": "It is", "completion": " four.</s>"}]
    a, b = D.encode(rows, tok, 100).rows
    assert a == b and a["input_ids"].count(tok.eos_token_id) == 1 and runs(a, tok) == [" four.</s>"]
    assert a["input_ids"][0] != tok.bos_token_id  # this tokenizer does not add one
    data = D.encode(rows[:1], tok, 100, answer_only=False)
    assert data.rows[0] == {"input_ids": a["input_ids"], "labels": a["input_ids"]}
    assert data.trained_tokens == data.tokens - 1
    tok.eos_token = None
    with fails("no EOS token"):
        D.encode(rows, tok, 100)


def test_the_prompt_gives_way_to_the_answer(tok):
    prompt, answer = "What is two and two? " * 5, "It is four."
    size = len(tok(answer)["input_ids"]) + 1
    row = {"prompt": prompt, "completion": answer}
    full = D.encode([row], tok, 1000).rows[0]["input_ids"]
    for room in range(12):
        data = D.encode([row], tok, size + room)
        assert data.rows[0]["input_ids"] == full[-(size + room) :] and data.truncated == 1 and data.dropped == 0
        assert runs(data.rows[0], tok) == [answer + "</s>"]
    short = {"prompt": "What", "completion": answer * 5}  # the answer cannot fit: its end goes
    data = D.encode([short, row], tok, size)
    whole = D.encode([short], tok, 1000).rows[0]["input_ids"]
    assert data.rows[0]["input_ids"] == whole[:size] and (data.truncated, data.dropped) == (2, 0)
    both = {"prompt": prompt, "completion": answer * 5}  # neither fits: nothing of the answer is left
    data = D.encode([both, row], tok, size)
    assert (len(data.rows), data.dropped, data.truncated) == (1, 1, 1)
    with fails("label never answered", f"max_length={size}", "mend"):
        D.encode([both, both], tok, size)
    with fails("max_length=1"):
        D.encode([row], tok, 1)
    with fails("no rows"):
        D.encode([], tok, 10)


@real
def test_bos_is_kept_and_only_added_by_tokenizers_that_add_it(stories, craft):
    row = {"prompt": "Once upon a time there was a girl who", "completion": "slept."}
    head = stories(row["prompt"])["input_ids"]
    (enc,) = D.encode([row], stories, 512).rows
    assert head[0] == stories.bos_token_id and enc["input_ids"][: len(head)] == head == D.prompt_ids(
        stories, row["prompt"]
    )
    assert enc["labels"][: len(head)] == [-100] * len(head) and enc["input_ids"][-1] == stories.eos_token_id
    n = len(enc["input_ids"])
    (cut,) = D.encode([row], stories, n - 4).rows
    assert cut["input_ids"] == [head[0], *enc["input_ids"][5:]] and runs(cut, stories) == runs(enc, stories)
    # beside a BOS this answer does not fit: its end goes, not the prompt
    wide = {"prompt": "Once", "completion": row["completion"] * 9}
    size = sum(x != -100 for x in D.encode([wide], stories, 512).rows[0]["labels"])
    assert (
        D.encode([wide], stories, size).rows[0]["input_ids"]
        == D.encode([wide], stories, 512).rows[0]["input_ids"][:size]
    )
    assert D.prompt_ids(craft, "hello")[0] != craft.bos_token_id


@real
def test_e2e_with_the_prompt_form_of_a_real_model(craft):
    rows = D.read_rows(DATA / "e2e", split="valid")
    assert len(rows) == 4672 and D.detect(rows) == "prompt_completion"
    rows = D.normalise(rows, "prompt_completion")[:300]
    data = D.encode(rows, craft, 64, template=INST)
    assert len(data.rows) + data.dropped == 300 and data.truncated > 10
    assert max(len(r["input_ids"]) for r in data.rows) == 64 and min(len(r["input_ids"]) for r in data.rows) > 10
    assert data.trained_tokens == sum(x != -100 for r in data.rows for x in r["labels"][1:])
    whole = D.encode(rows, craft, 500, template=INST)
    assert (len(whole.rows), whole.dropped, whole.truncated) == (300, 0, 0)
    for row, enc in zip(rows, whole.rows, strict=True):
        (answer,) = runs(enc, craft)
        assert answer == craft.decode(craft(row["completion"])["input_ids"] + [0])
        assert (
            enc["input_ids"][0] == 0
            and enc["input_ids"][enc["labels"].index(next(x for x in enc["labels"] if x >= 0)) - 1] == 1
        )


@real
def test_conversation_without_a_chat_template_on_real_tokenizers(craft, stories):
    lower = [t | {"content": t["content"].lower()} for t in TALK]
    for tok, bos in ((craft, False), (stories, True)):
        assert not tok.chat_template
        (row,) = D.encode([{"messages": lower}], tok, 500).rows
        first, second = runs(row, tok)
        assert first.strip().startswith("it is four.") and first.endswith(tok.eos_token if bos else "[inst]")
        assert "seven, i think." in second and "###" not in first + second
        assert (row["input_ids"][0] == tok.bos_token_id) == bos


# ---- text


def test_text_is_cut_so_that_each_token_is_predicted_once(tok):
    text = "It is four. " * 30
    ids = [tok.bos_token_id, *tok(text)["input_ids"], tok.eos_token_id]
    for size in (2, 7, 64, len(ids), 1000):
        data = D.encode([{"text": text}], tok, size)
        assert all(len(r["input_ids"]) <= size and r["labels"] == r["input_ids"] for r in data.rows)
        assert [i for r in data.rows for i in r["labels"][1:]] == ids[1:]
        assert (data.trained_tokens, data.dropped, data.truncated) == (len(ids) - 1, 0, 0)
    tok.bos_token, tok.eos_token = None, None
    assert D.encode([{"text": text}], tok, 1000).rows[0]["input_ids"] == ids[1:-1]
    data = D.encode([{"text": text}, {"text": ""}], tok, 1000)
    assert data.dropped == 1


@real
def test_real_corpora(stories):
    tales = D.normalise(D.read_rows(DATA / "text-corpora" / "tinystories_1000.json", limit=50), "text")
    data = D.encode(tales, stories, 128)
    assert data.dropped == 0 and max(len(r["input_ids"]) for r in data.rows) == 128
    assert data.rows[0]["input_ids"][0] == stories.bos_token_id
    first = [i for i, r in enumerate(data.rows) if r["input_ids"][0] == stories.bos_token_id][1]
    ids = data.rows[0]["input_ids"] + [i for r in data.rows[1:first] for i in r["input_ids"][1:]]
    assert stories.decode(ids, skip_special_tokens=True).strip() == tales[0]["text"]
    play = D.read_rows(DATA / "text-corpora" / "tinyshakespeare.txt")
    assert len(play) == 1 and len(play[0]["text"]) > 1_115_000 and play[0]["text"].startswith("First Citizen")


def test_rows_of_other_kinds_are_refused(tok):
    for row in ({"text": "t", "label": "x"}, {"prompt": "", "chosen": "a", "rejected": "b"}, {"foo": 1}):
        with fails("row 2", "cannot encode", "mend"):
            D.encode([{"text": "It is four."}, row], tok, 100)


# ---- classes


@real
def test_clinc_labels(craft):
    path = DATA / "clinc150" / "data_full.json"
    train = D.normalise(D.read_rows(path, split="train"), "classification")
    val = D.normalise(D.read_rows(path, split="val", limit=40), "classification")
    assert len(train) == 15_000 and D.read_rows(path, limit=2) == train[:2]
    assert train[0] == {
        "text": "what expression would i use to say i love you if i were an italian",
        "label": "translate",
    }
    data, names = D.encode_labels(train[::20], craft, 16)
    assert len(names) == 150 and names == sorted(names) and data.truncated > 50 and data.dropped == 0
    assert all(names[r["labels"]] == t["label"] for r, t in zip(data.rows, train[::20], strict=True))
    assert max(len(r["input_ids"]) for r in data.rows) == 16 and data.trained_tokens == 750
    held, same = D.encode_labels(val, craft, 64, labels=names)
    assert same == names and names[held.rows[0]["labels"]] == val[0]["label"]
    oos = D.normalise(D.read_rows(path, split="oos_val", limit=1), "classification")
    with fails("row 41", "`oos`", "never seen in training"):
        D.encode_labels([*val, *oos], craft, 64, labels=names)


def test_label_order_and_errors(tok):
    rows = [{"text": "four", "label": x} for x in ("10", "9", "2")]
    data, names = D.encode_labels(rows, tok, 10)
    assert names == ["2", "9", "10"] and [r["labels"] for r in data.rows] == [2, 1, 0]
    with fails("only one label", "`10`"):
        D.encode_labels(rows[:1], tok, 10)
    assert D.encode_labels(rows[:1], tok, 10, labels=names)[0].rows[0]["labels"] == 2  # few test rows are fine
    with fails("row 2", "`text` and `label`"):
        D.encode_labels([rows[0], {"text": "x"}], tok, 10)
    with fails("every text is empty"):
        D.encode_labels([r | {"text": ""} for r in rows], tok, 10)
    data, _ = D.encode_labels([*rows, {"text": "", "label": "2"}], tok, 10)
    assert data.dropped == 1


# ---- packs and batches


def some_rows(n: int, longest: int, seed: int = 0) -> list[dict]:
    rng, rows = random.Random(seed), []
    for _ in range(n):
        ids = [rng.randrange(3, 500) for _ in range(rng.randint(1, longest))]
        rows.append({"input_ids": ids, "labels": [i if rng.random() < 0.7 else -100 for i in ids]})
    return rows


@pytest.mark.parametrize("length", [40, 41, 64, 1000])
def test_packing_loses_nothing(length):
    rows = some_rows(300, 40)
    packed = D.pack(rows, length)
    pieces = []
    for row in packed:
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["position_ids"]) <= length
        starts = [i for i, p in enumerate(row["position_ids"]) if p == 0] + [len(row["labels"])]
        for a, b in pairwise(starts):
            assert row["position_ids"][a:b] == list(range(b - a)) and row["labels"][a] == -100
            pieces.append((row["input_ids"][a:b], row["labels"][a + 1 : b]))
    assert sorted(pieces) == sorted((r["input_ids"], r["labels"][1:]) for r in rows)
    tokens = sum(len(r["input_ids"]) for r in rows)
    assert len(packed) <= 1.1 * tokens / length + 1


def test_packing_is_first_fit_and_refuses_what_cannot_fit():
    def row(n):
        return {"input_ids": [n] * n, "labels": [n] * n}

    packed = D.pack([row(n) for n in (6, 7, 4, 3, 1)], 10)
    assert [r["input_ids"] for r in packed] == [[6] * 6 + [4] * 4, [7] * 7 + [3] * 3, [1]]
    assert D.pack([], 10) == []
    with fails("row 2", "11 tokens", "10", "max_length"):
        D.pack([row(3), row(11)], 10)
    with fails("row 1", "0 tokens"):
        D.pack([row(0)], 10)
    with fails("row 1", "class"):
        D.pack([row(3) | {"labels": 1}], 10)


GPT2 = DATA / "craftgpt-5m" / "hf-gpt2-fp16"


@real
@pytest.mark.parametrize("path", [GPT2, STORIES], ids=["gpt2", "llama"])
def test_a_packed_and_padded_batch_gives_the_logits_of_its_pieces(path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    rows = some_rows(6, 20)
    packed = D.pack(rows, 32)
    assert len({len(r["input_ids"]) for r in packed}) > 1  # some are padded
    batch = D.Collator(0, pad_to_multiple_of=8)(packed)
    assert "attention_mask" not in batch
    with torch.no_grad():
        plain, together = model(**D.Collator(0)(rows)).logits, model(**batch, use_cache=False).logits
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            alone = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            torch.testing.assert_close(plain[i, :n], alone, rtol=1e-4, atol=1e-4)
            b, at = find(packed, row["input_ids"])
            torch.testing.assert_close(together[b, at : at + n], alone, rtol=1e-4, atol=1e-4)


def find(packed: list[dict], ids: list[int]) -> tuple[int, int]:
    """(row, place) of a piece."""
    every = ((b, i) for b, row in enumerate(packed) for i, place in enumerate(row["position_ids"]) if place == 0)
    return next((b, i) for b, i in every if packed[b]["input_ids"][i : i + len(ids)] == ids)


@real
def test_packs_apart_tells_which_models_mix_the_pieces():
    for path, apart in ((GPT2, True), (STORIES, True), (CRAFT, False)):  # OPT does not look at the positions
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
        assert D.packs_apart(model) is apart and model.training

    class NoPositions(torch.nn.Linear):
        def forward(self, input_ids):
            raise AssertionError

    assert D.packs_apart(NoPositions(2, 2)) is False


def test_collator_pads_each_key_with_its_own_value():
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = D.Collator(9)(rows)
    assert {k: v.tolist() for k, v in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 9]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }
    assert all(v.dtype == torch.int64 for v in batch.values())
    assert {k: tuple(v.shape) for k, v in D.Collator(9, 4)(rows).items()} == dict.fromkeys(batch, (2, 4))
    classes = D.Collator(9)([{"input_ids": [5, 6], "labels": 3}, {"input_ids": [7], "labels": 0}])
    assert classes["labels"].tolist() == [3, 0] and classes["attention_mask"].tolist() == [[1, 1], [1, 0]]
    packed = D.Collator(9)(D.pack(rows, 4) + D.pack(rows[1:], 4))
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0], [0, 0, 1, 2]]
    with fails("no pad token", "mend"):
        D.Collator(None)
    loader = torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=D.Collator(9))
    assert next(iter(loader))["input_ids"].shape == (2, 3)


def test_split_is_deterministic_and_complete():
    rows = [{"text": str(i)} for i in range(100)]
    train, held = D.split(rows, 0.2, 7)
    assert (len(train), len(held)) == (80, 20) and D.split(rows, 0.2, 7) == (train, held) != D.split(rows, 0.2, 8)
    assert sorted(train + held, key=lambda r: int(r["text"])) == rows
    state = random.getstate()
    D.split(rows, 0.5, 1)
    assert random.getstate() == state
    for fraction, n in ((0.001, 100), (0.999, 100), (0, 100), (1.5, 100), (-0.5, 100), (0.5, 1), (0.5, 0)):
        with fails("holding out", "mend"):
            D.split(rows[:n], fraction, 0)


# ---- preview


def test_preview_marks_what_is_trained(tok):
    from rich.text import Text

    tok.chat_template = CHATML
    talk = [{"role": "user", "content": "See [bold]x[/bold] \\"}, {"role": "assistant", "content": "[red]four[/red]\\"}]
    data = D.encode([{"messages": talk}] * 3, tok, 100)
    head, *lines = D.preview(data.rows, tok, n=1, width=500).split("\n")
    body = "<|im_start|>user↵See [bold]x[/bold] \\<|im_end|>↵<|im_start|>assistant↵{}[red]four[/red]\\<|im_end|>{}↵"
    assert lines == [body.format("⟦", "⟧")]
    assert head == f"row 1: {data.tokens // 3} tokens, {data.trained_tokens // 3} trained"
    for width in (7, 20, 500):
        lines = D.preview(data.rows[:1], tok, width=width, rich=True).split("\n")[1:]
        shown = [Text.from_markup(line) for line in lines]
        if width > 7:
            assert "".join(t.plain for t in shown) == body.format("", "")
            green = "".join(t.plain[s.start : s.end] for t in shown for s in t.spans if s.style == "green")
            assert green == "[red]four[/red]\\<|im_end|>"
        assert all(len(t.plain) <= width for t in shown) and len(lines) <= 8
    assert D.preview(data.rows, tok, n=2).count("row ") == 2 and D.preview([], tok) == ""
    classes = [{"input_ids": tok("It is four.")["input_ids"], "labels": 4}]
    assert D.preview(classes, tok).split("\n") == [
        f"row 1: {len(classes[0]['input_ids'])} tokens, class 4",
        "It is four.",
    ]


@real
def test_preview_keeps_the_spaces_of_real_tokenizers(stories):
    (row,) = D.encode([{"prompt": "Once upon", "completion": "a time"}], stories, 100).rows
    assert D.preview([row], stories).split("\n")[1] == "<s> Once upon⟦ a time<s>⟧"
