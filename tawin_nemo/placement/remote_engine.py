"""Searching on ranks that do nothing else (``rollout.placement: separate``), as training sees it.

Every training rank makes the same calls with the same arguments; the first one sends them to the rollout ranks, which
run ``rollout_ranks.serve``. The classes above ``RemoteEngine`` are all that can be asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.models.gpt import GPTModel

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.config.backbones import Backbone, FlopCount
from tawin_nemo.config.schema import Recipe
from tawin_nemo.models.megatron.model.build import check_rollout_model
from tawin_nemo.models.megatron.model.reshard import Refit
from tawin_nemo.models.megatron.parallel import disaggregated, runtime
from tawin_nemo.types import Candidates, DataParallel, PromptBatch, Rollout, TokenRows
from tawin_nemo.util.errors import TawinError
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)


@dataclass(frozen=True)
class Build:
    """Make a model and an engine."""

    recipe: Recipe
    shape: Backbone
    catalog: Catalog


@dataclass(frozen=True)
class ReceiveWeights:
    """Take part in resharding."""


@dataclass(frozen=True)
class CheckEqual:
    """Take part in ``Refit.check_equal``."""


@dataclass(frozen=True)
class WeightsAre:
    """The weights that were received are of this version."""

    version: int


@dataclass(frozen=True)
class Generate:
    """Answered by ``Found``."""

    prompts: PromptBatch
    options: dict[str, Any]  # the keywords of Engine.generate


@dataclass(frozen=True)
class Search:
    """Answered by ``Found``."""

    prompts: TokenRows
    width: int
    token_budget: int | None


@dataclass(frozen=True)
class Found:
    value: Any  # Rollout or Candidates, on the CPU
    work: FlopCount  # of all replicas


@dataclass(frozen=True)
class Stop:
    """Nothing more will be asked."""


class RemoteEngine:
    """An ``Engine`` whose model lies on the rollout ranks.

    Prompts are divided there: seen from training there is one replica, which ``dp`` says, and every training rank
    hands over the same prompts and gets all results. ``begin`` and ``finish`` are the halves of ``generate``, between
    which training goes on. The weights are undefined until the first ``receive_weights``. Raises ConfigError when the
    model's shape cannot be divided as ``rollout.*`` says.
    """

    def __init__(self, recipe: Recipe, model: GPTModel, shape: Backbone, catalog: Catalog) -> None:
        check_rollout_model(shape, recipe.model, *recipe.rollout_layout)
        self.dp = DataParallel()
        self._line, self._version, self._work = disaggregated.line(), 0, FlopCount()
        self._line.holder = self  # the rollout ranks hold one model at a time
        self._ask(Build(recipe, shape, catalog))
        self._refit = Refit(model, None)
        with disaggregated.whole_job():
            #: What the rollout ranks say of themselves, for layout.json.
            self.places = [place for place in runtime.gather_objects(None) if place is not None]
        tp, pp = recipe.rollout_layout
        self.spread = len(self.places) // (tp * pp)
        log.info("rollouts and evaluation on ranks of their own: TP %d x PP %d x DP %d", tp, pp, self.spread)

    @property
    def weight_version(self) -> int:
        return self._version

    @weight_version.setter
    def weight_version(self, version: int) -> None:
        self._ask(WeightsAre(version))
        self._version = version

    def receive_weights(self) -> None:
        self._ask(ReceiveWeights())
        self._refit()

    def check_equal(self) -> None:
        """As ``Refit.check_equal``."""
        self._ask(CheckEqual())
        self._refit.check_equal()

    def search(self, prompts: TokenRows, width: int, *, token_budget: int | None = None) -> Candidates:
        self._ask(Search(prompts, width, token_budget), answered=True)
        found: Candidates = self._fetched()
        return found

    def generate(self, prompts: PromptBatch, group_size: int, **options: Any) -> Rollout:
        self.begin(prompts, group_size, **options)
        return self.finish()

    def begin(self, prompts: PromptBatch, group_size: int, **options: Any) -> None:
        """Let the rollout ranks search; nothing else can be asked of them until ``finish``."""
        self._ask(Generate(prompts, {"group_size": group_size, **options}), answered=True)

    def finish(self) -> Rollout:
        """Wait for what ``begin`` began."""
        rollout: Rollout = self._fetched()
        return rollout

    def pop_flops(self) -> FlopCount:
        work, self._work = self._work, FlopCount()
        return work

    def _fetched(self) -> Any:
        found: Found = self._line.result()
        self._work += found.work
        return found.value

    def _ask(self, message: Any, *, answered: bool = False) -> None:
        if self._line.holder is not self:
            raise TawinError(f"{type(message).__name__} was asked of an engine whose place a newer one has taken")
        self._line.ask(message, answered=answered)
