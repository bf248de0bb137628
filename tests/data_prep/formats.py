"""One log in every input format, and the table of formats in data_prep/README.md that is made from it.

``python -m tests.data_prep.formats`` writes the table; ``test_formats.py`` compares it.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tawin_nemo.config.schema import ColumnsConfig, DataConfig, PrepareConfig
from tawin_nemo.data.interactions import Dataset, load_dataset
from tawin_nemo.data_prep.prepare import prepare
from tawin_nemo.types import SPLITS

README = Path(__file__).resolve().parents[2] / "data_prep" / "README.md"
BEGIN, END = "<!-- formats: begin (made by tests/data_prep/formats.py) -->", "<!-- formats: end -->"
START = int(datetime(2021, 3, 1, tzinfo=UTC).timestamp())
USERS, ITEMS, HISTORY = 12, 6, 4


@dataclass(frozen=True)
class Row:
    """One interaction of the log, and its ids: text, or numbers for formats that have only these."""

    user: int
    item: int
    time: int

    @property
    def u(self) -> str:
        return f"A{self.user:02d}"

    @property
    def i(self) -> str:
        return f"B{self.item:02d}"

    @property
    def iso(self) -> str:
        return datetime.fromtimestamp(self.time, tz=UTC).strftime("%Y-%m-%d %H:%M:%S")


def log() -> list[Row]:
    """Every user takes every item, in an order of its own; all times differ."""
    rows = []
    for user in range(USERS):
        for step in range(ITEMS):
            item = (step * (1 + 4 * (user % 2)) + user) % ITEMS
            rows.append(Row(user, item, START + 3600 * (USERS * step + user)))
    return sorted(rows, key=lambda row: (row.user, row.time))


def title(item: int) -> str:
    return f"Steel bolt {item + 3} mm"


def shop_items() -> list[tuple[str, str]]:
    return [(f"B{item:02d}", title(item)) for item in range(ITEMS)]


@dataclass(frozen=True)
class Format:
    """How the log is written: ``write`` fills a folder; ``shown`` is the file (or text) whose lines the page shows."""

    name: str
    dataset: str
    write: Callable[[Path], None]
    shown: str
    options: dict[str, Any] = field(default_factory=dict)
    keys: str = ""
    ready_made: bool = False


def json_lines(path: Path, rows: Iterable[dict[str, Any]], write: Callable[[Any], str] = json.dumps) -> None:
    text = "".join(write(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def table(path: Path, header: str, rows: Iterable[Iterable[object]], separator: str = ",") -> None:
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=separator, lineterminator="\n")
    writer.writerows(rows)
    path.write_text((header + "\n" if header else "") + stream.getvalue())


def amazon_2014(root: Path) -> None:
    json_lines(
        root / "reviews_Mine.json.gz",
        ({"reviewerID": r.u, "asin": r.i, "overall": 5.0, "unixReviewTime": r.time} for r in log()),
    )
    json_lines(
        root / "meta_Mine.json.gz",
        ({"asin": i, "title": t, "categories": [["Tools", "Bolts"]]} for i, t in shop_items()), repr,
    )  # fmt: skip


def amazon_2018(root: Path) -> None:
    rows = ({"overall": 5.0, "reviewerID": r.u, "asin": r.i, "unixReviewTime": r.time} for r in log())
    json_lines(root / "Mine.json", rows)
    items = ({"category": ["Tools", "Bolts"], "asin": i, "title": t, "brand": "Acme"} for i, t in shop_items())
    json_lines(root / "meta_Mine.json", items)


def amazon_2023(root: Path) -> None:
    rows = ({"rating": 5.0, "parent_asin": r.i, "user_id": r.u, "timestamp": r.time * 1000} for r in log())
    json_lines(root / "Mine.jsonl.gz", rows)
    items = ({"title": t, "store": "Acme", "categories": ["Tools"], "parent_asin": i} for i, t in shop_items())
    json_lines(root / "meta_Mine.jsonl.gz", items)


def yelp(root: Path) -> None:
    rows = ({"user_id": r.u, "business_id": r.i, "stars": 5, "date": r.iso} for r in log())
    json_lines(root / "mine_review.json", rows)
    items = ({"business_id": i, "name": t, "city": "Reno"} for i, t in shop_items())
    json_lines(root / "mine_business.json", items)


def comma(root: Path) -> None:
    rows = [(r.u, r.i, r.iso.replace(" ", "T") + "Z", "purchase") for r in log()]
    table(root / "log.csv", "user_id,item_id,time,event", rows)
    table(root / "items.csv", "item_id,title", shop_items())


def tabs(root: Path) -> None:
    table(root / "log.tsv", "customer_id\tsku\tts", ((r.u, r.i, r.time) for r in log()), "\t")
    table(root / "items.tsv", "sku\tname\tbrand", ((i, t, "Acme") for i, t in shop_items()), "\t")


def own_names(root: Path) -> None:
    table(root / "sales.csv", "who;what;when", ((r.u, r.i, r.iso) for r in log()), ";")
    table(root / "shop.csv", "what;words", shop_items(), ";")


def no_header(root: Path) -> None:
    table(root / "ratings_Mine.csv", "", ((r.i, r.u, 5.0, r.time) for r in log()))


def parquet(root: Path) -> None:
    times = pa.array([r.time * 1000 for r in log()], pa.timestamp("ms"))
    ids = {"user_id": [r.u for r in log()], "item_id": [r.i for r in log()]}
    pq.write_table(pa.table({**ids, "timestamp": times}), root / "log.parquet")
    item, text = zip(*shop_items(), strict=True)
    pq.write_table(pa.table({"item_id": item, "title": text}), root / "items.parquet")


def contract(root: Path) -> None:
    (root / "interactions").mkdir()
    (root / "items").mkdir()
    ids = {"user_id": [r.u for r in log()], "item_id": [r.i for r in log()]}
    pq.write_table(pa.table({**ids, "timestamp": [r.time for r in log()]}), root / "interactions" / "part-0.parquet")
    item, text = zip(*shop_items(), strict=True)
    pq.write_table(pa.table({"item_id": item, "title": text}), root / "items" / "part-0.parquet")


def jsonl(root: Path) -> None:
    json_lines(root / "log.jsonl", ({"user": r.u, "item": r.i, "timestamp": r.time * 1000} for r in log()))
    json_lines(root / "items.jsonl", ({"item": i, "title": t} for i, t in shop_items()))


def recbole(root: Path) -> None:
    rows = ((r.u, r.i, 5.0, float(r.time)) for r in log())
    table(root / "mine.inter", "user_id:token\titem_id:token\trating:float\ttimestamp:float", rows, "\t")
    table(root / "mine.item", "item_id:token\ttitle:token_seq", shop_items(), "\t")


def numbered() -> list[tuple[int, int, int, int]]:
    return [(r.user + 10, r.item + 100, 5, r.time) for r in log()]


def ml_1m(root: Path) -> None:
    (root / "ratings.dat").write_text("".join("::".join(map(str, row)) + "\n" for row in numbered()))
    movies = "".join(f"{item + 100}::{title(item)}::Action|Drama\n" for item in range(ITEMS))
    (root / "movies.dat").write_text(movies, encoding="latin-1")
    (root / "users.dat").write_text("10::F::1::10::48067\n")


def ml_latest(root: Path) -> None:
    table(root / "ratings.csv", "userId,movieId,rating,timestamp", numbered())
    table(root / "movies.csv", "movieId,title,genres", ((n + 100, title(n), "Action|Drama") for n in range(ITEMS)))
    table(root / "tags.csv", "userId,movieId,tag,timestamp", [(10, 100, "fun", START)])


def ml_100k(root: Path) -> None:
    table(root / "u.data", "", numbered(), "\t")
    (root / "u.item").write_text(
        "".join(f"{n + 100}|{title(n)}|01-Jan-1995||http://x|0|1\n" for n in range(ITEMS)), encoding="latin-1"
    )
    (root / "u.user").write_text("10|24|M|technician|85711\n")


def hugging_face(root: Path) -> None:
    import datasets

    rows = [{"user_id": r.u, "item_id": r.i, "timestamp": r.time, "title": title(r.item)} for r in log()]
    whole = datasets.Dataset.from_list(rows)
    datasets.DatasetDict(train=whole.select(range(50)), test=whole.select(range(50, len(rows)))).save_to_disk(root)


def samples() -> dict[str, list[tuple[Row, list[Row]]]]:
    """The samples of each split: the target and the history, at most HISTORY rows."""
    rows: list[tuple[Row, list[Row]]] = []
    for user in range(USERS):
        own = [row for row in log() if row.user == user]
        rows += [(own[n], own[max(0, n - HISTORY) : n]) for n in range(1, len(own))]
    rows.sort(key=lambda sample: sample[0].time)
    train, valid = len(rows) * 8 // 10, len(rows) * 9 // 10
    return dict(zip(SPLITS, (rows[:train], rows[train:valid], rows[valid:]), strict=True))


def inter(root: Path) -> None:
    header = "user_id:token\titem_id_list:token_seq\titem_id:token"
    for split, rows in samples().items():
        lines = ((t.u, " ".join(r.i for r in history), t.i) for t, history in rows)
        table(root / f"mine.{split}.inter", header, lines, "\t")
    table(root / "mine.item", "item_id:token\ttitle:token_seq", shop_items(), "\t")


def minionerec(root: Path) -> None:
    for split, rows in samples().items():
        (root / split).mkdir()
        header = "user_id,history_item_title,item_title,history_item_id,item_id,history_item_sid,item_sid"
        lines = (
            (t.u, [title(r.item) for r in history], title(t.item), [r.item for r in history], t.item,
             [f"<a_{r.item}><b_0>" for r in history], f"<a_{t.item}><b_0>")
            for t, history in rows
        )  # fmt: skip
        table(root / split / "Mine_5.csv", header, lines)


def rere(root: Path) -> None:
    for split, rows in samples().items():
        (root / split).mkdir()
        header = "user_id,item_asins,item_asin,history_item_id,item_id,history_item_title,item_title"
        lines = (
            (t.u, [r.i for r in history], t.i, [r.item for r in history], t.item,
             [title(r.item) for r in history], title(t.item))
            for t, history in rows
        )  # fmt: skip
        table(root / split / "Mine_5.csv", header, lines)


_NAMED = ColumnsConfig(user="who", item="what", time="when", title="words")
FORMATS = [
    Format("Amazon 2014", "amazon", amazon_2014, "reviews_Mine.json.gz"),
    Format("Amazon 2014, items", "amazon", amazon_2014, "meta_Mine.json.gz"),
    Format("Amazon 2018", "amazon", amazon_2018, "Mine.json"),
    Format("Amazon 2023", "amazon", amazon_2023, "Mine.jsonl.gz"),
    Format("Yelp", "yelp", yelp, "mine_review.json"),
    Format("CSV", "table", comma, "log.csv"),
    Format("TSV", "table", tabs, "log.tsv"),
    Format("CSV, own names", "table", own_names, "sales.csv", {"columns": _NAMED},
           "prepare.columns.user=who prepare.columns.item=what prepare.columns.time=when prepare.columns.title=words"),
    Format("CSV without header", "table", no_header, "ratings_Mine.csv",
           {"columns": ColumnsConfig(user="2", item="1", time="4")},
           "prepare.columns.user=2 prepare.columns.item=1 prepare.columns.time=4"),
    Format("Parquet", "table", parquet, "log.parquet"),
    Format("Data contract", "parquet", contract, "interactions/part-0.parquet"),
    Format("JSON lines", "table", jsonl, "log.jsonl"),
    Format("RecBole atomic files", "table", recbole, "mine.inter"),
    Format("MovieLens 1M, 10M", "table", ml_1m, "ratings.dat"),
    Format("MovieLens 20M, 25M, latest", "table", ml_latest, "ratings.csv"),
    Format("MovieLens 100K", "table", ml_100k, "u.data"),
    Format("Hugging Face `datasets` folder", "table", hugging_face, ""),
    Format("MiniOneRec and RecBole splits", "inter", inter, "mine.train.inter", ready_made=True),
    Format("MiniOneRec CSV", "split_csv", minionerec, "train/Mine_5.csv", ready_made=True),
    Format("ReRe CSV", "split_csv", rere, "train/Mine_5.csv", ready_made=True),
]  # fmt: skip


def load(entry: Format, root: Path, source: str = "auto") -> Dataset:
    """The log in this format, written into ``root`` / raw and prepared in ``root`` / out."""
    raw = root / "raw"
    raw.mkdir()
    entry.write(raw)
    data = DataConfig(max_history=HISTORY)
    return load_dataset(prepare(source, raw, root / "out", prepare=PrepareConfig(**entry.options), data=data, seed=0))


def shown_lines(entry: Format, root: Path) -> list[str]:
    """Three lines of the file, as the page shows them; rows of binary formats as JSON."""
    path = root / "raw" / entry.shown
    if path.is_dir() or path.suffix == ".parquet":
        import datasets

        rows = datasets.load_from_disk(path)["train"] if path.is_dir() else pq.read_table(path).to_pylist()
        return [json.dumps(rows[n], default=str) for n in range(3)]
    content = path.read_bytes()
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    return content.decode().splitlines()[:3]


def last_sample(dataset: Dataset) -> str:
    """The last row of test in external ids: user, history -> target."""
    test, names = dataset.test, dataset.items.external_ids
    history = ", ".join(names[item] for item in test.history[len(test) - 1])
    return f"{dataset.user_ids(test.user_N[-1:])[0]}: {history} -> {names[test.target_N[-1]]}"


def markdown() -> str:
    """The table of formats: three lines of a file, and what becomes of the log."""
    lines = ["| format | `data.dataset` | three lines | result |", "|---|---|---|---|"]
    for entry in FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            dataset = load(entry, Path(folder))
            shown = [_code(line) for line in shown_lines(entry, Path(folder))]
            last = last_sample(dataset)  # external ids are read when they are asked for
        rows = " / ".join(str(len(getattr(dataset, split))) for split in SPLITS)
        result = f"{rows} samples, {len(dataset.items)} items; the last: {last}"
        name = f"{entry.name}, {_code(entry.shown)}" if entry.shown else entry.name
        keys = f" with `{entry.keys}`" if entry.keys else ""
        lines.append(f"| {name} | `{entry.dataset}`{keys} | {'<br>'.join(shown)} | {result} |")
    return "\n".join(lines)


def _code(text: str) -> str:
    escaped = text.replace("|", "\\|").replace("\t", " ⇥ ")
    return f"`{escaped}`"


def page(text: str) -> str:
    """``text`` of the page with the table between its marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{markdown()}\n\n{END}{after}"


if __name__ == "__main__":
    README.write_text(page(README.read_text(encoding="utf-8")), encoding="utf-8")
