"""Links, anchors, paths, recipe keys and verbs that the pages name exist; every page is found from the README."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tawin_nemo.cli import VERBS
from tawin_nemo.config.load import leaf_fields, load_recipe
from tawin_nemo.config.schema import Recipe
from tests.pages.reader import (
    FOLDERS,
    GENERATED,
    PAGES,
    ROOT,
    Block,
    anchors,
    blocks,
    links,
    name,
    prose,
    resolved,
    spans,
)
from tests.test_import_dag import LAYERS

README = ROOT / "README.md"
#: Files of a run, a data set or another project, which the repository does not hold.
ELSEWHERE = re.compile(
    r"(.*/)?(recipe\.yaml|config\.json|index\.json|statistics\.md|__init__\.py|rl\.py|sft\.py|(sft|rl|evaluate|rqvae)\.sh)"
)
#: Words in capitals stand for a name of the reader's choice.
PLACEHOLDER = re.compile(r"(?<![A-Za-z])[A-Z]{3,}(_[A-Z]+)*(?![A-Za-z])|_N\b|\.\.\.|[<>{}|]")
SECTIONS = {key.split(".")[0] for key, _ in leaf_fields(Recipe) if "." in key}
#: Keys that the pages name and that belong to another project, or to a verb without a recipe.
OTHER_KEYS = {"data.train_batch_size", "loss_type", "report", "prefix_allowed_tokens_fn"}
KEYS = OTHER_KEYS | {key for key, _ in leaf_fields(Recipe)}
#: Where the pages say how to change the product: what to look for, and the heading that must be found.
PLACES = ("a reward", "an algorithm", "a backbone", "a data format", "a baseline", "a metric", "a verb", "a recipe")
CLICKS = 3
ROUTE = r"(?:GET |POST )?(/[\w/]*)"

every_page = pytest.mark.parametrize("page", PAGES, ids=name)
every_written_page = pytest.mark.parametrize("page", [page for page in PAGES if page not in GENERATED], ids=name)


def test_every_kind_of_page_is_here():
    expected = "README.md CONTRIBUTING.md CHANGELOG.md tawin_nemo/README.md tawin_nemo/serve/README.md tests/README.md "
    expected += "data_prep/README.md recipes/README.md recipes/guides/cli.md recipes/tutorial/README.md slurm/README.md"
    assert set(expected.split()) <= {name(page) for page in PAGES}
    assert 0 < len(GENERATED) < len(PAGES) / 2


@every_page
def test_links_and_anchors_exist(page: Path):
    wrong = []
    for link in links(page):
        target, anchor = resolved(page, link)
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
        assert target.is_relative_to(ROOT), link
    assert not wrong


@every_written_page
def test_paths_exist(page: Path):
    wrong = [span for span in spans(page) if _is_path(span) and not _exists(page, span)]
    assert not wrong


def _is_path(span: str) -> bool:
    """Whether a code span names a file or folder of the repository."""
    if " " in span or PLACEHOLDER.search(span) or ELSEWHERE.fullmatch(span) or "//" in span or span.startswith("/"):
        return False
    if re.fullmatch(r"[\w.\-/]+\.(py|md|sh|yaml|svg|toml)", span):
        return True
    first, _, rest = span.partition("/")
    return bool(rest or span.endswith("/")) and (first in FOLDERS or span.endswith("/")) and not span.startswith("runs")


def _exists(page: Path, span: str) -> bool:
    """A path counts from the root, the page's folder, the package or the tests; a bare file name from anywhere."""
    bases = (ROOT, page.parent, ROOT / "tawin_nemo", ROOT / "tests", ROOT / "slurm", ROOT / "recipes")
    if any(list(base.glob(span.rstrip("/"))) for base in bases):
        return True
    return "/" not in span and span in _file_names()


@cache
def _file_names() -> set[str]:
    return {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()}


@every_written_page
def test_recipe_keys_exist(page: Path):
    wrong = [key for span in spans(page) for key in _keys(span) if not _is_key(key)]
    assert not wrong


def _keys(span: str) -> Iterator[str]:
    """``section.key``, ``key=value``, ``section.key: value``, alone or among the words of a command."""
    for word in span.split():
        assigned = re.match(r"([a-z][a-z_]*)=", word)
        if assigned:
            yield assigned[1]
        match = re.match(r"([a-z][a-z0-9_]*(?:\.[a-z*][a-z0-9_*]*)+)(?:=.*|:)?$", word)
        if (
            match
            and match[1].split(".")[0] in SECTIONS
            and not match[1].endswith((".py", ".yaml", ".json", ".jsonl", ".parquet", ".sh"))
        ):
            yield match[1]


def _is_key(key: str) -> bool:
    pattern = re.escape(key).replace(r"\*", r"\w+")
    return any(re.fullmatch(rf"{pattern}(\..+)?", known) for known in KEYS)


@every_written_page
def test_verbs_exist(page: Path):
    said = re.findall(r"(?:tawin-nemo|python -m tawin_nemo) +([a-z]+)", " ".join(spans(page)))
    assert set(said) <= VERBS.keys()


@every_written_page
def test_recipes_exist_and_load(page: Path):
    text = prose(page) + "".join(block.text for block in blocks(page))
    for recipe in set(re.findall(r"recipes/[\w./\-]+\.yaml", text)):
        path = ROOT / recipe
        assert path.is_file() or PLACEHOLDER.search(recipe), recipe
        if path.is_file() and path.parent == ROOT / "recipes":
            load_recipe(path)


def test_the_routes_of_the_server_are_all_told():
    """Every route of both planes has its place in the server's page, and no other is told anywhere."""
    planes = [ROOT / "tawin_nemo" / "serve" / "http" / name for name in ("openapi.json", "openapi_control.json")]
    routes = {route for plane in planes for route in json.loads(plane.read_text(encoding="utf-8"))["paths"]}
    pages = (ROOT / "tawin_nemo" / "serve" / "README.md", ROOT / "recipes" / "coming_from.md", README)
    said = {match[1] for page in pages for span in spans(page) if (match := re.fullmatch(ROUTE, span))}
    told = {f"/catalog{route}" if f"/catalog{route}" in routes else route for route in said} - {"/"}
    assert told == routes


def test_the_readme_is_short():
    assert README.stat().st_size <= 8000


@cache
def _clicks() -> dict[Path, int]:
    """Fewest links from the README to a page; a link to a folder leads to its README."""
    distance, border = {README: 0}, [README]
    while border:
        reached = []
        for page in border:
            for link in links(page):
                target, _ = resolved(page, link)
                target = target / "README.md" if target.is_dir() else target
                if target.suffix == ".md" and target.is_file() and target not in distance:
                    distance[target] = distance[page] + 1
                    reached.append(target)
        border = reached
    return distance


@every_page
def test_every_page_is_found_from_the_readme(page: Path):
    assert _clicks().get(page, 99) <= CLICKS


@pytest.mark.parametrize("place", PLACES)
def test_where_to_add_something_is_found_from_the_readme(place: str):
    """README -> a page that links the section by its anchor (that link counts as well)."""
    anchor = place.replace(" ", "-")
    found = [
        clicks + 1
        for page, clicks in _clicks().items()
        for link in links(page)
        if resolved(page, link)[1] == anchor and anchor in anchors(resolved(page, link)[0])
    ]
    assert min(found, default=99) <= CLICKS
    assert place.split(" ", 1)[1] in prose(README).lower() + prose(ROOT / "CONTRIBUTING.md").lower()


def test_the_layer_table_is_the_enforced_one():
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", prose(ROOT / "tawin_nemo" / "README.md"), re.MULTILINE)
    told = {int(layer): {word.strip("`/ ").removesuffix(".py") for word in names.split(",")} for layer, names in rows}
    enforced: dict[int, set[str]] = {}
    for folder, layer in LAYERS.items():
        if folder != "__main__":  # the entry of `python -m`, no layer of its own
            enforced.setdefault(layer, set()).add(folder)
    assert told == enforced


DIFFS = [(page, block) for page in PAGES for block in blocks(page) if block.language == "diff"]


@pytest.mark.parametrize(("page", "block"), DIFFS, ids=lambda item: name(item) if isinstance(item, Path) else None)
def test_a_diff_fits_its_files(page: Path, block: Block):
    """What a shown diff removes or leaves stands in the file line by line, and the function that it names exists."""
    for part in re.split(r"^--- ", block.text, flags=re.MULTILINE)[1:]:
        file, *lines = part.splitlines()
        path, kept = ROOT / file, [line for line in lines if line[:1] in ("-", " ")]
        if not path.exists():  # a new file
            assert not kept, file
            continue
        text = path.read_text(encoding="utf-8")
        assert [line[1:] for line in kept if line[1:] not in text.splitlines()] == []
        for line in lines:
            assert not line.startswith("@@ ") or line.removeprefix("@@ ") in text
            assert line[:1] in ("", "+", "-", " ", "@"), line
