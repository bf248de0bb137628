"""What a Markdown page holds: links, headings, code spans, code blocks and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from textwrap import dedent
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parents[2]
#: Folders whose pages belong to the repository.
FOLDERS = ("data_prep", "recipes", "slurm", "tawin_nemo", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))])
#: Pages that `study ... report=true` writes; their commands and keys are those of their recipe at that time.
GENERATED = [path for path in PAGES if (ROOT / "recipes" / "results") in path.parents[1:]]
#: A first line of a shell block with these words: its commands are checked like all others, but not run.
NOT_RUN = "# not run in tests:"

_BLOCK = re.compile(r"^( *)```([\w.]*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
#: A block that is indented by four spaces, behind an empty line; commands in it begin with one of these programs.
_INDENTED = re.compile(r"(?<=\n\n)((?: {4}.*\n)+)")
_PROGRAM = re.compile(r"(?:[A-Z_]+=\S+ )*(?:tawin-nemo|python|bash|pytest|sbatch|curl) ")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A code block: its language ("" when none is named, "indented" when it is not fenced) and its text."""

    language: str
    text: str


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path) -> list[Block]:
    fenced = [Block(match[2], match[3]) for match in _BLOCK.finditer(_text(page))]
    return fenced + [Block("indented", dedent(text)) for text in _INDENTED.findall(prose(page))]


def prose(page: Path) -> str:
    """The page without its fenced code blocks."""
    return _BLOCK.sub("", _text(page))


def spans(page: Path) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(page))


def links(page: Path) -> list[str]:
    """Targets of links and pictures that are not on the web, as they are written."""
    without_code = re.sub(r"(?<!`)`[^`\n]+`(?!`)(?!\]\()", "", prose(page))
    return [link for link in _LINK.findall(without_code) if not re.match(r"[a-z]+:", link)]


def resolved(page: Path, link: str) -> tuple[Path, str]:
    """File and anchor ("" when none) that a link of ``page`` means."""
    path, _, anchor = link.partition("#")
    return ((page.parent / unquote(path)).resolve() if path else page), anchor


@cache
def anchors(page: Path) -> set[str]:
    """Anchors of the headings as GitHub makes them; the second heading of the same words gets ``-1``."""
    counts: Counter[str] = Counter()
    found = set()
    for heading in _HEADING.findall(prose(page)):
        words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.add(f"{slug}-{counts[slug]}" if counts[slug] else slug)
        counts[slug] += 1
    return found


@dataclass(frozen=True)
class Command:
    """One simple command: environment settings before it, and its words."""

    settings: dict[str, str]
    words: list[str]

    def __str__(self) -> str:
        return " ".join([*(f"{key}={value}" for key, value in self.settings.items()), *self.words])

    @property
    def product_arguments(self) -> list[str] | None:
        """The arguments of ``tawin-nemo`` or ``python -m tawin_nemo``; None for another command."""
        if self.words[0] == "tawin-nemo":
            return self.words[1:]
        return self.words[3:] if self.words[:3] == ["python", "-m", "tawin_nemo"] else None


def commands(block: Block) -> list[Command]:
    """The commands of a shell block; none for other languages.

    ``console``: the lines behind ``$``, the others are output. ``bash``: every line. ``indented``: the lines that begin
    with a known program. ``a && b`` are two commands, ``# ...`` is a comment.
    """
    if block.language not in ("console", "bash", "indented"):
        return []
    lines = re.sub(r"\\\n\s*", "", block.text).splitlines()
    if block.language == "console":
        lines = [line.strip()[2:] for line in lines if line.strip().startswith("$ ")]
    if block.language == "indented":
        lines = [line for line in lines if _PROGRAM.match(line)]
    return [command for line in lines for command in _simple_commands(line)]


def _simple_commands(line: str) -> list[Command]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    found = [Command({}, [])]
    for word in lexer:
        setting = re.fullmatch(r"([A-Z_]+)=(.*)", word)
        if word in ("&&", "|", ";", "||", "&"):
            found.append(Command({}, []))
        elif setting and not found[-1].words:
            found[-1].settings[setting[1]] = setting[2]
        else:
            found[-1].words.append(word)
    return [command for command in found if command.words]
