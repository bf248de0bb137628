"""The model card of an export: what it is, how to use it, what its files are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tawin_nemo.run.world import World

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- recommendation
- generative-recommendation
- constrained-decoding
- tawin_nemo
---

# {name}

A language model that recommends items of one catalog: it reads the items that somebody had, oldest first, and writes
the next one. Made with tawin_nemo {version}.

| property | value |
|---|---|
| architecture | {architecture}, {layers} layers, hidden size {hidden}, vocabulary {vocab:,} |
| catalog | {items:,} items on {paths:,} token paths, written as {items_as}, at most {longest} tokens each |
| prompt | template `{template}`, the newest {max_history} items, at most {max_prompt} tokens |
| end of an answer | `{end}` |
| beams | score space `{space}`, length penalty {penalty} |

## Use

```python
import json, sys

from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, folder := "THIS_FOLDER")
from tawin_trie import TrieLogitsProcessor

settings = json.load(open(f"{{folder}}/tawin.json"))
items = [json.loads(line) for line in open(f"{{folder}}/catalog.jsonl")]
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
text = settings["prompt"]
history = [text["item"].format({written}) for item in (items[0], items[1])]
inputs = tokenizer(text["head"] + text["separator"].join(history) + text["tail"], return_tensors="pt")
length = inputs["input_ids"].shape[1]
processor = TrieLogitsProcessor.load(folder, prompt_lengths=length, score_space=settings["score_space"])
for row in model.generate(**inputs, **settings["generate"], logits_processor=[processor]):
    print([items[number]["title"] for number in processor.trie.items(row[length:].tolist())])
```

`tawin-nemo generate checkpoint=THIS_FOLDER generate.history=ID,ID` gives the same items, many times faster.
`tawin-nemo serve checkpoint=THIS_FOLDER` serves them.

## Files

| file | content |
|---|---|
| `config.json`, `generation_config.json`, `*.safetensors`, tokenizer files | the model, as transformers reads it |
| `catalog.parquet` | item, external_id, title, codes, token_ids (end token last) |
| `catalog.jsonl` | line i is item i: item_id (external id), token_ids (without the end token), codes, title |
| `trie.safetensors` | all token paths as a tree; the layout is in the docstring of `tawin_trie.py` |
| `tawin_trie.py` | keeps `generate` inside the catalog; also for vLLM and SGLang |
| `tawin.json`, `recipe.yaml` | prompt template, history cut, arguments of `generate`, versions; recipe keys |

The catalog is the one of training. Without `tawin_trie.py` the model can write texts that are no item.
"""


def model_card(world: World, settings: dict[str, Any]) -> str:
    """The text of README.md. ``settings`` is the content of tawin.json."""
    shape, catalog, prompt = world.shape, settings["catalog"], settings["prompt"]
    is_sid = prompt["items_as"] == "sid"
    return _CARD.format(
        name=settings["name"], version=settings["versions"]["tawin_nemo"], architecture=shape.family,
        layers=shape.layers, hidden=shape.hidden, vocab=shape.vocab, items=catalog["items"], paths=catalog["paths"],
        items_as="semantic IDs" if is_sid else "titles", longest=catalog["longest_path"],
        template=prompt["template"], max_history=prompt["max_history"], max_prompt=prompt["max_prompt_tokens"],
        end=settings["end_token"]["text"], space=settings["score_space"],
        penalty=settings["generate"]["length_penalty"],
        written='"".join(item["codes"])' if is_sid else 'item["title"]',
    )  # fmt: skip
