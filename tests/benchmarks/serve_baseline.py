"""The server that one would write around transformers: FastAPI, uvicorn, ``generate`` under a prefix constraint.

    python -m tests.benchmarks.serve_baseline FOLDER --batch 16

``FOLDER`` is what ``write_parts`` left. With ``--batch 1`` requests are answered one by one behind a lock, with more
the model takes what waits, up to so many prompts at once, padded on their left. The constraint is one dictionary
look-up per beam and step (``baselines.PrefixTable``), made before the first request; prompts are written by the code
that ours uses.
"""

from __future__ import annotations

import argparse
import asyncio
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from tawin_nemo.serve.engine.catalog import ServedCatalog
from tests.benchmarks.baselines import PrefixTable
from tests.benchmarks.setting import start

PARTS = "baseline.pickle"
#: Seconds that a batch waits for more requests once it has one.
GATHER = 0.002


class Asked(BaseModel):
    history: list[int]
    n: int
    beams: int


class Found(BaseModel):
    item: int
    title: str
    score: float


class Reply(BaseModel):
    items: list[Found]


def write_parts(folder: Path, catalog: ServedCatalog, weights: Path) -> None:
    """What the baseline's process needs; read again by that process only."""
    (folder / PARTS).write_bytes(pickle.dumps((catalog, weights)))


@dataclass
class Generator:
    """transformers' beam search over one catalog."""

    model: PreTrainedModel
    table: PrefixTable
    item_of: dict[tuple[int, ...], int]
    eos: int
    longest: int

    @classmethod
    def of(cls, catalog: ServedCatalog, weights: Path) -> Generator:
        eos = catalog.prompt_format.tokenizer.eos_id
        model = AutoModelForCausalLM.from_pretrained(weights, attn_implementation="sdpa").eval()
        item_of: dict[tuple[int, ...], int] = {}
        for number in catalog.number_J.tolist():
            item_of.setdefault(tuple(catalog.paths[number].tolist()), number)
        table = PrefixTable(catalog.trie_paths, eos)
        return cls(model, table, item_of, eos, catalog.trie.max_depth)

    @torch.inference_mode()
    def best(self, prompts: Sequence[torch.Tensor], beams: int, n: int) -> list[list[tuple[int, float]]]:
        """The n best (item, score) of every prompt."""
        longest = max(map(len, prompts))
        ids_BT = torch.full((len(prompts), longest), self.eos)
        mask_BT = torch.zeros_like(ids_BT)
        for row, prompt in enumerate(prompts):
            ids_BT[row, longest - len(prompt) :] = prompt
            mask_BT[row, longest - len(prompt) :] = 1
        self.table.prompt_tokens = longest
        output = self.model.generate(
            ids_BT, attention_mask=mask_BT, num_beams=beams, num_return_sequences=n, do_sample=False,
            prefix_allowed_tokens_fn=self.table, renormalize_logits=True, length_penalty=0.0,
            max_new_tokens=self.longest, eos_token_id=self.eos, pad_token_id=self.eos, use_cache=True,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        scores, found = output.sequences_scores.tolist(), []
        for row, sequence in enumerate(output.sequences[:, longest:].tolist()):
            end = sequence.index(self.eos) + 1 if self.eos in sequence else len(sequence)
            item = self.item_of.get(tuple(sequence[:end]))
            if row % n == 0:
                found.append([])
            if item is not None:  # fewer than n paths: transformers fills up with what the constraint does not allow
                found[-1].append((item, scores[row]))
        return found


class Batches:
    """One task owns the model: it takes what waits, up to ``limit`` prompts, and runs it in a thread."""

    def __init__(self, generator: Generator, limit: int) -> None:
        self._generator, self._limit = generator, limit
        self._waiting: asyncio.Queue[tuple[torch.Tensor, Asked, asyncio.Future[Any]]] = asyncio.Queue()

    async def ask(self, prompt: torch.Tensor, asked: Asked) -> list[tuple[int, float]]:
        future = asyncio.get_running_loop().create_future()
        await self._waiting.put((prompt, asked, future))
        return await future

    async def run(self) -> None:
        while True:
            taken = [await self._waiting.get()]
            await asyncio.sleep(GATHER)
            while len(taken) < self._limit and not self._waiting.empty():
                taken.append(self._waiting.get_nowait())
            prompts, asked = [prompt for prompt, _, _ in taken], [ask for _, ask, _ in taken]
            beams, n = max(ask.beams for ask in asked), max(ask.n for ask in asked)
            try:
                found = await asyncio.to_thread(self._generator.best, prompts, beams, n)
            except Exception as error:
                for _, _, future in taken:
                    future.set_exception(error)
                continue
            for (_, ask, future), items in zip(taken, found, strict=True):
                future.set_result(items[: ask.n])


def application(catalog: ServedCatalog, weights: Path, batch: int) -> FastAPI:
    app, generator, lock = FastAPI(), Generator.of(catalog, weights), asyncio.Lock()
    batches, tasks = Batches(generator, batch), []

    @app.get("/health")
    async def health() -> dict[str, str]:
        if batch > 1 and not tasks:
            tasks.append(asyncio.create_task(batches.run()))
        return {"status": "alive"}

    @app.post("/v1/recommendations")
    async def recommend(asked: Asked) -> Reply:
        prompt = torch.from_numpy(catalog.prompt(asked.history).flat)
        if batch > 1:
            items = await batches.ask(prompt, asked)
        else:
            async with lock:
                (items,) = await asyncio.to_thread(generator.best, [prompt], asked.beams, asked.n)
        return Reply(items=[Found(item=item, title=catalog.titles[item], score=score) for item, score in items])

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    start(given.threads)
    catalog, weights = pickle.loads((given.folder / PARTS).read_bytes())
    uvicorn.run(application(catalog, weights, given.batch), port=given.port, access_log=False, log_level="warning")


if __name__ == "__main__":
    main()
