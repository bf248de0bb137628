"""The Python interface, and the interface of the generation server.

    from tawin_nemo import api

    recipe = api.load_recipe("recipes/quickstart.yaml", {"rl.max_steps": 5})
    summary = api.train(recipe)
    with api.Recommender.from_run(summary["run_dir"]) as recommender:
        print(recommender.recommend([["3", "17"]], n=5))

``load_recipe``, ``train``, ``evaluate``, ``recommend``, ``Recommender``, ``Recommendation`` and ``recipe_of`` are
documented in ``tawin_nemo.facade``, where they lie. They are imported when they are asked for, so that the server's
client, ``tawin_nemo.api.client``, needs none of the libraries that they use.

The server: ``client``: typed clients of both planes. ``schema``, ``control_schema``: requests and replies of the data
plane and of the control plane. ``arrays``: the binary body of rollout replies. ``secrets_files``: keys and tokens from
files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tawin_nemo.facade import Recommendation, Recommender, evaluate, load_recipe, recipe_of, recommend, train

__all__ = ["Recommendation", "Recommender", "evaluate", "load_recipe", "recipe_of", "recommend", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tawin_nemo import facade

    return getattr(facade, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
