"""Text <-> tokens: a pretrained tokenizer, a BPE trained on the catalog, or one token per code.

All three are fast tokenizers (package ``tokenizers``) behind one small wrapper, and are saved in Hugging Face's format.
transformers itself is imported only to save one and to read the folder of somebody else's, because that import takes
seconds. Marker tokens of the template and codes are added tokens: they are cut out of the text before anything else
happens, so that their neighbours never influence them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from tawin_nemo.config.schema import CatalogConfig, DataConfig, ModelConfig
from tawin_nemo.data.prompts import Template, build_template
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import CatalogError, ConfigError, DataError
from tawin_nemo.util.files import atomic_path
from tawin_nemo.util.hub import local_folder
from tawin_nemo.util.trusted import OutsideRoots, read_text, refuse_pickles

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS = "<|pad|>", "<|endoftext|>"
#: End-of-text tokens of base models, tried in this order where a folder does not name its own.
_KNOWN_EOS = (EOS, "<|end_of_text|>", "</s>", "<|im_end|>")
_ENCODE_CHUNK = 8192  # texts per call; bounds the memory of the intermediate encodings


@dataclass(frozen=True)
class Tokenizer:
    """A fast tokenizer without implicit special tokens, truncation or padding.

    ``foreign`` is Hugging Face's object for a folder that this package did not write; its class may mean more than
    ``backend`` says, so it is kept. Raises ConfigError without an end-of-text token.
    """

    backend: Backend
    eos_token: str | None
    pad_token: str | None = None
    foreign: PreTrainedTokenizerFast | None = None

    def __post_init__(self) -> None:
        if self.eos_token is None:
            raise ConfigError("the tokenizer names no end-of-text token; add eos_token to its tokenizer_config.json")
        self.backend.no_truncation()
        self.backend.no_padding()

    @cached_property
    def fast(self) -> PreTrainedTokenizerFast:
        """This tokenizer as a Hugging Face object, built at the first use."""
        if self.foreign is not None:
            return self.foreign
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(
            tokenizer_object=self.backend, pad_token=self.pad_token, eos_token=self.eos_token
        )  # fmt: skip

    @property
    def eos_id(self) -> int:
        """Token id of the end of text."""
        return int(self.backend.token_to_id(self.eos_token))

    @property
    def pad_id(self) -> int:
        """Token id of the padding token, or of the end of text where there is none."""
        return self.eos_id if self.pad_token is None else int(self.backend.token_to_id(self.pad_token))

    @cached_property
    def size(self) -> int:
        """Number of rows that an embedding needs: the largest token id, added tokens included, plus one."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the ``tokenizer.json`` that ``save`` writes."""
        return hashlib.sha256(self.backend.to_str(pretty=True).encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> TokenRows:
        """Tokenise N texts without special tokens. Raises DataError for text the vocabulary cannot express."""
        rows: list[list[int]] = []
        for start in range(0, len(texts), _ENCODE_CHUNK):
            part = list(texts[start : start + _ENCODE_CHUNK])
            try:
                encodings = self.backend.encode_batch_fast(part, add_special_tokens=False)
            except Exception as error:  # the library raises bare Exception
                raise self._unknown_text(part) from error
            rows.extend(encoding.ids for encoding in encodings)
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        return TokenRows(np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=int(offsets[-1])), offsets)

    def _unknown_text(self, texts: Iterable[str]) -> DataError:
        for text in texts:
            try:
                self.backend.encode(text, add_special_tokens=False)
            except Exception:
                return DataError(
                    f"the tokenizer has no tokens for {text[:200]!r}; it knows the template and the codes of the index "
                    "it was built from: use the same catalog.index and data.template, or data.tokenizer=bpe"
                )
        return DataError("the tokenizer failed on a batch of texts, but on none of them alone")

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of ``tokens``, special tokens included, spaces untouched."""
        return str(self.backend.decode([int(token) for token in tokens], skip_special_tokens=False))

    def save(self, directory: Path) -> None:
        """Write the Hugging Face files into ``directory``; other files there (weights) are not touched."""
        with tempfile.TemporaryDirectory() as temporary:
            self.fast.save_pretrained(temporary)
            for source in sorted(Path(temporary).iterdir()):
                with atomic_path(Path(directory) / source.name) as target:
                    shutil.copyfile(source, target)

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Read a folder with ``tokenizer.json``. Raises ConfigError when it is missing or unreadable."""
        with _reading(directory := Path(directory)):
            config = _config_of(directory)
            if _is_own(config) and not (directory / "chat_template.jinja").is_file():
                return cls(Backend.from_str(read_text(directory / "tokenizer.json")), EOS, PAD)
            from transformers import AutoTokenizer, PreTrainedTokenizerFast

            if config:
                fast = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            else:
                fast = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
        if fast.eos_token is None:
            fast.eos_token = _eos_of_folder(directory, fast)
        return cls(fast.backend_tokenizer, fast.eos_token, fast.pad_token, foreign=fast)


def _config_of(directory: Path) -> dict[str, Any]:
    path = directory / "tokenizer_config.json"
    return dict(json.loads(read_text(path))) if path.is_file() else {}


def _is_own(config: dict[str, Any]) -> bool:
    """True if ``Tokenizer.save`` wrote this config, for codes or BPE: ``tokenizer.json`` is then complete."""
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": PAD}
    return all(config.get(key) == value for key, value in own.items())


def read_vocabulary(directory: Path) -> dict[str, int]:
    """The vocabulary of the tokenizer in a folder, token ids by text, in a fifth of the time of ``Tokenizer.load``.

    Raises ConfigError when ``tokenizer.json`` is missing or unreadable.
    """
    directory = Path(directory)
    with _reading(directory):
        words = dict(Backend.from_str(read_text(directory / "tokenizer.json")).get_vocab(with_added_tokens=True))
        added = _config_of(directory).get("added_tokens_decoder", {})
        return words | {token["content"]: int(number) for number, token in added.items()}


@contextmanager
def _reading(directory: Path) -> Iterator[None]:
    """Raises ConfigError for a folder without a tokenizer and for one that cannot be read."""
    if not (directory / "tokenizer.json").is_file():
        raise ConfigError(f"no tokenizer.json in {directory}; set data.tokenizer to a folder that has one")
    refuse_pickles(directory)
    try:
        yield
    except OutsideRoots:
        raise
    except Exception as error:  # the libraries raise many types for a broken file
        raise ConfigError(f"the tokenizer in {directory} cannot be read: {error}") from error


def _eos_of_folder(directory: Path, fast: PreTrainedTokenizerFast) -> str | None:
    """The model config's end-of-text token, or else the first known one that the vocabulary holds."""
    config = directory / "config.json"
    if config.is_file():
        named = json.loads(config.read_text(encoding="utf-8")).get("eos_token_id")
        first = named[0] if isinstance(named, list) and named else named
        if isinstance(first, int):
            return str(fast.convert_ids_to_tokens(first))
    vocabulary = fast.get_vocab()
    return next((token for token in _KNOWN_EOS if token in vocabulary), None)


def build_tokenizer(
    data: DataConfig, catalog: CatalogConfig, model: ModelConfig, titles: Sequence[str],
    codes: Sequence[Sequence[str]] | None, task_markers: Sequence[str] = (), template: Template | None = None,
) -> Tokenizer:  # fmt: skip
    """The tokenizer that ``data.tokenizer`` names, able to write the template and every item as single codes.

    ``task_markers`` become single tokens as well (those of alignment tasks in the compact template). ``template``: None
    is the built-in one. ``auto`` is the folder ``model.init`` for pretrained weights, else ``codes`` for semantic IDs
    and ``bpe`` for titles. The same input gives the same ids. Raises ConfigError for combinations that cannot work,
    CatalogError for codes that are ambiguous when written without separators.
    """
    template = template or build_template(data.template, catalog.kind)
    kind = _resolve_kind(data, catalog, model)
    code_words = sorted({code for item in codes or () for code in item})
    if kind == "codes":
        tokenizer = Tokenizer(_code_vocabulary(template, code_words), EOS, PAD)
    elif kind == "bpe":
        tokenizer = Tokenizer(_train_bpe(template, titles, data.bpe_vocab_size), EOS, PAD)
    else:
        tokenizer = Tokenizer.load(Path(kind).expanduser())
    _add_tokens(tokenizer, [*template.markers, *task_markers, *code_words])
    if codes is not None:
        _check_codes(tokenizer, codes)
    return tokenizer


def _resolve_kind(data: DataConfig, catalog: CatalogConfig, model: ModelConfig) -> str:
    kind = data.tokenizer
    if kind == "auto":
        if model.init != "random":
            folder = local_folder(model.init, model.revision)
            if not folder.is_dir():
                raise ConfigError(
                    f"no tokenizer.json in {model.init}: model.init={model.init} is not a folder; name one with "
                    "pretrained weights and their tokenizer, or set model.init=random"
                )
            return str(folder)
        return "codes" if catalog.kind == "sid" else "bpe"
    if kind == "codes" and catalog.kind != "sid":
        raise ConfigError("data.tokenizer=codes writes semantic IDs; with catalog.kind=title use data.tokenizer=bpe")
    if kind in ("codes", "bpe") and model.init != "random":
        raise ConfigError(
            f"data.tokenizer={kind} would give the weights of model.init={model.init} other token ids than they were "
            "trained with; use data.tokenizer=auto, or model.init=random"
        )
    return kind


def _code_vocabulary(template: Template, code_words: Sequence[str]) -> Backend:
    """One token per code and per fixed piece of the template, whole; anything else is an error, not <unk>."""
    pieces = [*template.pieces, *code_words]
    vocabulary = {word: index for index, word in enumerate([PAD, EOS, *pieces])}
    # The unknown token is deliberately not in the vocabulary: the model then raises on text between added tokens.
    backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([PAD, EOS])
    backend.add_tokens([_whole(piece) for piece in pieces])
    return backend


def _train_bpe(template: Template, titles: Sequence[str], vocab_size: int) -> Backend:
    """Byte-level BPE, lossless (no normaliser), trained on the items as the template writes them."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[PAD, EOS, *template.markers],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Every prompt repeats the template, so its words weigh as much as one title each.
    words = [] if template.markers else [*template.pieces] * len(titles)
    backend.train_from_iterator([*map(template.answer, titles), *words], trainer)
    return backend


def _whole(text: str) -> AddedToken:
    """A token that is matched literally: never split, never normalised, no spaces swallowed on either side."""
    return AddedToken(text, single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)


def _add_tokens(tokenizer: Tokenizer, words: Sequence[str]) -> None:
    known = tokenizer.backend.get_added_tokens_decoder().values()
    present = {token.content for token in known}
    tokenizer.backend.add_tokens([_whole(word) for word in words if word not in present])


def _check_codes(tokenizer: Tokenizer, codes: Sequence[Sequence[str]]) -> None:
    """Joined codes must be read back as the same codes ("1" + "2" beside a code "12" would not be)."""
    rows = tokenizer.encode_batch(["".join(item) for item in codes])
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    for index, item in enumerate(codes):
        if rows[index].tolist() != [vocabulary[code] for code in item]:
            seen = [tokenizer.decode([token]) for token in rows[index]]
            raise CatalogError(
                f"catalog.index: the codes {list(item)} of item {index} are read back as {seen} when joined; "
                "give the codes delimiters, for example <a_12>"
            )
