"""TRL's own GRPO loss as a further row of the update benchmark, where the package is installed.

``tests/run.sh`` installs the version that the tests use; without TRL the row is left out.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import Qwen2ForCausalLM

from tests.benchmarks.baselines import repeated_batches
from tests.benchmarks.setting import Titles

if TYPE_CHECKING:
    from tests.benchmarks.update import Group


def update_side(model: Qwen2ForCausalLM, titles: Titles, group: Group, size: int) -> dict[str, Callable[[], Any]]:
    """``GRPOTrainer._compute_loss`` and backward over the group, ``size`` rows at once; empty without TRL."""
    if importlib.util.find_spec("trl") is None:
        return {}
    trainer = _trainer(model, titles)
    batches = repeated_batches(group.prompts, group.paths, group.prompt_A, size)
    trainer.current_gradient_accumulation_steps = len(batches)
    advantage_A = group.advantage_BG.flatten()

    def run() -> None:
        model.zero_grad(set_to_none=False)
        for batch in batches:
            loss = trainer._compute_loss(model, {
                "prompt_ids": batch.ids_RT[:, : -batch.keep], "prompt_mask": batch.mask_RT[:, : -batch.keep],
                "completion_ids": batch.ids_RT[:, -batch.keep :], "completion_mask": batch.completion_RK,
                "advantages": advantage_A[batch.row_R],
            })  # fmt: skip
            loss.backward()

    return {"TRL's own loss, with entropies": run}


def _trainer(model: Qwen2ForCausalLM, titles: Titles) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = titles.tokenizer.fast
    tokenizer.pad_token = tokenizer.eos_token
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, beta=0.0, loss_type="grpo",
            report_to=[], per_device_train_batch_size=16, num_generations=16, disable_tqdm=True,
        )  # fmt: skip
        return GRPOTrainer(
            model=model, args=config, reward_funcs=lambda completions, **_: [0.0] * len(completions),
            train_dataset=Dataset.from_list([{"prompt": "x"}]), processing_class=tokenizer,
        )  # fmt: skip
