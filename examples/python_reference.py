"""The Python language reference, from the interpreter's own `pydoc_data.topics`, as training and held-out text.

    python examples/python_reference.py build/demo      # writes train.jsonl and eval.jsonl
"""

import hashlib
import json
import sys
from pathlib import Path
from pydoc_data.topics import topics


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "build/demo")
    out.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[str]] = {"train": [], "eval": []}
    for name, text in sorted(topics.items()):
        held = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0
        parts["eval" if held else "train"].append(text)
    # some topics quote others whole; a held-out one must not be in the training text
    parts["eval"] = [t for t in parts["eval"] if not any(t[200:600] in s for s in parts["train"])]
    for name, texts in parts.items():
        (out / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts) + "\n", encoding="utf-8")
        print(f"{out / name}.jsonl: {len(texts)} topics, {sum(map(len, texts)):,} characters")


if __name__ == "__main__":
    main()
