"""Free greedy decoding equals transformers' ``generate`` without sampling, token for token."""

import pytest
import torch
from hf_lm import HfLM, random_qwen2
from sequence_lm import TableLM

from tawin_nemo.rollout.greedy import greedy_decode
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
