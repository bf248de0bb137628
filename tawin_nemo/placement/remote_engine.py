"""The training side of disaggregated rollouts (``rollout.placement: separate``).

Every training rank makes the same calls with the same arguments; the first one broadcasts them to the rollout ranks,
which run ``rollout_ranks.serve``. ``MESSAGES`` are all that they accept, besides the log folder and ``Stop``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.config.backbones import Backbone, FlopCount
from tawin_nemo.config.schema import Recipe
from tawin_nemo.models.megatron.model.build import check_rollout_model, rollout_dtype
from tawin_nemo.models.megatron.model.reshard import Refit
from tawin_nemo.models.megatron.parallel import disaggregated, runtime
from tawin_nemo.types import Candidates, DataParallel, PromptBatch, Rollout, TokenRows
from tawin_nemo.util.errors import TawinError
from tawin_nemo.util.log import get_logger

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

log = get_logger(__name__)


@dataclass(frozen=True)
class BuildEngine:
    """Build a model and an engine, replacing the present ones, then gather ``rollout_ranks.layout_entry``."""

    recipe: Recipe
    shape: Backbone
    catalog: Catalog


@dataclass(frozen=True)
class ReceiveWeights:
    """Take part in resharding the training ranks' weights into the engine's model."""


@dataclass(frozen=True)
class CheckEqual:
    """Take part in ``Refit.check_equal``."""


@dataclass(frozen=True)
class SetWeightVersion:
    """Stamp rollouts with this version of the weights from now on."""

    version: int


@dataclass(frozen=True)
class Generate:
    """Roll out; the response is a ``Generated``."""

    prompts: PromptBatch
    options: dict[str, Any]  # the keywords of Engine.generate


@dataclass(frozen=True)
class Search:
    """Search without rolling out, as evaluation does; the response is a ``Searched``."""

    prompts: TokenRows
    width: int
    token_budget: int | None


MESSAGES = (BuildEngine, ReceiveWeights, CheckEqual, SetWeightVersion, Generate, Search)


@dataclass(frozen=True)
class Generated:
    """Response to ``Generate``."""

    rollout: Rollout  # on the CPU
    flops: FlopCount  # of all replicas since the last response


@dataclass(frozen=True)
class Searched:
    """Response to ``Search``."""

    candidates: Candidates  # on the CPU
    flops: FlopCount


class RemoteEngine:
    """An ``Engine`` whose model lies on the rollout ranks.

    The rollout ranks divide the prompts among their replicas. For training there is one replica (``dp``): every
    training rank passes the same prompts and gets all results. ``begin`` and ``finish`` are the halves of ``generate``,
    between which training continues. The weights are undefined until the first ``receive_weights``. Raises ConfigError
    when the model's shape does not fit the rollout layout (``rollout.tensor_model_parallel_size``,
    ``rollout.pipeline_model_parallel_size``).
    """

    def __init__(self, recipe: Recipe, model: GPTModel, shape: Backbone, catalog: Catalog) -> None:
        check_rollout_model(shape, recipe.model, *recipe.rollout_layout, recipe.rollout_precision)
        self.dp = DataParallel()
        self._channel, self._version, self._flops = disaggregated.rollout_channel(), 0, FlopCount()
        self._channel.model_owner = self  # the rollout ranks hold one model at a time
        self._broadcast(BuildEngine(recipe, shape, catalog))
        self._refit = Refit(model, None, dtype=rollout_dtype(recipe))
        with disaggregated.whole_job():
            #: One entry of layout.json per rollout rank.
            self.rank_layouts = [entry for entry in runtime.gather_objects(None) if entry is not None]
        tp, pp = recipe.rollout_layout
        self.num_replicas = len(self.rank_layouts) // (tp * pp)
        log.info("rollouts and evaluation on ranks of their own: TP %d x PP %d x DP %d", tp, pp, self.num_replicas)

    @property
    def weight_version(self) -> int:
        """Version of the weights on the rollout ranks; setting it broadcasts the version to them."""
        return self._version

    @weight_version.setter
    def weight_version(self, version: int) -> None:
        self._broadcast(SetWeightVersion(version))
        self._version = version

    def receive_weights(self) -> None:
        """Reshard the training model's present weights to the rollout ranks."""
        self._broadcast(ReceiveWeights())
        self._refit()

    def check_equal(self) -> None:
        """Raises TawinError unless the rollout ranks' weights equal the training ranks', tensor by tensor."""
        self._broadcast(CheckEqual())
        self._refit.check_equal()

    def search(self, prompts: TokenRows, width: int, *, token_budget: int | None = None) -> Candidates:
        """The ``width`` best candidates of every prompt, on the CPU of every training rank."""
        self._broadcast(Search(prompts, width, token_budget), responds=True)
        response = self._channel.response(Searched)
        self._flops += response.flops
        return response.candidates

    def generate(self, prompts: PromptBatch, group_size: int, **options: Any) -> Rollout:
        """A rollout of ``prompts``, on the CPU of every training rank; options are those of ``Engine.generate``."""
        self.begin(prompts, group_size, **options)
        return self.finish()

    def begin(self, prompts: PromptBatch, group_size: int, **options: Any) -> None:
        """Start a rollout; until ``finish`` the engine takes no other call."""
        self._broadcast(Generate(prompts, {"group_size": group_size, **options}), responds=True)

    def finish(self) -> Rollout:
        """Wait for the rollout that ``begin`` started."""
        response = self._channel.response(Generated)
        self._flops += response.flops
        return response.rollout

    def pop_flops(self) -> FlopCount:
        """Floating-point work of all replicas since the last call."""
        flops, self._flops = self._flops, FlopCount()
        return flops

    def _broadcast(self, message: Any, *, responds: bool = False) -> None:
        if self._channel.model_owner is not self:
            raise TawinError(
                f"{type(message).__name__}: the rollout ranks hold the model of a newer engine; use that one"
            )
        self._channel.broadcast(message, responds=responds)
