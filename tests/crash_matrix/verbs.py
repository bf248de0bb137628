"""Cases beyond a training run of SFT and RL: the preference stage, and the verbs that write something."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tests.crash_matrix import cases
from tests.crash_matrix.attempts import Attempt, attempt
from tests.crash_matrix.cases import Outcome, Setting
from tests.train.runs import SMALL, run

#: SFT of one pass (6 steps, 7 checkpoints), then four steps of NAPO: shared rejected items, a margin that moves.
PREFERENCE = (
    "rl.enabled=false", "preference.enabled=true", "preference.max_steps=4", "preference.lr=1e-3",
    "preference.global_batch_size=32", "preference.micro_batch_tokens=1024", "preference.share_group=8",
    "preference.algorithm=napo", "preference.negatives=self_play", "preference.search_every=3",
)  # fmt: skip
PREFERENCE_KILLS = (
    "save.mid_shard=kill@9", "save.before_write=kill@2", "log.mid_line=kill@1", "save.before_rename=kill",
    "save.after_rename=kill", "file.before_rename=kill@2",
)  # fmt: skip
#: Kills of one verb, each followed by the same command: at the first files it writes, and at a moment of its time.
VERB_KILLS = ("file.before_rename=kill", "file.before_rename=kill@2", "random", "random")
TOKENIZE = (
    "semantic_ids.codes=6", "semantic_ids.levels=3", "semantic_ids.text.dims=8", "semantic_ids.method=rqvae", "seed=3",
    "semantic_ids.rqvae.widths=[12]", "semantic_ids.rqvae.latent=4", "semantic_ids.rqvae.epochs=20",
    "data.dataset=prepared",
)  # fmt: skip


def preference(world: Setting, name: str) -> Outcome:
    """A run with a preference stage is killed in it again and again; it ends as one that never was."""
    folder = world.folder / f"{name}-world"
    folder.mkdir()
    aux = folder / "aux"
    run(*SMALL, "baseline.model=sasrec", "baseline.epochs=2", f"data.root={world.data}", f"run_dir={aux}")
    more = (*PREFERENCE, f"preference.aux={aux / 'sasrec'}")
    own = cases.setting(folder, world.data, *more)
    outcome = cases.chain(own, name, PREFERENCE_KILLS)
    return replace(outcome, points=tuple(f"preference: {point}" for point in outcome.points))


def convert(world: Setting, name: str) -> Outcome:
    """An export of the uninterrupted run."""
    stage = f"checkpoint={world.folder / 'reference' / 'rl'}"
    return _verb(world, name, "convert", [stage], lambda output: f"convert.output={output}")


def tokenize(world: Setting, name: str) -> Outcome:
    """Codes of the dataset's items, by codebooks that are trained for a moment."""
    words = [f"data.root={world.data}", *TOKENIZE]
    return _verb(world, name, "tokenize", words, lambda output: f"semantic_ids.output={output}")


def recommend(world: Setting, name: str) -> Outcome:
    """Lists of all users of the dataset, in parts."""
    words = [f"checkpoint={world.folder / 'reference' / 'rl'}", "recommend.part_rows=64", "recommend.n=4"]
    return _verb(world, name, "recommend", words, lambda output: f"recommend.output={output}")


def _verb(world: Setting, name: str, verb: str, words: Sequence[str], output: cases.Output) -> Outcome:
    """Kill the verb, then run it to its end: the files of one that was never killed, and no others."""
    whole, killed = (world.folder / f"{name}-{kind}" / "out" for kind in ("whole", "killed"))
    attempts: list[Attempt] = []
    for folder in (whole, killed):
        folder.parent.mkdir()

    def called(place: Path, **options: object) -> Attempt:
        overrides = [output(place), f"run_dir={place.parent / 'run'}"]
        return attempt(overrides, words=(verb, *words), **options)  # type: ignore[arg-type]

    first = called(whole)
    problem = "" if first.code == 0 else f"the uninterrupted {verb} ended with {first.code}: {first.last_words}"
    for place in VERB_KILLS:
        if place == "random":
            attempts.append(called(killed, after=world.draw.uniform(0.2, 0.8) * first.cpu))
        else:
            attempts.append(called(killed, rules=place))
        if attempts[-1].code not in (-signal.SIGKILL, 0):  # the second kill may come when nothing is left to do
            problem = problem or f"{place}: exit {attempts[-1].code}: {attempts[-1].last_words}"
    attempts.append(called(killed))
    if attempts[-1].code != 0:
        problem = problem or f"the last attempt ended with {attempts[-1].code}: {attempts[-1].last_words}"
    if not problem and (one := files(killed.parent)) != (other := files(whole.parent)):
        problem = f"other files or bytes: {sorted(file for file, _ in set(one.items()) ^ set(other.items()))}"
    points = [f"{verb}: {place.partition('=')[0]}" for place in VERB_KILLS]
    codes, seconds = tuple(done.code for done in attempts), sum(done.seconds for done in attempts)
    return Outcome(name, tuple(points), codes, problem, seconds)


def files(folder: Path) -> dict[str, str]:
    """Checksums of everything below ``folder`` but the logs, by relative path; text without the folder's own name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and "logs/" not in name and not name.endswith("run.log"):
            data = path.read_bytes().replace(str(folder).encode(), b"FOLDER")
            found[name] = hashlib.sha256(data).hexdigest()
    return found
