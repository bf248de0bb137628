"""A slice of each fuzz run; whole ones are started by hand, as their modules say."""

from __future__ import annotations

import pytest

from tests.fuzz import overrides, requests


@pytest.mark.parametrize("seed", range(4))
def test_a_mutated_override_is_refused_or_means_what_it_says(seed: int) -> None:
    found = overrides.fuzz(60, seed)
    assert {case.outcome for case in found} == {"refused", "accepted"}, [
        case for case in found if case.outcome not in ("refused", "accepted")
    ]


def test_the_judge_sees_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verb that ends with a traceback, one that refuses without a reason, and a value that nobody wrote."""
    for code, said, outcome in [(1, "Traceback", "fault"), (3, "", "fault"), (2, "tawin-nemo: no", "unclear")]:
        monkeypatch.setattr(overrides, "run", lambda _, answer=(code, said): answer)
        assert overrides.judged(["rl.lr=1e-5"]).outcome == outcome
    assert not overrides.plain("trainer.threads", "1:30", 90.5)
    assert not overrides.plain("name", "a\x1b[31m", "a\x1b[31m")
    assert overrides.plain("rl.lr", "1e-5", 1e-5)


@pytest.mark.full
@pytest.mark.distributed
def test_mutated_requests_are_answered_by_two_ranks() -> None:
    asked, problems = requests.fuzz(600, 1, 2)
    assert (problems, [case for case in asked if case.problem]) == ([], [])
