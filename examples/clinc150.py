"""CLINC150 (one domain, n utterances per intent) as prompt/completion rows: the model answers with the intent's name.

    python examples/clinc150.py ../shared/data/clinc150 build/clinc --domain banking --per-class 10
"""

import argparse
import json
import random
from pathlib import Path


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("source", type=Path, help="folder with data_full.json and domains.json")
    ap.add_argument("out", type=Path)
    ap.add_argument("--domain", default="banking")
    ap.add_argument("--per-class", type=int, default=10)
    ap.add_argument("--seed", type=int, default=0)
    a = ap.parse_args()
    data = json.loads((a.source / "data_full.json").read_text())
    intents = json.loads((a.source / "domains.json").read_text())[a.domain]
    rng = random.Random(a.seed)
    train = []
    for intent in intents:
        rows = [r for r in data["train"] if r[1] == intent]
        train += rng.sample(rows, min(a.per_class, len(rows)))
    rng.shuffle(train)
    test = [r for r in data["test"] if r[1] in intents]
    a.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        lines = [json.dumps({"prompt": text, "completion": intent.replace("_", " ")}) for text, intent in rows]
        (a.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{len(train)} training and {len(test)} test rows, {len(intents)} intents of {a.domain}, in {a.out}")


if __name__ == "__main__":
    main()
