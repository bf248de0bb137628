"""Prompts by Jinja templates: side features, the sandbox, and what is refused when the template is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tawin_nemo.config.load import load_recipe
from tawin_nemo.config.schema import CatalogConfig, DataConfig, ModelConfig
from tawin_nemo.data.catalog_builder import build_catalog
from tawin_nemo.data.jinja_prompts import Columns, JinjaTemplate, read_source
from tawin_nemo.data.samples import PromptEncoder, encode_split
from tawin_nemo.data.tokenizer import build_tokenizer
from tawin_nemo.serve.engine.catalog import NewItem, PromptFormat, ServedCatalog
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import ConfigError, DataError
from tests.data.test_samples import split_of

TITLES = ["bolt", "steel washer", "glue for wood"]
IDS = ["B1", "B2", "B3"]
COLUMNS = Columns.of({
    "external_id": IDS, "title": TITLES, "brand": ["Acme", None, "Zed"], "category": ["Tools"] * 3,
    "price": [1.5, 2.0, None],
})  # fmt: skip
SOURCE = (
    "{% for item in items %}\n{{ item.text }} ({{ item.brand or 'no brand' }}, {{ item.category }}"
    "{% if item.price %}, {{ item.price }} EUR{% endif %})\n{% endfor %}\nNext: "
)


def template(source: str = SOURCE, **keys: object) -> JinjaTemplate:
    return JinjaTemplate(source=source, columns=COLUMNS, **keys)


def test_side_features_of_every_item_are_written() -> None:
    assert template().prompt_of([0, 1, 2], TITLES) == (
        "bolt (Acme, Tools, 1.5 EUR)\nsteel washer (no brand, Tools, 2.0 EUR)\nglue for wood (Zed, Tools)\nNext: "
    )
    assert template().prompt_of([], []) == "Next: "


def test_the_prompt_flows_alike_through_training_and_serving() -> None:
    """Rows of a split, a served history, and an item that the server was given later, which has no features."""
    data = DataConfig(template=SOURCE, max_history=3, max_prompt_tokens=200, bpe_vocab_size=400)
    jinja = template()
    tokenizer = build_tokenizer(data, CatalogConfig(), ModelConfig(), TITLES, None, template=jinja)
    samples = encode_split(split_of([[0, 1], [2], [0, 1, 2]]), TITLES, tokenizer, jinja, data)
    assert tokenizer.decode(samples.prompts[0]) == jinja.prompt_of([0, 1], TITLES[:2])
    catalog = build_catalog(TITLES, IDS, TITLES, tokenizer, jinja, kind="title")
    served = ServedCatalog.of(catalog, TITLES, PromptFormat(tokenizer, jinja, 3, 200))
    for row in range(len(samples)):
        assert served.prompt(samples.history[row].tolist()).flat.tolist() == samples.prompts[row].tolist()
    changed = served.changed([NewItem("B9", "nut"), NewItem("B1", "bolt, long")], ["B1"], 2)
    numbers = [changed.number_of["B9"], changed.number_of["B1"]]
    text = tokenizer.decode(changed.prompt(numbers).flat)
    assert text == "nut (no brand, )\nbolt, long (Acme, Tools, 1.5 EUR)\nNext: "


def test_candidates_are_shown_where_the_template_writes_them() -> None:
    jinja = template(
        "{{ items | map(attribute='text') | join(', ') }} of {% for c in candidates %}[{{ c.brand }}]{% endfor %}"
    )
    assert jinja.shows_candidates
    assert not template().shows_candidates
    assert jinja.prompt_of([0], ["bolt"], [2, 1], ["glue for wood", "steel washer"]) == "bolt of [Zed][]"
    encoder = PromptEncoder(TITLES, build_tokenizer(
        DataConfig(bpe_vocab_size=400), CatalogConfig(), ModelConfig(), TITLES, None, template=jinja
    ), jinja)  # fmt: skip
    rows = encoder.encode_with_candidates(TokenRows.from_lists([[0]]), TokenRows.from_lists([[2, 1]]))
    assert encoder._tokenizer.decode(rows[0]) == "bolt of [Zed][]"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ history }}", r"uses history, which is not known; a template has items and candidates.*text, title.*brand"),
        ("{{ items[0].colour }}", r"uses the column colour .* it has text, title, external_id, brand, category, price"),
        ("{% for i in items[-3:] %}{% if 0 %}{{ i['weight'] }}{% endif %}{% endfor %}", "uses the column weight"),
        ("{% for i in items | reverse %}{{ i.shape }}{% endfor %}", "uses the column shape"),
        ("Buy something {{ 1 }}", "does not use items"),
        ("{% for item in items %}", "line 1 is no Jinja template"),
        ("{{ items | random }}", "No filter named 'random'"),
        ("{{ items }} {% include 'x' %}", "fails for the history"),
        ("{{ items[-1].text }}", r"fails for the history \[\].*a history may be empty"),
        ("{% for i in items %}{{ '%.2f' | format(i.price) }}{% endfor %}", "so may the columns of an item"),
    ],
)
def test_a_template_that_cannot_work_is_refused_when_it_is_read(source: str, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        template(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ items.__class__.__mro__ }}",
        "{{ items.append(1) }}",
        "{{ ''.__class__ }}{{ items }}",
        "{{ items | attr('__class__') }}",
        "{{ range(999999999) | list }}{{ items }}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises((ConfigError, DataError), match="Error"):
        template(source)


def test_a_file_is_read_and_a_missing_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "shop.jinja").write_text(SOURCE, encoding="utf-8")
    assert read_source(str(tmp_path / "shop.jinja")) == SOURCE
    assert read_source(SOURCE) == SOURCE
    with pytest.raises(ConfigError, match=r"data.template=.*none\.jinja cannot be read"):
        read_source(str(tmp_path / "none.jinja"))


def test_the_fingerprint_is_that_of_the_text_and_not_of_the_items() -> None:
    empty = JinjaTemplate(source=SOURCE, columns=Columns(("brand", "category", "price")))
    assert template().fingerprint == empty.fingerprint
    assert template().fingerprint != template(SOURCE + " ").fingerprint


def test_recipes_take_files_and_text_and_nothing_else() -> None:
    assert load_recipe(None, ["data.template=my/shop.jinja"]).data.jinja
    assert load_recipe(None, ["data.template={{ items }} next:"]).data.jinja
    for name in ("compact", "alpaca"):
        assert not load_recipe(None, [f"data.template={name}"]).data.jinja
    with pytest.raises(ConfigError, match=r"data.template=chat is not one of compact, alpaca.*data.chat=true"):
        load_recipe(None, ["data.template=chat"])
    words = ["data.template=my.jinja", "catalog.kind=sid", "catalog.index=x.json"]
    with pytest.raises(ConfigError, match="needs words"):
        load_recipe(None, words)
    assert load_recipe(None, [*words, "data.tokenizer=bpe"]).data.jinja
