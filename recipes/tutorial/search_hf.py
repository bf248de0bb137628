"""Constrained search on a Hugging Face model: python recipes/tutorial/search_hf.py FOLDER

FOLDER holds a Qwen2.5 or Llama model and its tokenizer; `bash recipes/pretrained.sh` makes one without the hub.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from tawin_nemo.tools.hf_search import CatalogSearch

titles = ["Steel ruler 30 cm", "Steel ruler 15 cm", "Digital caliper", "Nitrile gloves", "Tape measure"]
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32")
search = CatalogSearch(model, tokenizer, titles)
prompts = [tokenizer(f"Bought: {item}. Next: ")["input_ids"] for item in ("Tape measure", "Nitrile gloves")]
best = search.beams(prompts, width=3)
for items, scores in zip(best.items_BW.tolist(), best.scores_BW.tolist(), strict=True):
    print(", ".join(f"{titles[item]} ({score:.3f})" for item, score in zip(items, scores, strict=True)))
