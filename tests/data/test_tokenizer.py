"""The three kinds of tokenizer behind one wrapper."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tawin_nemo.config.schema import CatalogConfig, DataConfig, ModelConfig
from tawin_nemo.data.prompts import ANSWER_MARK, ITEM_MARK, Template
from tawin_nemo.data.tokenizer import EOS, PAD, Tokenizer, build_tokenizer, read_vocabulary
from tawin_nemo.util.errors import CatalogError, ConfigError, DataError
from tawin_nemo.util.files import sha256

ROOT = Path(__file__).parents[2]
TITLES = [f"Acme {size} inch steel {part}" for size in (1, 2, 10) for part in ("bolt", "washer", 'hose 3/4"')]
CODES = [[f"<a_{i % 3}>", f"<b_{i}>"] for i in range(6)]
SID, TITLE = CatalogConfig(kind="sid"), CatalogConfig(kind="title")
RANDOM = ModelConfig()


def bpe(template: str = "compact", titles: list[str] = TITLES) -> Tokenizer:
    return build_tokenizer(DataConfig(template=template, bpe_vocab_size=400), TITLE, RANDOM, titles, None)


def codes(template: str = "compact") -> Tokenizer:
    return build_tokenizer(DataConfig(template=template), SID, RANDOM, TITLES, CODES)


SHARED_BPE = bpe()


@pytest.mark.parametrize("template", ["compact", "alpaca"])
def test_code_vocabulary_has_one_row_per_code_piece_and_special_token(template: str):
    tokenizer = codes(template)
    distinct = {code for item in CODES for code in item}
    assert tokenizer.size == 2 + len(Template(template, kind="sid").pieces) + len(distinct)
    assert sorted(tokenizer.fast.get_vocab().values()) == list(range(tokenizer.size))
    assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)


@pytest.mark.parametrize("template", ["compact", "alpaca"])
def test_code_prompts_have_one_token_per_code_and_piece(template: str):
    words = Template(template, kind="sid")
    tokenizer = codes(template)
    prompt = words.prompt(["".join(item) for item in CODES[:3]])
    row = tokenizer.encode_batch([prompt])[0]
    separators = 2 if words.separator else 0
    assert len(row) == 1 + 3 * 2 + separators + 1
    assert tokenizer.decode(row) == prompt


@pytest.mark.parametrize("text", ["hello", "<a_0> <b_1>", "<a_0><b_77>", "<a_0>\n"])
def test_text_outside_the_code_vocabulary_is_an_error(text: str):
    with pytest.raises(DataError, match="the tokenizer has no tokens for"):
        codes().encode_batch(["<a_0><b_0>", text])


def test_the_error_shows_the_text_that_cannot_be_written():
    with pytest.raises(DataError, match="<b_77>"):
        codes().encode_batch(["<a_0><b_0>", "<a_0><b_77>"])


def test_ids_depend_on_the_input_only():
    assert codes().fingerprint == codes().fingerprint
    assert bpe().fingerprint == bpe().fingerprint
    assert bpe().fingerprint != bpe(titles=[*TITLES, "another nut", "another nut"]).fingerprint


@settings(max_examples=60)
@given(st.text())
def test_bpe_is_lossless(text: str):
    assert SHARED_BPE.decode(SHARED_BPE.encode_batch([text])[0]) == text


def test_markers_are_single_tokens_that_leave_spaces_alone():
    text = f"{ITEM_MARK} a {ITEM_MARK} b {ANSWER_MARK} c"
    row = SHARED_BPE.encode_batch([text])[0]
    marks = SHARED_BPE.encode_batch([ITEM_MARK, ANSWER_MARK])
    assert marks.lengths.tolist() == [1, 1]
    assert (row == marks.flat[0]).sum() == 2
    assert SHARED_BPE.decode(row) == text


def test_an_encoded_batch_equals_single_texts_and_adds_nothing():
    texts = ["", *TITLES]
    rows = SHARED_BPE.encode_batch(texts)
    assert rows.lengths[0] == 0
    for index, text in enumerate(texts):
        assert rows[index].tolist() == SHARED_BPE.fast.encode(text, add_special_tokens=False)
    assert len(SHARED_BPE.encode_batch([])) == 0


@pytest.mark.parametrize("make", [bpe, codes])
def test_saved_tokenizer_is_read_by_auto_tokenizer_with_the_same_ids(make, tmp_path: Path):
    tokenizer = make()
    text = tokenizer.decode(range(tokenizer.size)) if make is codes else "".join(TITLES)
    tokenizer.save(tmp_path)
    loaded, auto = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    expected = tokenizer.encode_batch([text])[0].tolist()
    assert loaded.encode_batch([text])[0].tolist() == expected
    assert auto.encode(text, add_special_tokens=False) == expected
    assert (loaded.eos_id, loaded.pad_id, loaded.size) == (tokenizer.eos_id, tokenizer.pad_id, tokenizer.size)
    assert read_vocabulary(tmp_path) == loaded.fast.get_vocab()
    assert loaded.fingerprint == tokenizer.fingerprint == sha256(tmp_path / "tokenizer.json")


def test_saving_leaves_other_files_of_the_folder_alone(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    bpe().save(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"


def test_codes_are_appended_to_a_given_tokenizer(tmp_path: Path):
    base = bpe("alpaca")
    base.save(tmp_path)
    data = DataConfig(template="alpaca", tokenizer=str(tmp_path))
    tokenizer = build_tokenizer(data, SID, RANDOM, TITLES, CODES)
    distinct = sorted({code for item in CODES for code in item})
    assert tokenizer.size == base.size + len(distinct)
    assert tokenizer.encode_batch(["".join(distinct)])[0].tolist() == list(range(base.size, tokenizer.size))
    assert tokenizer.encode_batch(TITLES).flat.tolist() == base.encode_batch(TITLES).flat.tolist()
    spaced = f"a {distinct[0]} b"
    assert tokenizer.decode(tokenizer.encode_batch([spaced])[0]) == spaced


def test_building_from_a_saved_result_adds_nothing(tmp_path: Path):
    first = codes()
    first.save(tmp_path)
    again = build_tokenizer(DataConfig(), SID, ModelConfig(init=str(tmp_path)), TITLES, CODES)
    assert again.fingerprint == first.fingerprint


def test_codes_that_cannot_be_told_apart_when_joined_are_refused():
    ambiguous = [["1", "2"], ["12", "1"]]
    with pytest.raises(CatalogError, match=r"item 0 are read back as \['12'\]"):
        build_tokenizer(DataConfig(), SID, RANDOM, TITLES[:2], ambiguous)


@pytest.mark.parametrize(
    ("data", "catalog", "model", "message"),
    [
        (DataConfig(tokenizer="codes"), TITLE, RANDOM, "data.tokenizer=codes"),
        (DataConfig(tokenizer="bpe"), TITLE, ModelConfig(init="some/folder"), "data.tokenizer=bpe"),
        (DataConfig(tokenizer="no/such/folder"), TITLE, RANDOM, "no tokenizer.json in no/such/folder"),
        (DataConfig(), TITLE, ModelConfig(init="no/such/folder"), "no tokenizer.json in no/such/folder"),
        (DataConfig(), TITLE, ModelConfig(init="/no/such/folder"), "model.init=/no/such/folder is not a folder"),
    ],
)
def test_impossible_choices_are_refused_by_key(data, catalog, model, message: str):
    with pytest.raises(ConfigError, match=message):
        build_tokenizer(data, catalog, model, TITLES, CODES if catalog is SID else None)


def test_end_of_text_is_the_config_s_or_the_first_known_one(tmp_path: Path):
    bpe().save(tmp_path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).unlink()
    assert Tokenizer.load(tmp_path).eos_id == bpe().fast.convert_tokens_to_ids(EOS)
    pad = bpe().fast.convert_tokens_to_ids(PAD)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [pad, 7]}))
    assert Tokenizer.load(tmp_path).eos_id == pad


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path: Path):
    bpe().save(tmp_path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).unlink()
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace(EOS, "<|unheard_of|>"))
    with pytest.raises(ConfigError, match="no end-of-text token"):
        Tokenizer.load(tmp_path)


def test_a_broken_file_is_refused_by_folder(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=f"the tokenizer in {tmp_path} cannot be read"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ConfigError, match=f"the tokenizer in {tmp_path} cannot be read"):
        read_vocabulary(tmp_path)
    with pytest.raises(ConfigError, match=r"no tokenizer\.json in .*/elsewhere"):
        read_vocabulary(tmp_path / "elsewhere")


def test_words_that_only_the_config_adds_are_known_too(tmp_path: Path):
    bpe().save(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    told = json.loads(file.read_text())
    told["added_tokens_decoder"] = {"400": {"content": "<|late|>", "special": True}}
    file.write_text(json.dumps(told))
    assert read_vocabulary(tmp_path)["<|late|>"] == 400


@pytest.mark.real_data
def test_qwen_folder_without_config(qwen_tokenizer: Path):
    tokenizer = Tokenizer.load(qwen_tokenizer)
    assert tokenizer.encode_batch(["Hello world"])[0].tolist() == [9707, 1879]
    assert tokenizer.eos_id == 151643
    assert tokenizer.size == 151643 + 22
    assert read_vocabulary(qwen_tokenizer) == tokenizer.fast.get_vocab()


@pytest.mark.parametrize("build", [bpe, codes])
def test_an_own_folder_is_read_without_transformers_and_means_the_same(build, tmp_path: Path):
    """Importing transformers costs seconds of every start; its reading is the reference."""
    made = build()
    made.save(tmp_path)
    code = (
        "import sys; from pathlib import Path; from tawin_nemo.data.tokenizer import Tokenizer\n"
        f"own = Tokenizer.load(Path({str(tmp_path)!r}))\n"
        "print(own.fingerprint, own.size, own.eos_id, own.pad_id, 'transformers' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    reference = AutoTokenizer.from_pretrained(tmp_path)
    fingerprint = hashlib.sha256(reference.backend_tokenizer.to_str(pretty=True).encode()).hexdigest()
    assert shown.split() == [
        fingerprint, str(made.size), str(reference.eos_token_id), str(reference.pad_token_id), "False"
    ]  # fmt: skip
