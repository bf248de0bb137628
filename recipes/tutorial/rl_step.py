"""One RL step with TAWin in 40 lines, on a Hugging Face model: python recipes/tutorial/rl_step.py FOLDER

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


def rl_step(model, optimizer, search, prompts, target_B, group=4):
    search.load(model)  # the search has the weights of the last update
    found = search.beams(prompts, width=group)
    hit_BG = found.items_BW == target_B[:, None]  # the reward: 1 for the target
    adv_BG = group_advantages(hit_BG.float())
    omega_BG = tawin_weights(found.scores_BW, hit_BG, k=2, tau=0.1, anchor=0)
    rows = [
        torch.tensor([*prompt, *path[:length].tolist()])
        for prompt, paths, lengths in zip(prompts, found.tokens_BWT, found.lengths_BW, strict=True)
        for path, length in zip(paths, lengths, strict=True)
    ]
    ids_MS = pad_sequence(rows, batch_first=True)
    logp_MS = model(ids_MS).logits[:, :-1].log_softmax(-1).gather(-1, ids_MS[:, 1:, None]).squeeze(-1)
    place_S = torch.arange(1, ids_MS.shape[1])
    start_M = torch.tensor([len(prompt) for prompt in prompts for _ in range(group)])
    end_M = torch.tensor([len(row) for row in rows])
    answer_MS = (place_S >= start_M[:, None]) & (place_S < end_M[:, None])
    logp_N, candidate_N = logp_MS[answer_MS], answer_MS.nonzero()[:, 0]
    lengths_M = found.lengths_BW.flatten()
    terms = PolicyTerms(candidate_N, logp_N.detach(), None, adv_BG.flatten(), omega_BG.flatten(), lengths_M)
    loss, _ = grpo_loss(logp_N, terms, Counts(len(rows), len(logp_N)), Objective())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return [row.index(True) if True in row else None for row in hit_BG.tolist()]


titles = ["Steel ruler 30 cm", "Steel ruler 15 cm", "Digital caliper", "Nitrile gloves", "Tape measure"]
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32").eval()  # no dropout in RL
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
search = CatalogSearch(model, tokenizer, titles)
prompts = [tokenizer(f"Bought: {item}. Next: ")["input_ids"] for item in ("Tape measure", "Nitrile gloves")]
for step in range(8):
    ranks = rl_step(model, optimizer, search, prompts, torch.tensor([2, 4]))
    print(f"step {step}: ranks of the targets {ranks}")
