"""A reward of one's own: 1 for the target, 0.1 for other items whose title begins with the same word.

tawin-nemo train --recipe recipes/quickstart.yaml rl.reward=recipes.tutorial.own_reward:SameWord
"""

import torch


class SameWord:
    def __init__(self, world):
        words = [title.split()[0].lower() for title in world.catalog.titles]
        number = {word: n for n, word in enumerate(sorted(set(words)))}
        self.word_I = torch.tensor([number[word] for word in words])

    def __call__(self, rollout):
        wanted_B = self.word_I[rollout.prompts.target_B]
        same_BG = self.word_I[rollout.items_BG.clamp(min=0)] == wanted_B[:, None]
        return torch.where(rollout.is_target_BG, 1.0, 0.1 * same_BG)
