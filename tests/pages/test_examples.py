"""The Python examples of the README run as they stand, on a small model and against a server of the test."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from tests.benchmarks.hf_round_trip import make_tokenizer
from tests.pages.reader import PAGES, ROOT, blocks, name
from tests.serve.scene import TITLES, serving

EXAMPLES = [(page, block) for page in PAGES for block in blocks(page) if block.language == "python"]
FOLDER = '"Qwen2.5-0.5B"'
ADDRESS = '"http://127.0.0.1:8000"'


def example(words: str) -> str:
    """The README's example that holds these words."""
    (found,) = [block.text for page, block in EXAMPLES if page == ROOT / "README.md" and words in block.text]
    return found


def test_no_example_is_forgotten():
    assert [(name(page), "MegatronLM" in block.text) for page, block in EXAMPLES] == [
        ("README.md", True), ("README.md", False), *[("recipes/guides/export.md", False)] * 4,
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Qwen2 model of two layers in Hugging Face format, with its tokenizer."""
    make_tokenizer(tmp_path)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(AutoTokenizer.from_pretrained(tmp_path)), hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # far from uniform
    model.save_pretrained(tmp_path)
    return tmp_path


def path_scores(folder: Path, titles: list[str], prompt: str) -> dict[str, float]:
    """Summed log-prob of every title within the titles, by a full forward pass of transformers each."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), Qwen2ForCausalLM.from_pretrained(folder).eval()
    start = tokenizer.encode(prompt)
    paths = [[*tokenizer.encode(title), tokenizer.eos_token_id] for title in titles]
    found = {}
    for title, path in zip(titles, paths, strict=True):
        with torch.no_grad():
            logits_TV = model(torch.tensor([start + path])).logits[0, len(start) - 1 : -1]
        score = 0.0
        for depth, token in enumerate(path):
            allowed = sorted({other[depth] for other in paths if other[:depth] == path[:depth]})
            score += float(logits_TV[depth, allowed].log_softmax(0)[allowed.index(token)])
        found[title] = score
    return found


def test_search_of_the_readme(folder: Path, capsys: pytest.CaptureFixture[str]):
    text = example("constrained_beam_search")
    assert FOLDER in text
    names: dict[str, object] = {}
    exec(compile(text.replace(FOLDER, repr(str(folder))), "README.md", "exec"), names)
    shown = [line.split(" ", 1) for line in capsys.readouterr().out.strip().splitlines()[-3:]]
    expected = path_scores(folder, names["titles"], "Bought: Tape measure. Next: ")
    assert [title for _, title in shown] == sorted(expected, key=lambda title: -expected[title])
    for score, title in shown:
        assert math.isclose(float(score), expected[title], abs_tol=2e-3)


def test_client_of_the_readme(capsys: pytest.CaptureFixture[str]):
    text = example("api.client")
    assert ADDRESS in text
    with serving(keys=()) as scene:
        exec(compile(text.replace(ADDRESS, repr(scene.data)), "README.md", "exec"), {})
        items = scene.client().recommend(history=[3, 17], n=5, exclude_history=True).items
    shown = [line.rsplit(" ", 1) for line in capsys.readouterr().out.strip().splitlines()[-5:]]
    assert [(title, float(probability)) for title, probability in shown] == [
        (item.title, item.probability) for item in items
    ]
    assert {title for title, _ in shown} <= set(TITLES) - {TITLES[3], TITLES[17]}
