"""Prepare a data set: ``python -m tawin_nemo.data_prep.prepare --help``, or ``prepare()`` from other programs."""

from __future__ import annotations

import argparse
import sys
import tempfile
import typing
from dataclasses import Field as DataclassField
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from tawin_nemo.config.schema import DataConfig, PrepareConfig
from tawin_nemo.data.interactions import MANIFEST, read_manifest, verify_files
from tawin_nemo.data_prep import amazon, candidates_layout, inter_layout, own_reader, synthetic, yelp
from tawin_nemo.data_prep.dataset import STATISTICS, Prepared, write_dataset
from tawin_nemo.data_prep.pipeline import build
from tawin_nemo.data_prep.raw import Period, period
from tawin_nemo.util.errors import ConfigError, DataError, UserError
from tawin_nemo.util.files import sha256
from tawin_nemo.util.imports import is_import_path, source_hash
from tawin_nemo.util.log import say

SOURCES = ("synthetic", "amazon", "yelp", "inter", "candidates")


def prepare(
    source: str, root: Path, out: Path, *, prepare: PrepareConfig, data: DataConfig, seed: int, name: str = "",
    used_by: Path | None = None,
) -> Path:  # fmt: skip
    """Prepare the raw or ready-made data in ``root`` as the folder ``out`` and return it.

    ``source`` is one of SOURCES, ``auto`` (see ``detect``) or ``prepared`` (returns ``root``). A finished folder with
    the same parameters and sources is reused. ``name`` (empty = taken from the files) goes into the manifest.
    ``seed`` matters for ``synthetic`` only. Raises DataError or ConfigError, also when ``out`` holds other data and
    ``used_by`` names a checkpoint that was trained on them.
    """
    if source == "auto":
        source = detect(root)
        say(f"{root} holds data of the kind: {source}")
    if source == "prepared":
        read_manifest(root)
        return root
    if source not in SOURCES and not is_import_path(source):
        raise DataError(f"data.dataset={source!r} is unknown; use auto, prepared or one of {', '.join(SOURCES)}")
    own = is_import_path(source)
    files = own_reader.source_files(root) if own else _source_files(source, root, prepare)
    name = name or (root.name if own else _default_name(source, root, files))
    request = _request(source, files, prepare, data, seed, name)
    if _is_finished(out, request):
        say(f"{out} is already prepared from the same sources with the same parameters; reused")
        return out
    if used_by is not None and (out / MANIFEST).is_file():
        _check_unchanged(read_manifest(out).get("request"), request, out, used_by)
    write_dataset(_read(source, root, files, prepare, data, seed, name), out, request)
    say(f"prepared {name} in {out}; see {STATISTICS} there")
    return out


def _check_unchanged(before: Any, request: dict[str, Any], out: Path, used_by: Path) -> None:
    """Raises ConfigError when ``out`` was prepared by another request than this one."""
    if before == request:
        return  # files were lost or damaged; the same request writes the same bytes
    old, new = (dict(part.get("parameters", {})) for part in (before or {}, request))
    changed = [
        f"{key}: {old.get(key)} -> {new.get(key)}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)
    ]
    raise ConfigError(
        f"{out} holds the data that {used_by} was trained on, and this recipe prepares others "
        f"({'; '.join(changed) or 'the source files differ'}): choose another name= or run_dir=, or remove that run"
    )


def detect(root: Path) -> str:
    """The format of the data in ``root``: prepared, inter, candidates, amazon or yelp.

    Raises DataError, naming the expected files, if it is none of these.
    """
    if not root.is_dir():
        raise DataError(f"data.root={str(root)!r} is not a folder; give the folder that holds the data")
    if (root / MANIFEST).is_file():
        return "prepared"
    if any(root.glob("*.train.inter")):
        return "inter"
    if candidates_layout.found_in(root):
        return "candidates"
    if _json_files(root, "meta_*"):
        return "amazon"
    if _json_files(root, "*review*") and _json_files(root, "*business*"):
        return "yelp"
    raise DataError(
        f"nothing known in {root}: looked for {MANIFEST} (prepared), NAME.train.inter (inter), NAME-val.json beside "
        "NAME-test.json (candidates), meta_NAME.json[.gz] "
        "beside NAME.json[.gz] (amazon), and *review*.json[.gz] beside *business*.json[.gz] (yelp); "
        "set data.dataset, prepare.reviews and prepare.metadata for other file names"
    )


def _json_files(root: Path, stem: str) -> list[Path]:
    return sorted({*root.glob(f"{stem}.json"), *root.glob(f"{stem}.json.gz")})


def _source_files(source: str, root: Path, prepare: PrepareConfig) -> list[Path]:
    """The files that the result depends on; reviews and metadata are the first two of raw layouts."""
    if source == "synthetic":
        return []
    if source == "inter":
        return inter_layout.source_files(root)
    if source == "candidates":
        return candidates_layout.source_files(root)
    items = _json_files(root, "meta_*" if source == "amazon" else "*business*")
    if source == "amazon":
        reviews = [path for path in _json_files(root, "*") if path not in items]
    else:
        reviews = _json_files(root, "*review*")
    return [
        _one_file(root, "prepare.reviews", prepare.reviews, reviews),
        _one_file(root, "prepare.metadata", prepare.metadata, items),
    ]


def _one_file(root: Path, key: str, named: str, paths: list[Path]) -> Path:
    if named:
        path = root / named
        if not path.is_file():
            raise DataError(f"{key}={named!r}: there is no file {path}")
        return path
    if len(paths) != 1:
        candidates = ", ".join(path.name for path in paths) or "none"
        raise DataError(f"set {key} to one file in {root}; candidates: {candidates}")
    return paths[0]


def _default_name(source: str, root: Path, files: list[Path]) -> str:
    if source == "inter":
        return inter_layout.find_name(root)
    if source == "candidates":
        return files[-1].name.removesuffix("-test.json")
    if source == "amazon":
        return files[0].name.split(".", 1)[0]
    return {"yelp": "Yelp", "synthetic": "Synthetic"}[source]


def _request(
    source: str, files: list[Path], prepare: PrepareConfig, data: DataConfig, seed: int, name: str
) -> dict[str, Any]:
    """Everything that the bytes of the result depend on."""
    parameters: dict[str, Any] = {"source": source, "name": name, "max_history": data.max_history}
    settings = asdict(prepare)
    if source not in ("inter", "candidates"):
        parameters |= {key: settings[key] for key in ("start", "end", "k_core", "max_title_words")}
    published = _published_name(source, files, prepare.preset)
    if period(published) != period(name):
        parameters["period_of"] = published
    if source == "synthetic":
        parameters |= {key: value for key, value in settings.items() if key.startswith("synthetic_")} | {"seed": seed}
    if is_import_path(source):
        parameters["code"] = source_hash("data.dataset", source)
    sources = [{"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)} for path in files]
    return {"parameters": parameters, "sources": sources}


def _published_name(source: str, files: list[Path], preset: str) -> str:
    """The data set whose published time window counts: ``prepare.preset``, or what the review file is called.

    The name of a run never decides: it seldom says which raw files it reads.
    """
    if preset != "auto":
        return "" if preset == "none" else preset
    return _default_name(source, Path(), files) if source in ("amazon", "yelp") else ""


def _is_finished(out: Path, request: dict[str, Any]) -> bool:
    if not (out / MANIFEST).is_file():
        return False
    try:
        manifest = read_manifest(out)
        if manifest.get("request") != request:
            return False
        verify_files(out, manifest)
    except DataError as error:
        say(f"preparing again: {error}")
        return False
    return True


def _read(
    source: str, root: Path, files: list[Path], prepare: PrepareConfig, data: DataConfig, seed: int, name: str
) -> Prepared:
    if source == "inter":
        return inter_layout.read(root, name, data.max_history)
    if source == "candidates":
        return candidates_layout.read(root, name, data.max_history)
    published = _published_name(source, files, prepare.preset)
    window = period(published, prepare.start, prepare.end)
    if period(published) != period("") and not (prepare.start and prepare.end):
        say(f"time window {window}: the published one of {published} (prepare.preset=none takes all reviews)")
    limits = {"k": prepare.k_core, "max_title_words": prepare.max_title_words, "max_history": data.max_history}
    if source == "synthetic":
        return _read_synthetic(prepare, window, limits, seed, name)
    if is_import_path(source):
        return build(own_reader.read(source, name, root, prepare, window), **limits)
    reviews, items = files
    if source == "yelp":
        return build(yelp.read(name, reviews, items, window), **limits)
    return build(amazon.read(name, reviews, items, window, prepare.k_core), **limits)


def _read_synthetic(prepare: PrepareConfig, window: Period, limits: dict[str, int], seed: int, name: str) -> Prepared:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        size = (prepare.synthetic_items, prepare.synthetic_users, prepare.synthetic_reviews_per_user)
        say(synthetic.announcement(*size))
        synthetic.write_raw(folder, *size, seed)
        reviews, items = folder / synthetic.REVIEWS_FILE, folder / synthetic.METADATA_FILE
        raw = amazon.read(name, reviews, items, window, prepare.k_core)
        return build(replace(raw, source="synthetic"), **limits)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns exit code 0, or 2 on a UserError, whose message goes to stderr."""
    parser = argparse.ArgumentParser(prog="python -m tawin_nemo.data_prep.prepare", description="Prepare a data set.")
    parser.add_argument("--source", default="auto", choices=("auto", *SOURCES), help="what lies in --root")
    parser.add_argument("--root", type=Path, default=Path("."), help="folder with the raw files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--name", default="", help="name of the data set (empty = from the files)")
    parser.add_argument("--seed", type=int, default=42, help="of the synthetic log")
    options = [(f"prepare.{option.name}", option) for option in fields(PrepareConfig)]
    options += [(f"data.{option.name}", option) for option in fields(DataConfig) if option.name == "max_history"]
    types = typing.get_type_hints(PrepareConfig) | typing.get_type_hints(DataConfig)
    for flag, option in options:
        parser.add_argument(f"--{flag}", type=types[option.name], default=option.default, help=_help(option))
    given = vars(parser.parse_args(arguments))
    try:
        for flag, option in options:
            _check_limits(flag, given[flag], option)
        prepare(
            given["source"],
            given["root"],
            given["out"],
            prepare=PrepareConfig(**{flag[8:]: given[flag] for flag, _ in options if flag.startswith("prepare.")}),
            data=DataConfig(max_history=given["data.max_history"]),
            seed=given["seed"],
            name=given["name"],
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(given["out"])
    return 0


def _help(option: DataclassField[Any]) -> str:
    return f"{option.metadata['help']} (default: {option.default!r})".replace("%", "%%")


def _check_limits(flag: str, value: Any, option: DataclassField[Any]) -> None:
    low, high = option.metadata.get("low"), option.metadata.get("high")
    if (low is not None and value < low) or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise DataError(f"--{flag} {value} is out of range; it must be {limits}")


if __name__ == "__main__":
    sys.exit(main())
