"""Mutated recipe keys and values through the command line: each is refused with its key, or means what it says.

    python -m tests.fuzz.overrides --cases 5000 --seed 0

Every case is one command ``plan KEY=VALUE ...`` in this process: reading, limits, combinations, and the arithmetic of
layouts and memory, without data. Outcomes: ``refused`` (exit code 2, one line that names a key that was written, or the
part of it that is unknown), ``accepted`` (exit code 0, and every value is the plain reading of its text), ``nonsense``
(accepted, but the value is another one than the text says, or no person writes such a text), ``fault`` (another exit
code, or a traceback).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from tawin_nemo.cli import main
from tawin_nemo.config.fields import leaf_fields, value_of
from tawin_nemo.config.load import load_recipe
from tawin_nemo.config.schema import Recipe
from tawin_nemo.util.errors import ConfigError

FIELDS = dict(leaf_fields(Recipe))
#: Texts that have ended programs before: numbers at the edges of their types, words of YAML, pieces of other syntax.
ODD = (
    "", " ", "null", "~", "true", "false", "yes", "no", "on", "off", "0", "-0", "-1", "1", "1.0", "1.5", "1e3",
    "1e-30", "1e308", "1e999", "-1e999", "nan", ".nan", "inf", ".inf", "-.inf", "0x10", "0o17", "010", "1_000",
    "1,000", "1:30", "2147483647", "2147483648", "-2147483649", "9223372036854775807", "9223372036854775808",
    "9" * 400, "1e", "1-5", "--5", "+5", "5%", "5GB", "'1'", '"1"', "'", '"', "[", "]", "{", "}", "[]", "{}", "[1]",
    "[1, 2]", "[[1]]", "[null]", "[1,", "{a: 1}", "{a: {b: 1}}", "{a", "a: b", "- a", "!!python/object:os.system x",
    "!!binary aGk=", "&a [*a]", "*a", "${seed}", "${nothing}", "${rl.lr}", "${oc.env:HOME}",
    "${oc.env:NO_SUCH_VARIABLE}", "${", "$seed", "${seed}${seed}", "${.seed}", "${..seed}", "???", "% ", "#", "a # b",
    "\t", "\n", "a\nb", "\x00", "\x1b[31m", "\u200b", "\ufeff", "\ud7ff", "٣", "１", "é", "日本", "💥", "a" * 5000,
    "../" * 200, "/", "/dev/null", "/dev/zero", "/proc/self/mem", ".", "..", "~root", "http://x",
    "file:///etc/passwd", "a b", "-", "--help", "=", "==", "a=b", "os:system", "builtins:exec", "no.such.module:name",
    "tests:no_such_name", "2018-01-01", "2018-13-01", "0000-00-00", "9999-12-31", "00:00:00:00", "99:99:99:99", "1d",
    "sasrec", "tawin", "auto", "sid", "title",
)  # fmt: skip
#: Texts that a person writes for a value: no control characters, no blanks at the ends.
_CONTROL = re.compile(r"[\x00-\x1f\x7f\u200b\ufeff]")


@dataclass(frozen=True)
class Case:
    """What was written, what became of it, and what was said."""

    overrides: list[str]
    outcome: str
    said: str


def mutated_key(key: str, rng: random.Random) -> str:
    """A key with a slip of the hand: a letter lost, doubled or changed, a part too much or too little."""
    spot = rng.randrange(len(key))
    return rng.choice([
        key[:spot] + key[spot + 1 :], key[:spot] + key[spot] + key[spot:],
        key[:spot] + rng.choice("abz._-0 ") + key[spot + 1 :], key + ".x", key.rpartition(".")[0],
        key.rpartition(".")[2], key.upper(), f".{key}", f"{key}.", f"{key}[0]", f"+{key}", f"~{key}",
    ])  # fmt: skip


def mutated_value(key: str, rng: random.Random) -> str:
    """A text for ``key``: odd, out of another key, or its default with a slip of the hand."""
    default = text_of(value_of(Recipe(), key))
    kind = rng.random()
    if kind < 0.35:
        return rng.choice(ODD)
    if kind < 0.5:
        return text_of(value_of(Recipe(), rng.choice(list(FIELDS))))
    if kind < 0.6 and "choices" in FIELDS[key].metadata:
        return str(rng.choice(list(FIELDS[key].metadata["choices"]) or [default]))
    if kind < 0.75:  # another number
        exponent = rng.uniform(-12, 12)
        number = rng.choice([-1, 1, 1, 1]) * 10**exponent
        return str(round(number)) if rng.random() < 0.5 else f"{number:.3g}"
    text = default or "x"
    for _ in range(rng.randint(1, 3)):
        spot = rng.randrange(len(text))
        text = rng.choice([
            text[:spot] + text[spot + 1 :], text[:spot] + text[spot] + text[spot:], text + rng.choice(ODD),
            text[:spot] + rng.choice("0123456789.,-e_[]{}$:'\" \t") + text[spot + 1 :],
        ]) or "x"  # fmt: skip
    return text


def text_of(value: Any) -> str:
    """``value`` as it is written on a command line."""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


def mutated(rng: random.Random) -> list[str]:
    """One to three overrides."""
    keys = [rng.choice(list(FIELDS)) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
    words = []
    for key in keys:
        written = mutated_key(key, rng) if rng.random() < 0.1 else key
        words.append(f"{written}={mutated_value(key, rng)}" if rng.random() > 0.01 else written)
    return words


def run(overrides: Sequence[str]) -> tuple[int, str]:
    """Exit code of the verb ``plan`` and what it said on stderr; a fault's traceback is part of that."""
    said, result = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(result):
        try:
            code = main(["plan", *overrides])
        except SystemExit as stopped:  # argparse
            code = int(stopped.code or 0)
        except Exception as error:
            print(f"Traceback: {type(error).__name__}: {error}", file=said)
            code = 1
    return code, said.getvalue()


def names_its_cause(overrides: Sequence[str], said: str) -> bool:
    """Whether the last line names a key that was written, a part of it, or the word that is no override."""
    last = said.strip().splitlines()[-1] if said.strip() else ""
    parts = {part for word in overrides for part in re.split(r"[=.\[\]+~ ]", word.partition("=")[0]) if part}
    named = any(re.search(rf"(?<!\w){re.escape(part)}(?!\w)", last) for part in parts)
    return named or any(repr(word) in last or word in last for word in overrides)


def plain(key: str, text: str, value: Any) -> bool:
    """Whether ``value`` is what a reader takes ``text`` for."""
    if isinstance(value, str):
        return not _CONTROL.search(value) and value == value.strip() and len(value) < 4096
    if "${" in text:
        return True  # compared where it points to
    if isinstance(value, list) and text[:1] not in "['\"":  # 1,3,5 is a list, and so is 3
        return [str(part) for part in value] == [part.strip() for part in text.split(",") if text.strip()]
    try:
        read = yaml.safe_load(text)
    except yaml.YAMLError:
        return False
    if isinstance(value, bool):
        return (yaml.safe_load(read) if isinstance(read, str) else read) in (value, int(value))
    if isinstance(value, int | float):
        if isinstance(read, str):  # YAML 1.1 takes 1e-5 for a text
            with contextlib.suppress(ValueError):
                read = float(read)
        return not isinstance(read, bool) and bool(read == value)
    if isinstance(value, list):
        return isinstance(read, list) and [str(part) for part in read] == [str(part) for part in value]
    return bool(read == value)


def judged(overrides: Sequence[str]) -> Case:
    """Run one case and say what became of it."""
    code, said = run(overrides)
    if "Traceback" in said or code not in (0, 2):
        return Case(list(overrides), "fault", said[-600:])
    if code == 2:
        named = names_its_cause(overrides, said)
        return Case(list(overrides), "refused" if named else "unclear", said[-300:])
    try:
        recipe = load_recipe(None, overrides)
    except ConfigError as error:
        return Case(list(overrides), "fault", f"plan accepted what load_recipe refuses: {error}")
    written = dict(word.split("=", 1) for word in overrides if "=" in word)
    for key, text in written.items():
        if key in FIELDS and not plain(key, text, value := value_of(recipe, key)):
            return Case(list(overrides), "nonsense", f"{key}={text!r} became {value!r}")
    return Case(list(overrides), "accepted", "")


def fuzz(cases: int, seed: int) -> list[Case]:
    """``cases`` mutated commands, drawn by ``seed``."""
    rng = random.Random(seed)
    return [judged(mutated(rng)) for _ in range(cases)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found = fuzz(given.cases, given.seed)
    for case in found:
        if case.outcome not in ("refused", "accepted"):
            print(json.dumps(asdict(case), ensure_ascii=True), file=sys.stderr)
    counts = Counter(case.outcome for case in found)
    print(json.dumps({"cases": len(found), "seed": given.seed, **counts}))
    sys.exit(any(counts[outcome] for outcome in ("fault", "nonsense", "unclear")))
