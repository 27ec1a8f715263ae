"""Data for training: read rows, tell their shape, turn them into token ids, pack and batch them.

    rows = read_rows("chats.jsonl")                # a file, a folder or a hub name -> plain dicts
    rows = normalise(rows, detect(rows))           # one canonical form for each shape
    data = encode(rows, tokenizer, 512)            # data.rows: {"input_ids", "labels"}, label -100 = not trained
    batches = DataLoader(pack(data.rows, 512), batch_size=8, collate_fn=Collator(tokenizer.pad_token_id))

Labels are not shifted (transformers' models do that), so the label of the first token of a row is never used, and a
token counts as trained only from the second on.
"""

from lorakit.training.data.batch import Collator, pack, packs_apart, preview, split
from lorakit.training.data.read import IGNORED, Row, read_rows
from lorakit.training.data.shapes import detect, normalise, side
from lorakit.training.data.tokens import CHAT, Encoded, encode, encode_labels, prompt_ids, split_prompt

__all__ = ["CHAT", "IGNORED", "Collator", "Encoded", "Row", "detect", "encode", "encode_labels", "normalise", "pack", "packs_apart", "preview",
           "prompt_ids", "read_rows", "side", "split", "split_prompt"]
