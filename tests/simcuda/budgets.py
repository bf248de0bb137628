"""The table of launches, waits and copies per phase of a step and per layer (``budgets.json``), and its comparison.

``python -m tests.simcuda.budgets`` prints what the product asks of a device now; ``--write`` commits that to the table
and to README.md. A number may only grow with a reason in the commit message.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
TABLE, PAGE = FOLDER / "budgets.json", FOLDER / "README.md"
BEGIN, END = "<!-- budgets -->", "<!-- end of budgets -->"
#: Numbers of layers; two of them give what a layer costs.
LAYERS = (2, 4)
KINDS = ("launches", "syncs", "h2d", "d2h")

#: Phase -> what one call of it is.
PHASES = {
    "prefill": "all prompts of a rollout",
    "extend": "the chosen tokens of all beams",
    "logprobs": "the edges behind all beams",
    "select": "one choice of all beams, with the rest of the rollout",
    "pack": "the candidates of a rollout into token trees",
    "reference": "log-probs of a micro-batch without gradient",
    "update": "forward and backward of a micro-batch",
    "optimizer": "gradient norm, clipping, AdamW",
}

#: phase -> kind -> call site -> events of all calls with each number of layers; and ``calls`` of the phase.
Table = Mapping[str, Mapping[str, Any]]


def measure(layers: Sequence[int] = LAYERS) -> dict[str, dict[str, Any]]:
    """The table of this process's product. Enter the pretended device first."""
    from tests.simcuda.scene import measured

    runs = [measured(number) for number in layers]
    table: dict[str, dict[str, Any]] = {}
    for phase in PHASES:
        row: dict[str, Any] = {"calls": runs[0].calls[phase]}
        for kind in KINDS:
            events = [run.counts[phase].events[kind] for run in runs]
            sites = sorted({site for counter in events for site in counter})
            row[kind] = {str(site): [counter[site] for counter in events] for site in sites}
        table[phase] = row
    return table


def total(table: Table, phase: str, kind: str) -> list[int]:
    """Events of a phase with each number of layers."""
    return [sum(column) for column in zip(*table[phase][kind].values(), strict=True)] or [0] * len(LAYERS)


def per_call(table: Table, phase: str, kind: str) -> tuple[float, float]:
    """Events of one call: for each layer, and besides."""
    few, many = (count / table[phase]["calls"] for count in total(table, phase, kind))
    layer = (many - few) / (LAYERS[1] - LAYERS[0])
    return layer, few - LAYERS[0] * layer


def grown(budget: Table, now: Table) -> list[str]:
    """What costs more than the table allows: phase, kind and the call sites that grew; empty when nothing does."""
    found = []
    for phase, row in now.items():
        for kind in KINDS:
            for position, layers in enumerate(LAYERS):
                before, after = (_per_call(table, phase, kind, position) for table in (budget, now))
                if after > before:
                    found.append(
                        f"{phase} ({layers} layers): {after:g} {kind} a call, budget {before:g}\n"
                        + "\n".join(_sites(budget[phase], row, kind, position))
                    )
    return found


def _per_call(table: Table, phase: str, kind: str, position: int) -> float:
    return total(table, phase, kind)[position] / table[phase]["calls"] if phase in table else 0.0


def _sites(budget: Mapping[str, Any], now: Mapping[str, Any], kind: str, position: int) -> list[str]:
    """Call sites with more events than before, the largest growth first."""
    sites = []
    for site, counts in now[kind].items():
        before = budget[kind].get(site, [0] * len(LAYERS))[position]
        if counts[position] > before:
            sites.append((before - counts[position], f"    {site}: {before} -> {counts[position]}"))
    return [text for _, text in sorted(sites)]


def rendered(table: Table) -> str:
    """The table for people, in Markdown."""
    lines = [
        "| phase: one call | launches per layer | besides | waits of the host (per layer) | H2D copies | D2H copies |",
        "|---|---|---|---|---|---|",
    ]
    for phase, meaning in PHASES.items():
        cells = [per_call(table, phase, kind) for kind in KINDS]
        launches, waits, *copies = cells
        cell = [f"`{phase}`: {meaning}", f"{launches[0]:.4g}", f"{launches[1]:.4g}", _both(waits), *map(_both, copies)]
        lines.append(f"| {' | '.join(cell)} |")
    return "\n".join(lines)


def _both(fit: tuple[float, float]) -> str:
    layer, rest = fit
    return f"{rest:.4g}" + (f" ({layer:.4g})" if layer else "")


def committed() -> dict[str, dict[str, Any]]:
    """The committed table."""
    table: dict[str, dict[str, Any]] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def write(table: Table) -> None:
    """Commit the table: to its file, one call site a line, and to the page."""
    phases = []
    for phase, row in table.items():
        kinds = [f'  "calls": {row["calls"]}']
        for kind in KINDS:
            sites = ",\n".join(f"   {json.dumps(site)}: {json.dumps(counts)}" for site, counts in row[kind].items())
            kinds.append(f'  "{kind}": {{\n{sites}\n  }}' if sites else f'  "{kind}": {{}}')
        phases.append(f' "{phase}": {{\n' + ",\n".join(kinds) + "\n }")
    TABLE.write_text("{\n" + ",\n".join(phases) + "\n}\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    head, tail = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{head}{BEGIN}\n{rendered(table)}\n{END}{tail}", encoding="utf-8")


def _make_wasteful() -> None:
    import torch

    from tawin_nemo.models.megatron.parallel import runtime

    real = runtime.device

    def waiting() -> torch.device:
        torch.ones(1, device="cuda").item()
        return real()

    runtime.device = waiting


def main(words: Sequence[str]) -> int:
    """Measure; print, or with ``--write`` commit. For the tests: ``--json FILE``, and a wait that is not needed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--layers", type=int, nargs=2, default=LAYERS)
    parser.add_argument("--wait-in-device", action="store_true", help="every call of runtime.device() reads a result")
    given = parser.parse_args(words)
    from tests.simcuda import device

    with device.pretended():
        if given.wait_in_device:
            _make_wasteful()
        table = measure(given.layers)
    if given.json:
        given.json.write_text(json.dumps(table), encoding="utf-8")
    elif given.write:
        write(table)
    else:
        print(rendered(table))
        print("\n".join(grown(committed(), table)) if TABLE.exists() else "")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
