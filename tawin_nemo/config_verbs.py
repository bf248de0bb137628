"""Sections of a recipe besides training a language model: baselines, and generate, convert, retrain, serve."""

from __future__ import annotations

from dataclasses import dataclass

from tawin_nemo.options import choice, number, opt


@dataclass(frozen=True)
class BaselineConfig:
    """A classic recommender, trained and evaluated instead of the language model."""

    model: str = choice("off", "gru4rec", "caser", "sasrec", "tiger", help="which one; off = the language model")
    loss: str = choice("softmax", "bce", help="all items as negatives, or sampled ones (not tiger)")
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
    deadline_s: float = number(30.0, 0.01, help="seconds after which a request is given up (504); clients may ask less")
    read_timeout_s: float = number(10.0, 0.01, help="seconds that a client may take to send a request (408)")
    probe_s: float = number(2.0, 0.01, help="seconds in which the engine has to answer /ready")
    drain_s: float = number(60.0, 0.0, help="seconds that running requests get after SIGTERM")
    log_history: bool = opt(False, "write users' histories and prompts into the log")
