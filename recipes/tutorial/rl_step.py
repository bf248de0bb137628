"""RL steps with TAWin in 40 lines, on a Hugging Face model: python recipes/tutorial/rl_step.py FOLDER

Search, reward, advantages, weights, loss, update: what train/rl.py does at scale, on packed trees and many processes.
"""

import sys

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from tawin_nemo.maths.advantages import group_advantages
from tawin_nemo.maths.grpo import grpo_loss
from tawin_nemo.maths.policy_loss import Counts, Objective, PolicyTerms
from tawin_nemo.maths.tawin import tawin_weights
from tawin_nemo.tools.hf_search import CatalogSearch

titles = ["Steel ruler 30 cm", "Steel ruler 15 cm", "Digital caliper", "Nitrile gloves", "Tape measure"]
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32").eval()  # no dropout in RL
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
search = CatalogSearch(model, tokenizer, titles)
prompts = [tokenizer(f"Bought: {item}. Next: ")["input_ids"] for item in ("Tape measure", "Nitrile gloves")]
target_B = torch.tensor([2, 4])
for step in range(8):
    search.load(model)
    found = search.beams(prompts, width=4)
    hit_BG = found.items_BW == target_B[:, None]
    adv_BG = group_advantages(hit_BG.float())
    omega_BG = tawin_weights(found.scores_BW, hit_BG, k=2, tau=0.1, anchor=0)
    rows, starts = [], []
    for prompt, tokens_WT, lengths_W in zip(prompts, found.tokens_BWT, found.lengths_BW, strict=True):
        rows += [torch.tensor([*prompt, *path[:n].tolist()]) for path, n in zip(tokens_WT, lengths_W, strict=True)]
        starts += [len(prompt)] * len(lengths_W)
    ids_MS = pad_sequence(rows, batch_first=True)
    logp_MS = model(ids_MS).logits[:, :-1].log_softmax(-1).gather(-1, ids_MS[:, 1:, None]).squeeze(-1)
    place = torch.arange(1, ids_MS.shape[1])
    ends_M = torch.tensor([len(row) for row in rows])
    answer_MS = (place >= torch.tensor(starts)[:, None]) & (place < ends_M[:, None])
    logp_N, candidate_N = logp_MS[answer_MS], answer_MS.nonzero()[:, 0]
    terms = PolicyTerms(candidate_N, logp_N.detach(), None, adv_BG.flatten(), omega_BG.flatten(),
                        found.lengths_BW.flatten())  # fmt: skip
    loss, _ = grpo_loss(logp_N, terms, Counts(len(rows), len(logp_N)), Objective())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(
        f"step {step}: the targets' ranks are {[row.index(True) if True in row else None for row in hit_BG.tolist()]}"
    )
