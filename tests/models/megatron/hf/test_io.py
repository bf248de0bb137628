"""Import and export against transformers' own models (one process; layouts are in tests/distributed)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from tawin_nemo.config.backbones import with_vocab
from tawin_nemo.config.schema import ModelConfig
from tawin_nemo.models.megatron.hf.config import backbone_from_hf
from tawin_nemo.models.megatron.hf.io import load_hf, save_hf
from tawin_nemo.models.megatron.model import build
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.util.errors import CheckpointError, ConfigError
from tests.models.megatron.hf.random_models import VOCAB, random_model

LOGITS_ATOL = 1e-5  # float32, another order of the sums
MODELS = (
    "qwen2-tied", "qwen2-untied", "qwen3-tied", "qwen3-untied", "llama-tied", "llama-untied", "llama9-tied",
    "mistral-untied",
)  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    kind, tied = request.param.split("-")
    model = random_model(kind, tied=tied == "tied")
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    random_model("qwen2", tied=False).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def imported(folder: Path, *, vocab: int = 0):
    runtime.initialize(ModelConfig(), seed=0)
    shape = with_vocab(backbone_from_hf(folder), vocab)
    model = build_model(shape, ModelConfig(), seed=3)
    load_hf(model, shape, folder)
    return shape, model.eval()


@pytest.mark.parametrize("vocab", [0, VOCAB + 5])
def test_a_model_that_is_to_be_loaded_needs_no_initial_weights(
    source: tuple[Path, PreTrainedModel], vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its memory held: here not-a-number. New tokens begin as they do in a model drawn as a whole."""
    folder, _ = source
    shape, whole = imported(folder, vocab=vocab)
    drawn = build.init_weights

    def over_garbage(model, *arguments, **named):
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
        drawn(model, *arguments, **named)

    monkeypatch.setattr(build, "init_weights", over_garbage)
    model = build_model(shape, ModelConfig(), seed=3, to_be_loaded=True)
    assert any(bool(parameter.isnan().any()) for parameter in model.parameters())
    load_hf(model, shape, folder)
    for (name, one), (_, other) in zip(whole.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_logits_equal_those_of_transformers(source: tuple[Path, PreTrainedModel]) -> None:
    folder, theirs = source
    _, model = imported(folder)
    tokens_BT = torch.randint(0, VOCAB, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden_SBD = model(tokens_BT, torch.arange(100).expand(2, -1), None)
        weight_VD = dict(model.named_parameters()).get("output_layer.weight", model.embedding.word_embeddings.weight)
        logits_BTV = (hidden_SBD @ weight_VD.t()).transpose(0, 1)
        expected_BTV = theirs(tokens_BT).logits
    assert expected_BTV.std() > 0.5  # the comparison is not one of zeros
    torch.testing.assert_close(logits_BTV, expected_BTV, atol=LOGITS_ATOL, rtol=LOGITS_ATOL)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 9000])
def test_round_trip_is_bit_for_bit(source: tuple[Path, PreTrainedModel], tmp_path: Path, max_shard_bytes: int) -> None:
    folder, theirs = source
    shape, model = imported(folder)
    save_hf(model, shape, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert ("model.safetensors" in files) == (max_shard_bytes == 10**9)
    assert all((tmp_path / "out" / name).stat().st_size < max_shard_bytes + 20_000 for name in files)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(again) is type(theirs)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    _, reimported = imported(tmp_path / "out")  # our own reader, from one file and from several
    for (name, ours), other in zip(model.named_parameters(), reimported.parameters(), strict=True):
        assert torch.equal(ours, other), name


def test_export_in_bf16_rounds_once(saved: Path, tmp_path: Path) -> None:
    shape, model = imported(saved)
    save_hf(model, shape, tmp_path / "out", dtype=torch.bfloat16)
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in load_file(saved / "model.safetensors").items():
        assert torch.equal(written[name], tensor.bfloat16()), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_new_vocabulary_rows_are_the_mean_plus_the_drawn_values(source: tuple[Path, PreTrainedModel]) -> None:
    folder, theirs = source
    shape, model = imported(folder, vocab=VOCAB + 5)
    drawn = build_model(shape, ModelConfig(), seed=3)
    pairs = [("embedding.word_embeddings.weight", theirs.get_input_embeddings().weight)]
    if not shape.tied:
        pairs.append(("output_layer.weight", theirs.get_output_embeddings().weight))
    for name, old in pairs:
        new, initial = model.get_parameter(name), drawn.get_parameter(name)
        assert torch.equal(new[:VOCAB], old)
        torch.testing.assert_close(new[VOCAB:], old.mean(0) + initial[VOCAB:], atol=1e-6, rtol=0)
        assert len(new[VOCAB:].unique(dim=0)) == 5  # new tokens differ from each other


def test_tokenizer_files_travel_along(saved: Path, tmp_path: Path) -> None:
    shape, model = imported(saved)
    (tmp_path / "tok").mkdir()
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        save_hf(model, shape, tmp_path / "out", tokenizer_dir=tmp_path / "tok")
    assert not (tmp_path / "out").exists()
    (tmp_path / "tok" / "tokenizer.json").write_text("{}")
    (tmp_path / "tok" / "weights.bin").write_text("not a tokenizer file")
    save_hf(model, shape, tmp_path / "out", tokenizer_dir=tmp_path / "tok")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.self_attn.k_proj.bias"),
            r"missing \['model.layers.1.self_attn.k_proj.bias'\]",
        ),
        (lambda t: t.update({"model.extra": torch.zeros(1)}), r"unexpected \['model.extra'\]"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(31)}),
            r"model.norm.weight has shape \[31\].*needs \[32\]",
        ),
        (lambda t: t.update({"lm_head.weight": torch.zeros(VOCAB + 1, 32)}), r"lm_head.weight has shape \[38, 32\]"),
    ],
)
def test_wrong_tensors_are_named(saved: Path, change, message: str) -> None:
    rewrite(saved, change)
    with pytest.raises(CheckpointError, match=message):
        imported(saved)


def test_a_second_head_must_agree_with_tied_weights(tmp_path: Path) -> None:
    random_model("qwen2", tied=True).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    imported(tmp_path)
    rewrite(tmp_path, lambda t: t["lm_head.weight"].add_(1.0))
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs.*tie_word_embeddings"):
        imported(tmp_path)


def test_missing_and_damaged_files_are_named(saved: Path) -> None:
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        imported(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has neither"):
        imported(saved)
    (saved / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map"):
        imported(saved)
