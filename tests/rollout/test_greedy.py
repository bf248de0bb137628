"""Free decoding: greedy as transformers' ``generate`` without sampling, beams as the enumeration of all answers."""

import itertools

import pytest
import torch
from hf_lm import HfLM, random_qwen2
from sequence_lm import TableLM

from tawin_nemo.rollout.greedy import free_beam_search, greedy_decode
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import DataError

VOCAB, EOS = 40, 1


@pytest.mark.parametrize("seed", range(4))
def test_equals_generate(seed):
    model = random_qwen2(VOCAB, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in (3, 1, 8, 5, 5)]
    found = greedy_decode(HfLM(model), TokenRows.from_lists(prompts), max_tokens=12, eos=EOS)
    lengths = set()
    for row, prompt in enumerate(prompts):
        output = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=12, do_sample=False,
            eos_token_id=EOS, pad_token_id=EOS,
        )  # fmt: skip
        expected = output[0, len(prompt) :].tolist()
        expected = expected[: expected.index(EOS)] if EOS in expected else expected
        assert found[row].tolist() == expected
        lengths.add(len(expected))
    assert max(lengths) > 0


def test_rows_that_have_ended_are_not_run_again():
    """With a table of scores: every row ends where its own best token is EOS, at the latest after the limit."""
    lm = TableLM(12, seed=3, impossible=False)
    prompts = [[5], [6, 7], [8], [9], [10, 11], [4]]
    found = greedy_decode(lm, TokenRows.from_lists(prompts), max_tokens=9, eos=EOS)
    lengths = set()
    for row, prompt in enumerate(prompts):
        sequence, expected = list(prompt), []
        for _ in range(9):
            values = lm.path_logprobs(sequence, list(range(12)), "vocab")
            token = values.index(max(values))
            if token == EOS:
                break
            expected.append(token)
            sequence.append(token)
        assert found[row].tolist() == expected
        lengths.add(len(expected))
    assert len(lengths) > 1
    assert len(lm.ran) == sum(min(len(found[row]), 8) for row in range(len(prompts)))


def test_positions_limit_the_output_and_full_prompts_are_refused():
    lm = TableLM(12, max_positions=6, seed=3, impossible=False)
    assert len(greedy_decode(lm, TokenRows.from_lists([[5, 5, 5]]), max_tokens=9, eos=99)[0]) == 3
    with pytest.raises(DataError, match=r"1 to 5 tokens .* data.max_prompt_tokens"):
        greedy_decode(lm, TokenRows.from_lists([[5] * 6]), max_tokens=9, eos=99)
    assert len(greedy_decode(lm, TokenRows.from_lists([]), max_tokens=9, eos=99)) == 0


def log_probability(model, prompt: list[int], answer: list[int]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum())


@pytest.mark.parametrize("seed", range(3))
def test_wide_beams_find_every_answer_in_order(seed):
    """Five tokens, at most three of them: all answers that end, and all that were cut off, by their probability."""
    vocab, steps, model = 5, 3, random_qwen2(5, seed=seed)
    others = [token for token in range(vocab) if token != EOS]
    answers = [[*start, EOS] for n in range(steps) for start in itertools.product(others, repeat=n)]
    answers += [list(cut) for cut in itertools.product(others, repeat=steps)]
    prompts = [[2, 3, 4], [0]]
    found = free_beam_search(HfLM(model), TokenRows.from_lists(prompts), width=len(answers), max_tokens=steps, eos=EOS)
    for prompt, beams in zip(prompts, found, strict=True):
        assert beams == sorted(answers, key=lambda answer: -log_probability(model, prompt, answer))


@pytest.mark.parametrize("seed", range(3))
def test_one_beam_is_greedy_and_more_are_sorted_and_differ(seed):
    model = random_qwen2(VOCAB, seed=seed)
    prompts = [[4, 5, 6], [7], [9, 2]]
    greedy = greedy_decode(HfLM(model), TokenRows.from_lists(prompts), max_tokens=8, eos=EOS)
    one = free_beam_search(HfLM(model), TokenRows.from_lists(prompts), width=1, max_tokens=8, eos=EOS)
    assert [[token for token in beams[0] if token != EOS] for beams in one] == [
        greedy[row].tolist() for row in range(3)
    ]
    many = free_beam_search(HfLM(model), TokenRows.from_lists(prompts), width=4, max_tokens=8, eos=EOS)
    for prompt, beams in zip(prompts, many, strict=True):
        scores = [log_probability(model, prompt, beam) for beam in beams]
        assert len({tuple(beam) for beam in beams}) == 4
        assert scores == sorted(scores, reverse=True)
        assert all(EOS not in beam[:-1] and (beam[-1] == EOS or len(beam) == 8) for beam in beams)
