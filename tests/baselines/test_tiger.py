"""TIGER's codes, tree and search against slow oracles."""

import pytest
import torch

from tawin_nemo.baselines.protocol import left_padded
from tawin_nemo.baselines.tiger import END, MAX_CODE_AGE, PAD, CodeBook, CodeTree, Tiger
from tawin_nemo.types import NO_ITEM, TokenRows
from tests.baselines.patterns import ITEMS, PATHS, histories, model_of


@pytest.fixture(scope="module")
def model() -> Tiger:
    model = model_of("tiger", seed=3).eval()
    with torch.no_grad():  # fresh weights make nearly uniform predictions
        for weight in model.parameters():
            weight.mul_(2.0 if weight.dim() == 1 else 15.0)
    return model


def rows_of(paths: TokenRows) -> list[list[int]]:
    return [row.tolist() for row in CodeBook.from_paths(paths).rows]


@torch.no_grad()
def slow_logprobs(model: Tiger, history: list[int], rows: list[list[int]]) -> dict[tuple[int, ...], float]:
    """Log-probability of every row, each choice normalised over what the catalog admits there."""
    tokens = torch.tensor([[code for item in history for code in rows[item][:-1]] + [END]])
    ago = torch.tensor([list(range(tokens.shape[1]))[::-1]])
    embedded = model.t5.shared.weight[tokens] + model.place.weight[ago]
    result = {}
    for row in rows:
        total, read = 0.0, [PAD]
        for place, token in enumerate(row):
            logits_V = model.t5(inputs_embeds=embedded, decoder_input_ids=torch.tensor([read])).logits[0, -1]
            admitted = sorted({other[place] for other in rows if other[:place] == row[:place]})
            total += float(logits_V[token] - logits_V[admitted].logsumexp(0))
            read.append(token)
        result[tuple(row)] = total
    return result


def test_levels_have_their_own_codes():
    rows = rows_of(TokenRows.from_lists([[5, 5, 1], [5, 7, 1], [6, 5, 5, 1]]))
    assert rows == [[2, 4, END], [2, 5, END], [3, 4, 6, END]]
    assert CodeBook.from_paths(PATHS).vocab == 2 + 3 + 4 + 1


def test_the_tree_admits_what_the_rows_have():
    rows = CodeBook.from_paths(PATHS).rows
    tree = CodeTree.from_rows(rows)
    expected: dict[tuple[int, ...], set[int]] = {}
    for row in rows:
        for place in range(len(row)):
            expected.setdefault(tuple(row[:place]), set()).add(int(row[place]))
    waiting, finals = [((), 0)], []
    while waiting:
        prefix, state = waiting.pop()
        tokens, states, exists = (part[0] for part in tree.children(torch.tensor([state])))
        if tree.item_N[state] != NO_ITEM:
            finals.append(int(tree.item_N[state]))
            assert tuple(rows[finals[-1]][: len(prefix)]) == prefix
            assert states[exists].tolist() == [state]
            continue
        assert set(tokens[exists].tolist()) == expected[prefix]
        waiting += [((*prefix, t), s) for t, s in zip(tokens[exists].tolist(), states[exists].tolist(), strict=True)]
    assert sorted(finals) == list(range(ITEMS))


def test_a_search_as_wide_as_the_catalog_is_exact(model):
    rows = rows_of(PATHS)
    histories_B = [[3, 7, 0], [11], [2, 2, 5, 9, 1]]
    scores_BI = model.scores(left_padded(TokenRows.from_lists(histories_B)), ITEMS)
    for history, scores_I in zip(histories_B, scores_BI, strict=True):
        expected = slow_logprobs(model, history, rows)
        torch.testing.assert_close(scores_I, torch.tensor([expected[tuple(row)] for row in rows]), rtol=1e-4, atol=1e-4)
        assert scores_I.exp().sum().item() == pytest.approx(1.0, abs=1e-4)
        assert scores_I.max() - scores_I.min() > 0.1


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_a_narrow_search_keeps_the_best_prefixes_of_each_length(model, width):
    """Oracle: prefixes level by level; a prefix that only one item has competes with that item's final score."""
    rows, history = rows_of(PATHS), [4, 10, 6]
    total = slow_logprobs(model, history, rows)
    beams: list[tuple[int, ...]] = [()]

    def prefix_score(prefix: tuple[int, ...]) -> float:
        below = [value for row, value in total.items() if row[: len(prefix)] == prefix]
        return torch.tensor(below).logsumexp(0).item()

    for place in range(max(len(row) for row in rows)):
        longer = set()
        for beam in beams:
            below = [tuple(row) for row in rows if tuple(row[: len(beam)]) == beam]
            longer |= {beam} if len(below) == 1 else {row[: place + 1] for row in below}
        beams = sorted(longer, key=prefix_score, reverse=True)[:width]
    expected = {rows.index(list(row)) for beam in beams for row in total if row[: len(beam)] == beam}
    scores_I = model.scores(torch.tensor([history]), width)[0]
    assert set((scores_I > float("-inf")).nonzero().squeeze(1).tolist()) == expected
    assert len(expected) == width


def test_items_on_one_path_share_score_and_carrier():
    paths = TokenRows.from_lists([[2, 3, 1], [2, 4, 1], [2, 3, 1], [5, 1]])
    torch.manual_seed(0)
    model = Tiger(paths, hidden=8, layers=1, heads=2, dropout=0.0).eval()
    assert model.representative_I.tolist() == [0, 1, 0, 3]
    scores_I = model.scores(torch.tensor([[1, 3]]))[0]
    assert scores_I[0] == scores_I[2]
    assert scores_I[[0, 1, 3]].exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_the_encoder_reads_the_codes_without_gaps_and_end(model):
    rows = rows_of(PATHS)
    tokens_BS, mask_BS = model.encoder_input(torch.tensor([[NO_ITEM, 0, 1], [NO_ITEM, NO_ITEM, 1]]))
    first, second = [*rows[0][:-1], *rows[1][:-1], END], [*rows[1][:-1], END]
    assert tokens_BS.tolist() == [first, second + [PAD] * (len(first) - len(second))]
    assert mask_BS.tolist() == [[1] * len(first), [1] * len(second) + [0] * (len(first) - len(second))]


def test_older_codes_share_a_place_when_the_history_is_long(model):
    history_BL = torch.arange(60)[None] % ITEMS
    tokens_BS, mask_BS = model.encoder_input(history_BL)
    assert tokens_BS.shape[1] > MAX_CODE_AGE
    assert model.read(tokens_BS, mask_BS).isfinite().all()


def test_the_loss_is_t5s_own(model):
    rows = rows_of(PATHS)
    history_BL, target_B = left_padded(histories(5, seed=8)), torch.tensor([0, 1, 2, 3, 4])
    loss_B = model.loss(history_BL, target_B)
    for row, target in enumerate(target_B.tolist()):
        tokens_BS, mask_BS = model.encoder_input(history_BL[row : row + 1])
        labels = torch.tensor([rows[target]])
        ago = torch.arange(tokens_BS.shape[1]).flip(0)
        embedded = model.t5.shared.weight[tokens_BS] + model.place.weight[ago]
        own = model.t5(inputs_embeds=embedded, attention_mask=mask_BS, labels=labels).loss
        assert loss_B[row].item() == pytest.approx(own.item() * len(rows[target]), rel=1e-4)


def test_the_loss_over_admissible_codes_is_what_the_search_ranks_by(model):
    rows, history = rows_of(PATHS), [4, 10, 6]
    expected = slow_logprobs(model, history, rows)
    over_tree = model_of("tiger", seed=3, loss="trie").eval()
    over_tree.load_state_dict(model.state_dict())
    loss_B = over_tree.loss(torch.tensor([history] * ITEMS), torch.arange(ITEMS))
    torch.testing.assert_close(loss_B, -torch.tensor([expected[tuple(row)] for row in rows]), rtol=1e-4, atol=1e-4)
    (-loss_B).exp().sum().backward()  # a constant, 1: no direction changes the sum of all probabilities
    assert all(weight.grad.abs().max() < 1e-5 for weight in over_tree.parameters())


def test_sampled_negatives_are_refused(model):
    with pytest.raises(ValueError, match="without negatives"):
        model.loss(torch.tensor([[1]]), torch.tensor([2]), torch.tensor([[3]]))
