"""A process that uses the Python interface on a finished run; prints what it saw as JSON.

python tests/api/recommender_worker.py RUN_DIR EXPORT_DIR
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from tawin_nemo import api
from tawin_nemo.util.errors import ConfigError


def refused(call: Any) -> str:
    """What a call is refused with."""
    try:
        call()
    except ConfigError as error:
        return str(error)
    raise AssertionError("the call was accepted")


def main(run_dir: str, export: str) -> dict[str, Any]:
    found: dict[str, Any] = {"evaluated": api.evaluate(run_dir)}
    histories = [[3, 17], ["#5"]]
    with api.Recommender.from_run(run_dir) as recommender:
        first = recommender.recommend(histories, n=4)
        found["recommended"] = [[asdict(item) for item in items] for items in first]
        names = [
            [recommender.world.catalog.external_ids[int(str(item).strip("#"))] for item in row] for row in histories
        ]
        assert recommender.recommend(names, n=4) == first
        seen = {item.item for item in first[0]}
        without = recommender.recommend([[*histories[0], first[0][0].item]], n=4, exclude_history=True)[0]
        assert first[0][0].item in seen
        assert first[0][0].item not in {item.item for item in without}
        found["second"] = refused(lambda: api.Recommender.from_run(run_dir))
        found["evaluating"] = refused(lambda: api.evaluate(run_dir))
        found["unknown"] = refused(lambda: recommender.recommend([["no such item"]]))
        found["none"] = refused(lambda: recommender.recommend(histories, n=0))
    found["closed"] = refused(lambda: recommender.recommend(histories))
    recommender.close()
    assert api.recommend(run_dir, histories, n=4) == first
    stage = f"{run_dir}/sft"
    assert api.recommend(stage, histories, n=4) != first
    found["stage"] = api.recipe_of(stage).checkpoint
    found["planned"] = api.train(api.recipe_of(run_dir), dry_run=True)
    if export:
        with api.Recommender.from_export(export) as recommender:
            exported = recommender.recommend(histories, n=4)
        assert [[item.item for item in items] for items in exported] == [
            [item.item for item in items] for items in first
        ]
    return found


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
