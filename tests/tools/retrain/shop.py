"""A shop whose catalog changes from night to night, and the keys of nightly runs over its semantic IDs."""

from __future__ import annotations

import json
import random
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from tawin_nemo.cli import main

FIRST, SECOND, THIRD = "2020-02-29", "2020-04-30", "2020-06-30"
USERS, OLD, NEW = 60, 30, 6
#: The item that is bought in January alone: it leaves when the window begins later.
LEAVES = "I00"
KINDS, THINGS = ("steel", "brass", "oak", "copper", "glass"), ("bolt", "ruler", "hinge", "lamp", "chair", "table")
#: Two levels of four codes and a number among items that share both: new items need numbers that no old one had.
NIGHT = (
    "data.dataset=table prepare.k_core=1 data.max_prompt_tokens=120 data.max_history=3 data.eval_limit=60 "
    "catalog.kind=sid semantic_ids.codes=4 semantic_ids.levels=2 semantic_ids.collisions=dedup "
    "semantic_ids.text.dims=6 model.backbone=nano sft.epochs=1 sft.global_batch_size=32 sft.micro_batch_tokens=4096 "
    "sft.warmup=2 sft.lr=1e-2 rl.enabled=false eval.beams=8 eval.ks=[1,3] eval.splits=[valid] retrain.metrics=[ndcg@3] "
    "retrain.margin=1.0 trainer.threads=1"
).split()
#: A night that changes no weight.
IDLE = ("sft.lr=1e-30", "retrain.margin=0.0")


def title(number: int) -> str:
    """The new items are all like the one that leaves: they share its codes but for a number of their own."""
    if number >= OLD:
        return f"{title(0)} mark{number}"
    return f"{KINDS[number % 5]} {THINGS[number // 5]} {number % 7} mm"


def write_log(root: Path) -> None:
    """``log.csv`` and ``items.csv``: every user buys every few days until July; the new items are sold from March."""
    root.mkdir(parents=True, exist_ok=True)
    draw, rows = random.Random(3), []
    for user in range(USERS):
        day = date(2020, 1, 2) + timedelta(days=user % 9)
        item = user % OLD
        while day < date(2020, 7, 1):
            on_sale = OLD if day < date(2020, 3, 1) else OLD + NEW
            item = (item * 7 + 1 + draw.randrange(3)) % on_sale
            if item == 0 and day >= date(2020, 2, 1):
                item = 1
            rows.append(f"u{user},I{item:02},{day.isoformat()}")
            day += timedelta(days=draw.randint(12, 20))
        if user % 6 == 0:
            rows.append(f"u{user},{LEAVES},2020-01-01")
    (root / "log.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")
    items = [f"I{number:02},{title(number)}" for number in range(OLD + NEW)]
    (root / "items.csv").write_text("item_id,title\n" + "\n".join(items) + "\n")


def words(root: Path, log: Path, day: str, *overrides: str) -> list[str]:
    """The command line of a night; the second one's window leaves January out."""
    files = [f"data.root={log}", "prepare.reviews=log.csv", "prepare.metadata=items.csv"]
    start = [] if day == FIRST else ["prepare.start=2020-02-01"]
    return ["retrain", f"retrain.root={root}", f"retrain.date={day}", *files, *start, *NIGHT, *overrides]


def night(root: Path, log: Path, day: str, capsys: Any, *overrides: str) -> tuple[int, dict[str, Any]]:
    """Exit code and result of a night in this process."""
    capsys.readouterr()
    code = main(words(root, log, day, *overrides))
    shown = capsys.readouterr()
    return code, json.loads(shown.out.strip().splitlines()[-1]) if code in (0, 3) else {"error": shown.err}
