"""TokenRows against lists."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tawin_nemo.types import TokenRows

rows_of_tokens = st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=6)


@given(rows_of_tokens, st.data())
def test_take_and_padding_equal_lists(lists, data):
    rows = TokenRows.from_lists(lists)
    picked = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=6)) if lists else []
    taken = rows.take(np.array(picked, dtype=np.int64))
    assert [taken[i].tolist() for i in range(len(taken))] == [lists[i] for i in picked]
    tokens, lengths = rows.padded(pad=-1)
    assert lengths.tolist() == [len(row) for row in lists]
    assert [row[:n].tolist() for row, n in zip(tokens, lengths.tolist(), strict=True)] == lists
    assert all((row[n:] == -1).all() for row, n in zip(tokens, lengths.tolist(), strict=True))


def test_offsets_must_cover_the_tokens():
    with pytest.raises(ValueError, match="offsets"):
        TokenRows(np.arange(3), np.array([0, 2]))
