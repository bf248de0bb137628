"""TRL's GRPOTrainer with constrained search as its generation: python recipes/tutorial/trl_grpo.py FOLDER

Needs `pip install trl`. Every completion is an item of the catalog, without a prefix function.
"""

import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from tawin_nemo.tools.hf_search import CatalogSearch
from tawin_nemo.tools.trl import CatalogRollouts

titles = ["Steel ruler 30 cm", "Steel ruler 15 cm", "Digital caliper", "Nitrile gloves", "Tape measure"]
rows = [
    {"prompt": "Bought: Tape measure. Next: ", "target": 2},
    {"prompt": "Bought: Nitrile gloves. Next: ", "target": 4},
]
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32")


def reward(item, target, **_):
    """``item``: the number of each completion's item, from CatalogRollouts."""
    return [float(found == wanted) for found, wanted in zip(item, target, strict=True)]


config = GRPOConfig(
    output_dir="runs/trl", per_device_train_batch_size=8, num_generations=4, max_steps=5, learning_rate=1e-3, beta=0.0,
    logging_steps=1, report_to=[], save_strategy="no", bf16=False, gradient_checkpointing=False,
)  # fmt: skip
trainer = GRPOTrainer(
    model=model, args=config, reward_funcs=reward, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
    rollout_func=CatalogRollouts(CatalogSearch(model, tokenizer, titles)),
)  # fmt: skip
trainer.train()
for line in trainer.state.log_history:
    if "reward" in line:
        print(f"step {line['step']}: reward {line['reward']:.3f}")
