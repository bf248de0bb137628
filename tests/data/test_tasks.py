"""Alignment tasks: how they are worded, which rows they have, what is held out."""

import numpy as np
import pytest

from tawin_nemo.config.schema import AlignConfig, CatalogConfig, DataConfig, ModelConfig
from tawin_nemo.data.interactions import Split
from tawin_nemo.data.prompts import ANSWER_MARK, ITEM_MARK, Template
from tawin_nemo.data.tasks import (
    CODES,
    DESCRIPTION,
    INTENTION,
    TASKS,
    TITLE,
    TaskEncoder,
    active_tasks,
    held_out_items,
    items_as_split,
)
from tawin_nemo.data.tokenizer import EOS, build_tokenizer
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import ConfigError

CODE_LISTS = [["<a_0>", f"<b_{item}>"] for item in range(5)]
TEXTS = {
    CODES: ["".join(codes) for codes in CODE_LISTS],
    TITLE: ["steel bolt", "washer", "garden hose", "nut", "tape"],
    DESCRIPTION: ["holds things", "", "green and long", "", "sticks"],
    INTENTION: ["something to hold", "", "", "", ""],
}
HISTORIES = [[0, 2], [1, 3, 4], [2]]
TARGETS = [1, 0, 4]
TASK = {task.name: task for task in TASKS}


def wording(template: str) -> TaskEncoder:
    data = DataConfig(tokenizer="bpe", template=template, bpe_vocab_size=320, max_history=4)
    markers = [task.marker for task in TASKS] if template == "compact" else []
    tokenizer = build_tokenizer(data, CatalogConfig(kind="sid"), ModelConfig(), TEXTS[TITLE], CODE_LISTS, markers)
    return TaskEncoder(TEXTS, tokenizer, Template(template, "sid"), data)


def histories() -> Split:
    rows = np.arange(len(HISTORIES))
    return Split(rows, TokenRows.from_lists(HISTORIES), np.array(TARGETS), rows)


@pytest.mark.parametrize("template", ["compact", "alpaca"])
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_questions_and_answers_are_worded_by_the_table(task, template):
    told, asked = wording(template), histories() if task.of_history else items_as_split(np.arange(5))
    rows = told.rows(task, asked)
    quote = (
        {CODES: "", TITLE: '"', DESCRIPTION: '"', INTENTION: '"'} if template == "alpaca" else dict.fromkeys(TEXTS, "")
    )
    between = "\n" if template == "alpaca" else "" if task.given == CODES else ITEM_MARK
    seen = []
    for row in range(len(asked)):
        items, target = asked.history[row].tolist(), int(asked.target_N[row])
        given, wanted = [TEXTS[task.given][item] for item in items], TEXTS[task.wanted][target]
        if not (all(given) and wanted):
            continue  # nothing to ask or to answer
        place = len(seen)
        seen.append(target)
        question = told.tokenizer.decode(rows.samples.prompts[place])
        body = between.join(f"{quote[task.given]}{text}{quote[task.given]}" for text in given)
        if template == "compact":
            assert question == f"{task.marker}{body}{ANSWER_MARK}"
        else:
            assert f"### Instruction:\n{task.instruction}\n\n### Input:\n{body}\n\n### Response:\n" in question
        answer = told.tokenizer.decode(rows.answers[place])
        assert answer == f"{quote[task.wanted]}{wanted}{quote[task.wanted]}{EOS}"
    assert rows.samples.target_N.tolist() == seen
    assert len(seen) >= 1


def test_markers_are_single_tokens_and_differ():
    told = wording("compact")
    encoded = told.tokenizer.encode_batch([task.marker for task in TASKS])
    assert encoded.lengths.tolist() == [1] * len(TASKS)
    assert len(set(encoded.flat.tolist())) == len(TASKS)


def test_a_task_without_a_single_text_is_refused():
    told = wording("compact")
    silent = TaskEncoder({**TEXTS, DESCRIPTION: [""] * 5}, told.tokenizer, told.template, told.data)
    with pytest.raises(ConfigError, match=r"align\.description_to_sid has no rows.*description.*set align"):
        silent.rows(TASK["description_to_sid"], items_as_split(np.arange(5)))


def test_tasks_are_those_with_a_weight():
    assert active_tasks(AlignConfig()) == ()
    chosen = active_tasks(AlignConfig(sid_to_title=0.5, titles_to_sid=2.0))
    assert [task.name for task in chosen] == ["sid_to_title", "titles_to_sid"]
    keys = {name for name in AlignConfig.__dataclass_fields__ if "_to_" in name}
    assert {task.name for task in TASKS} == keys


def test_held_out_items_are_the_rest_and_follow_the_seed():
    learnt, held = held_out_items(100, 0.07, seed=3)
    assert len(held) == 7
    assert sorted([*learnt, *held]) == list(range(100))
    np.testing.assert_array_equal(held_out_items(100, 0.07, seed=3)[1], held)
    assert not np.array_equal(held_out_items(100, 0.07, seed=4)[1], held)
