"""A published checkpoint through the whole chain: import, RL steps, export, and transformers computes the same."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tawin_nemo.config.schema import ModelConfig
from tawin_nemo.models.megatron.checkpoint import checkpoint
from tawin_nemo.models.megatron.hf.config import backbone_from_hf
from tawin_nemo.models.megatron.hf.files import HfWeights
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.model.head import full_logits_NV
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.run.stage import chosen_checkpoint
from tests.train.runs import metrics, run

#: float32 through 30 layers, another order of the sums.
LOGITS_ATOL = 2e-3
#: The same, over up to a dozen log-probs.
SCORE_ATOL = 2e-3
#: RL from the published weights. The target is put into each group, because they find none of themselves.
STEPS = (
    "data.dataset=prepared data.template=alpaca data.max_history=2 data.train_limit=16 data.eval_limit=2 "
    "sft.enabled=false rl.init=base rl.max_steps=2 rl.prompts_per_step=2 rl.group_size=4 rl.lr=1e-4 rl.beta=0 "
    "rl.ensure_target=replace_last rl.micro_batch_tokens=1024 reference.mode=off compare.sft_continued=false "
    "eval.beams=4 eval.ks=[1] eval.splits=[test] trainer.save_interval=2 trainer.keep_last=1 trainer.keep_best=false"
).split()


def check_answers(export: Path, theirs: PreTrainedModel, ours: dict[str, Any]) -> None:
    """transformers' constrained beams are those of ``generate``; without the constraint the model ends by itself."""
    spec = importlib.util.spec_from_file_location("exported_tawin_trie", export / "tawin_trie.py")
    assert spec is not None
    assert spec.loader is not None
    trie = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(trie)
    settings, tokenizer = json.loads((export / "tawin.json").read_text()), AutoTokenizer.from_pretrained(export)
    prompt = settings["prompt"]
    history = prompt["separator"].join(prompt["item"].format(title) for title in ours["history"])
    inputs = tokenizer(prompt["head"] + history + prompt["tail"], return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    output = theirs.generate(
        **inputs, **settings["generate"], return_dict_in_generate=True, output_scores=True,
        logits_processor=[trie.TrieLogitsProcessor.load(export, prompt_lengths=length)],
    )  # fmt: skip
    found = trie.TokenTrie.load(export / "trie.safetensors")
    items = [found.items(row[length:].tolist())[0] for row in output.sequences]
    assert items == [item["item"] for item in ours["items"]]
    scores = output.sequences_scores.tolist()
    assert scores == pytest.approx([item["score"] for item in ours["items"]], abs=SCORE_ATOL)
    plain = theirs.generate(**inputs, do_sample=False, max_new_tokens=300)[0, length:].tolist()
    assert plain[-1] == tokenizer.eos_token_id
    assert len(plain) < 300


@pytest.mark.slow
@torch.no_grad()
def test_import_two_rl_steps_export(smollm2: Path, small_dataset: Path, tmp_path: Path) -> None:
    overrides = (*STEPS, f"model.init={smollm2}", f"data.root={small_dataset}", f"run_dir={tmp_path / 'run'}")
    summary = run(*overrides)
    assert summary["invalid_rate"] == 0.0
    assert [line["grad_norm"] > 0 for line in metrics(tmp_path / "run", "rl")] == [True, True]
    export = tmp_path / "export"
    run(*overrides, f"checkpoint={tmp_path / 'run' / 'rl'}", f"convert.output={export}", verb="convert")

    name = "model.layers.29.mlp.down_proj.weight"
    before, after = (HfWeights(folder).read(name, 0, 0, 8) for folder in (smollm2, export))
    assert 0 < (after - before).abs().max() < 1e-2  # it has learned a little
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert tokenizer("M8 bolt 25")["input_ids"] == AutoTokenizer.from_pretrained(smollm2)("M8 bolt 25")["input_ids"]
    tokens_BT = torch.tensor([tokenizer("The customer will buy a steel ruler of 30 cm")["input_ids"]])
    theirs, loading = AutoModelForCausalLM.from_pretrained(export, output_loading_info=True)
    assert not loading["missing_keys"]
    expected_TV = theirs.eval()(tokens_BT).logits[0]
    asked = ("generate.history=0,1", "generate.n=4")
    ours = run(*overrides, f"checkpoint={tmp_path / 'run' / 'rl'}", *asked, verb="generate")["recommendations"][0]
    check_answers(export, theirs, ours)
    del theirs  # one copy of the weights at a time
    again = run(f"checkpoint={export}", f"run_dir={tmp_path / 'again'}", *asked, verb="generate")["recommendations"][0]
    assert again == ours  # the export has all that the run had
    assert (export / "chat_template.jinja").read_text() == (smollm2 / "chat_template.jinja").read_text()

    runtime.initialize(ModelConfig(), seed=0)
    shape = replace(backbone_from_hf(smollm2), vocab=backbone_from_hf(export).vocab)
    model = build_model(shape, ModelConfig(), seed=0, to_be_loaded=True)
    checkpoint.load_checkpoint(chosen_checkpoint(tmp_path / "run" / "rl"), model=model)
    logits_TV = full_logits_NV(model, model.eval()(tokens_BT, None, None)[:, 0])
    torch.testing.assert_close(logits_TV, expected_TV, atol=LOGITS_ATOL, rtol=0)
