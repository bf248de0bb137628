"""What a recipe may say: frozen dataclasses, one per section; every field has its default, meaning and limits here.

``load.py`` reads YAML into these classes; nothing else constructs them except tests. ``tawin-nemo keys [PREFIX]``
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


def choice(default: str, *others: str, help: str, imports: bool = False) -> Any:
    """One of several words; with ``imports`` also an import path (``config.seams``)."""
    return field(default=default, metadata={"help": help, "choices": (default, *others), "imports": imports})


def imports(help: str, *names: str) -> Any:
    """A list of import paths (``config.seams``) and of ``names``."""
    return field(default_factory=list, metadata={"help": help, "choices": names, "imports": True})


def words(default: list[str], help: str) -> Any:
    """A list of words, by default all that there are."""
    metadata = {"help": help, "choices": tuple(default), "imports": False}
    return field(default_factory=lambda: list(default), metadata=metadata)


@dataclass(frozen=True)
class Most:
    """The largest value of a key, and why no person can mean a larger one."""

    value: float
    why: str


COUNT = Most(1_000_000_000, "counters of 32 bits hold no more")
SEED = Most(2**31 - 1, "NumPy, torch and scikit-learn all take seeds of this size")
STEPS = Most(2**24, "the optimizer counts its steps in float32, which is exact up to there")
EPOCHS = Most(100_000, "no run has as many passes")
ROWS = Most(10_000_000, "all rows of a step are in memory at once")
TOKENS = Most(2**31 - 1, "positions in a batch are numbers of 32 bits")
PROMPT = Most(32_768, "no backbone here has more positions")
WORDS = Most(100_000, "no text of an item is as long")
LR = Most(1.0, "Adam moves every weight by about this much in one step")
WEIGHT = Most(1_000_000.0, "float32 keeps nothing of what is so much smaller beside it")
SHARE = Most(1.0, "it is a share")
TIMES = Most(100.0, "an epoch would repeat every row as often")
DROPOUT = Most(0.9, "hardly anything is left beyond it")
BEAMS = Most(4096, "no search has more beams")
WIDTH = Most(65_536, "no recommender here is as wide, nor does a row need as many items")
LAYERS = Most(1024, "no model here is as deep")
RANKS = Most(65_536, "no cluster has more processors for one job")
DEVICES = Most(256, "no machine has more GPUs, and the system ends where it cannot start processes")
THREADS = Most(1024, "no machine has more cores, and the system ends where it cannot start threads")
TRIES = Most(1000, "nothing is tried, or reviewed by one user, more often")
MONTH_MINUTES = Most(43_200.0, "a rank that hangs would not be noticed within a month")
WEEK_S = Most(604_800.0, "a client or server that hangs would not be noticed within a week")
TFLOPS = Most(1_000_000.0, "a hundred times the fastest device")
MEGABYTES = Most(1_000_000, "files and requests are written and read as a whole")
MEMORY_GB = Most(65_536.0, "no machine has more memory")
PORT = Most(65_535, "ports are numbers of 16 bits")
#: The sinks of the product that ``trainer.metric_sinks`` may name; ``run.sinks`` has them.
SINKS = ("tensorboard", "wandb", "mlflow", "prometheus", "otlp")


def number(
    default: float, low: float | None = None, high: Most | float = COUNT, *, why: str = "", help: str
) -> Any:  # fmt: skip
    """A number with inclusive limits; ``why``: the reason of an upper limit that is given as a number."""
    most = high if isinstance(high, Most) else Most(high, why)
    return field(default=default, metadata={"help": help, "low": low, "high": most.value, "why": most.why})


def numbers(default: list[int], low: int, high: Most, *, help: str) -> Any:
    """A list of numbers, each with inclusive limits."""
    metadata = {"help": help, "low": low, "high": high.value, "why": high.why}
    return field(default_factory=lambda: list(default), metadata=metadata)


# -- Recipe sections of supervised fine-tuning: the loop, and the tasks beside the next item.


@dataclass(frozen=True)
class SftConfig:
    enabled: bool = opt(True, "Runs SFT before RL.")
    rows: str = choice(
        "auto", "earlier", "fresh", "all",
        help="Selects rows of train: all, the earlier 1 - rl.fresh_share by time (earlier), or the rest (fresh); "
        "auto means earlier when rl.rows=fresh.",
    )  # fmt: skip
    epochs: int = number(
        30, 1, EPOCHS,
        help="Limits the passes over the rows; early stopping on valid ends SFT sooner, and cosine and linear "
        "schedules end here.",
    )  # fmt: skip
    global_batch_size: int = number(128, 1, ROWS, help="Sets the rows per optimizer step, over all ranks.")
    micro_batch_tokens: int = number(
        16384, 16, TOKENS, help="Sets the tokens per forward pass and rank; there is no padding."
    )
    lr: float = number(1e-3, 0.0, LR, help="Sets the peak learning rate.")
    schedule: str = choice(
        "constant", "cosine", "linear", help="Selects how the learning rate changes after the warm-up."
    )
    warmup: int = number(50, 0, STEPS, help="Sets the length of the linear warm-up, in optimizer steps.")
    min_lr_ratio: float = number(
        0.1, 0.0, SHARE, help="Sets the lowest learning rate of cosine and linear, as a share of lr."
    )
    watch: str = choice(
        "loss", "ndcg",
        help="Selects the metric on valid that stops SFT and chooses the checkpoint it hands on; ndcg searches "
        "max(eval.ks) beams.",
    )  # fmt: skip
    patience: int = number(1, 1, help="Stops SFT after this many checks on valid without progress.")
    min_delta: float = number(
        0.0, 0.0, WEIGHT, help="Sets the fall of the valid loss, or the rise of NDCG, that counts as progress."
    )
    checks_per_epoch: int = number(1, 1, EPOCHS, help="Sets the number of validations per epoch.")
    curriculum: float = number(
        0.0, 0.0, SHARE,
        help="Sets the share of all steps (sft.epochs) over which prompts change from texts alone to texts with "
        "model.item_tokens: at step t a row has them with probability t / steps (0 = all rows from the start).",
    )  # fmt: skip
    loss_space: str = choice(
        "vocab", "trie",
        help="Normalises the loss over the whole vocabulary (vocab) or over the admissible tokens (trie).",
    )  # fmt: skip


@dataclass(frozen=True)
class AlignConfig:
    """Further tasks of SFT: a task's weight is the share of its rows that an epoch adds (0 = off, 1 = all, 2 = twice).

    Needs catalog.kind=sid and a tokenizer that can write words. MiniOneRec (arXiv 2510.24431), LC-Rec (2311.09049).
    """

    title_to_sid: float = number(0.0, 0.0, TIMES, help="Weights the task: title of an item to its codes.")
    sid_to_title: float = number(0.0, 0.0, TIMES, help="Weights the task: codes of an item to its title.")
    history_to_title: float = number(
        0.0, 0.0, TIMES, help="Weights the task: codes of a history to the title of the next item."
    )
    titles_to_sid: float = number(
        0.0, 0.0, TIMES, help="Weights the task: titles of a history to the codes of the next item."
    )
    titles_to_title: float = number(
        0.0, 0.0, TIMES, help="Weights the task: titles of a history to the title of the next item."
    )
    description_to_sid: float = number(
        0.0, 0.0, TIMES, help="Weights the task: description of an item to its codes (LC-Rec)."
    )
    sid_to_description: float = number(
        0.0, 0.0, TIMES, help="Weights the task: codes of an item to its description (LC-Rec)."
    )
    intention_to_sid: float = number(
        0.0, 0.0, TIMES, help="Weights the task: what a customer wants to codes (LC-Rec); it needs align.intentions."
    )
    intentions: str = opt("", "Names the JSON file {external id: text} for intention_to_sid, below data.root.")
    max_words: int = number(64, 1, WORDS, help="Cuts descriptions and intentions after this many words.")
    holdout: float = number(
        0.05, 0.0, DROPOUT, help="Sets the share of items that tasks about single items are tested on."
    )
    tested_rows: int = number(512, 1, help="Limits the rows of train that each task is tested on after the stage.")


# -- Sections of a recipe besides training a language model: baselines, generate, convert, retrain, serve, tokenize.


@dataclass(frozen=True)
class BaselineConfig:
    """A classic recommender, trained and evaluated instead of the language model."""

    model: str = choice(
        "off", "gru4rec", "caser", "sasrec", "hstu", "esasrec", "tiger",
        help="Selects the recommender; off trains the language model.",
    )  # fmt: skip
    items: str = choice(
        "ids", "text",
        help="Takes item vectors from a table with a row per item (ids), or projects vectors of the item texts "
        "(semantic_ids.text) by a trained matrix, for gru4rec and sasrec (text: MoRec).",
    )  # fmt: skip
    training: str = choice(
        "windows", "sequences",
        help="Trains on one row per target (windows) or on one row per user, with all its targets in one pass "
        "(sequences; sasrec, hstu, esasrec). A sequence has at most data.max_history items; longer ones are cut.",
    )  # fmt: skip
    loss: str = choice(
        "softmax", "bce", "sampled_softmax", "trie",
        help="Selects the negatives: all items, for tiger all codes (softmax); sampled items, not for tiger, in a "
        "binary loss (bce) or a softmax (sampled_softmax); codes that lead to items, for tiger (trie).",
    )  # fmt: skip
    negatives: int = number(
        1, 1, WIDTH,
        help="Sets the sampled negatives: per positive with loss=bce; per optimizer step, shared by all its targets, "
        "with loss=sampled_softmax.",
    )  # fmt: skip
    negatives_from: str = choice(
        "uniform", "popularity",
        help="Draws the negatives of sampled_softmax uniformly or as often as they are targets in train.",
    )  # fmt: skip
    logq_correction: bool = opt(
        False, "Corrects the scores of negatives in sampled_softmax for how often they are drawn (logQ correction)."
    )
    temperature: float = number(
        0.0, 0.0, 100.0, why="all scores would be nearly the same",
        help="Ranks by cosines divided by it (sasrec, hstu, esasrec); 0 ranks by inner products.",
    )  # fmt: skip
    rows: str = choice(
        "all", "earlier",
        help="Selects rows of train: all, or the earlier 1 - rl.fresh_share by time, which a reward model needs.",
    )  # fmt: skip
    hidden: int = number(64, 4, WIDTH, help="Sets the width of embeddings and layers.")
    layers: int = number(2, 1, LAYERS, help="Sets the number of layers (all but caser).")
    heads: int = number(2, 1, LAYERS, help="Sets the number of attention heads (all but gru4rec and caser).")
    dropout: float = number(0.2, 0.0, DROPOUT, help="Sets the dropout probability on inputs and layers.")
    batch_size: int = number(
        256, 1, ROWS, help="Sets the rows per optimizer step; a row is a user with training=sequences."
    )
    epochs: int = number(200, 1, EPOCHS, help="Limits the passes over the rows.")
    patience: int = number(10, 1, help="Stops training after this many epochs without progress on valid.")
    lr: float = number(1e-3, 0.0, LR, help="Sets Adam's peak learning rate.")
    schedule: str = choice(
        "constant", "cosine", "linear",
        help="Selects how the learning rate changes after the warm-up, over all baseline.epochs.",
    )  # fmt: skip
    warmup: int = number(0, 0, STEPS, help="Sets the length of the linear warm-up, in optimizer steps.")
    min_lr_ratio: float = number(
        0.1, 0.0, SHARE, help="Sets the lowest learning rate of cosine and linear, as a share of lr."
    )
    weight_decay: float = number(0.0, 0.0, WEIGHT, help="Sets Adam's L2 penalty.")


@dataclass(frozen=True)
class GenerateConfig:
    split: str = choice(
        "test", "valid", "train", help="Selects the split whose prompts are answered when no history is given."
    )
    rows: int = number(3, 1, help="Sets the number of prompts of the split.")
    history: list[str] = opt(
        [],
        "Lists items, oldest first, to recommend for instead of prompts of the split: external ids, or numbers of "
        "items as 3 or #3.",
    )
    n: int = number(10, 1, BEAMS, help="Sets the recommendations per prompt.")


@dataclass(frozen=True)
class ConvertConfig:
    output: str = opt("", "Names the folder for the Hugging Face export.")
    shard_mb: int = number(2000, 1, MEGABYTES, help="Limits the size of a safetensors file, in MB.")


@dataclass(frozen=True)
class ScoreConfig:
    """The verb score: recommendation lists of another program, measured by the same evaluator."""

    lists: str = opt(
        "", "Names the file of lists to measure (Parquet, CSV, TSV or JSON lines), or a folder that recommend wrote."
    )
    output: str = opt(
        "", "Names the folder for the measured metrics and the per-user table (empty = RUN_DIR/NAME of the file)."
    )
    against: str = opt("", "Names a finished stage (RUN_DIR/rl) or a folder of score, for paired differences.")


@dataclass(frozen=True)
class RecommendConfig:
    """The verb recommend: the best items of many users, as Parquet in parts."""

    histories: str = opt(
        "",
        "Names Parquet, a file or a folder, with user_id and item_ids (external ids, oldest first), one row per user "
        "(empty = the prepared data's, see split).",
    )
    split: str = choice(
        "users", "test", "valid", "train",
        help="Selects the rows without histories: every user of the prepared data once, with all known items (users), "
        "or the rows of a split as evaluate reads them.",
    )  # fmt: skip
    output: str = opt("", "Names the folder for the lists (empty = RUN_DIR/recommend).")
    n: int = number(10, 1, BEAMS, help="Sets the items per list; max(n, eval.beams) beams are searched.")
    exclude_history: bool = opt(False, "Never lists an item of the user's own history.")
    allow: str = opt(
        "", "Names a file with the only items that lists may hold: an external id per line, or Parquet with item_id."
    )
    deny: str = opt("", "Names a file, in the form of allow, with items that no list may hold.")
    filter: list[str] = opt(
        [],
        "Lists FIELD=VALUE of the items table (brand=Acme): several values of one field are alternatives, several "
        "fields must all match.",
    )
    min_score: float = number(
        0.0, -1e6, 0.0, why="scores are sums of log-probs",
        help="Drops items with a score below this (0 = keeps all).",
    )  # fmt: skip
    unknown_items: str = choice(
        "error", "skip",
        help="Ends with an error when histories, allow or deny name items that the catalog does not have, or skips "
        "these.",
    )  # fmt: skip
    empty_histories: str = choice(
        "error", "skip",
        help="Ends with an error when a history has no item of the catalog, or gives this user an empty list.",
    )  # fmt: skip
    part_rows: int = number(
        8192, 1, ROWS, help="Sets the rows of an output file, which is what a stopped job loses at most per process."
    )
    shard_count: int = number(
        0, 0, RANKS,
        help="Divides the output files among this many jobs (0 = the tasks of a Slurm array, else 1).",
    )  # fmt: skip
    shard_index: int = number(
        -1, -1, RANKS,
        help="Selects the share of this job, from 0 (-1 = SLURM_ARRAY_TASK_ID in a Slurm array, else 0).",
    )  # fmt: skip


@dataclass(frozen=True)
class RetrainConfig:
    """The verb retrain: a night's model replaces the published one only if it passes the gate."""

    root: str = opt("", "Names the folder of the nightly runs, the published versions and the link `latest`.")
    date: str = opt("", "Uses interactions up to this day, YYYY-MM-DD (empty = today, UTC).")
    warm_start: bool = opt(True, "Starts from the published model, if there is one, instead of model.init.")
    metrics: list[str] = opt(["ndcg@10"], "Lists the metrics on valid that all have to pass the gate.")
    tail_k: int = number(
        50, 0, BEAMS,
        help="Adds Recall at this cut-off to retrain.metrics, so that a model that loses the tail of its lists is "
        "refused; at most eval.beams are listed (0 = off).",
    )  # fmt: skip
    margin: float = number(
        0.05, 0.0, SHARE,
        help="Lets the lower end of the 95 % interval of the difference lie this share of the published metric "
        "below 0.",
    )  # fmt: skip
    min_coverage: float = number(
        0.0, 0.0, SHARE,
        help="Refuses a model whose lists of 10 on valid hold less than this share of the catalog (0 = is not asked).",
    )  # fmt: skip
    max_latency_ms: float = number(
        0.0, 0.0, WEEK_S,
        help="Refuses a model whose 95th percentile of one search with eval.beams, alone on this machine, takes more "
        "milliseconds (0 = is not measured).",
    )  # fmt: skip
    keep: int = number(
        7, 1, ROWS, help="Keeps this many of the newest versions in `retrain prune`, besides the live one and the one "
        "before it.",
    )  # fmt: skip
    webhook: str = opt("", "Names an http or https address that gets a JSON body when the gate refuses a model.")
    webhook_s: float = number(
        10.0, 0.01, WEEK_S, help="Gives up on retrain.webhook after this many seconds; the exit code stays the same."
    )


@dataclass(frozen=True)
class ServeConfig:
    """The verb serve: HTTP in front of one engine."""

    host: str = opt("127.0.0.1", "Sets the address of the data plane; 0.0.0.0 makes it reachable from other machines.")
    port: int = number(
        8000, 0, PORT, help="Sets the port of the data plane (0 = any free one, see RUN_DIR/serve/address.json)."
    )
    control_host: str = opt("127.0.0.1", "Sets the address of the control plane.")
    control_port: int = number(8001, 0, PORT, help="Sets the port of the control plane (0 = any free one).")
    api_keys_file: str = opt(
        "", "Names a file with one API key of 16 characters or more per line (empty = no key is asked for)."
    )
    control_token_file: str = opt(
        "", "Names the file with the control plane's token (empty = one is made: RUN_DIR/serve/control_token)."
    )
    cors_origins: list[str] = opt(
        [], "Lists origins whose pages may call the data plane from a browser (empty = none)."
    )
    roots: list[str] = opt([], "Lists folders that weights and catalogs may be loaded from (empty = RUN_DIR).")
    catalogue: str = opt(
        "", "Names a JSON lines file of catalog items (external_id, title, codes) that replaces the data set's."
    )
    beams: int = number(0, 0, BEAMS, help="Sets the beams of a request that names none (0 = eval.beams).")
    max_beams: int = number(512, 1, BEAMS, help="Limits the beams, and the results, of a request.")
    max_prompts: int = number(16, 1, BEAMS, help="Limits the prompts of one completions request.")
    max_history: int = number(
        10000, 1, help="Limits the items of a history; the newest data.max_history of them are used."
    )
    max_items: int = number(
        10000, 1, help="Limits the items of an allow, deny or score list, and the values of a filter."
    )
    max_filters: int = number(256, 1, ROWS, help="Limits the distinct filters by item fields that are kept evaluated.")
    filter_cache_mb: int = number(64, 1, MEGABYTES, help="Limits the memory of filters that are kept evaluated, in MB.")
    max_body_kb: int = number(
        1024, 1, MEGABYTES, help="Limits the request body, in kB; larger requests get status 413."
    )
    max_queue: int = number(
        256, 1, ROWS, help="Limits the requests that wait for the engine; further ones get status 429."
    )
    token_budget: int = number(
        262144, 16, TOKENS, help="Limits the tokens held at once: prompts once, plus what their beams may run."
    )
    row_budget: int = number(8192, 1, ROWS, help="Limits the beams that run at once, over all requests.")
    join_after: int = number(
        1, 0, help="Lets this many model calls pass a waiting request by, so that more requests can join with it."
    )
    gather_ms: float = number(
        10.0,
        0.0,
        1000.0,
        why="a person notices a wait of more than a second",
        help="Limits how long an idle engine waits for as many requests as before, in milliseconds.",
    )
    deadline_s: float = number(
        30.0, 0.01, WEEK_S, help="Gives a request up after this many seconds with status 504; clients may ask for less."
    )
    rollout_deadline_s: float = number(
        600.0, 0.01, WEEK_S, help="Gives a rollout batch of a training job up after this many seconds."
    )
    read_timeout_s: float = number(
        10.0, 0.01, WEEK_S, help="Gives a client this many seconds to send a request; status 408 follows."
    )
    probe_s: float = number(2.0, 0.01, WEEK_S, help="Gives the engine this many seconds to answer /ready.")
    drain_s: float = number(60.0, 0.0, WEEK_S, help="Gives running requests this many seconds after SIGTERM.")
    keep_versions: int = number(
        0, 0, 64, why="each version may hold all weights of a model",
        help="Keeps this many pairs of weights and catalog behind the one in use in memory, for POST /rollback.",
    )  # fmt: skip
    log_history: bool = opt(False, "Writes users' histories and prompts into the log.")
    follow: str = opt(
        "", "Names a folder of `retrain.root`: the server starts with its `latest` and follows it (empty = off)."
    )
    follow_s: float = number(
        10.0, 0.01, WEEK_S, help="Looks at `latest` of serve.follow every so many seconds; a broken version is refused."
    )
    variant: str = opt(
        "",
        "Names this server's variant of an A/B test, in the metric tawin_server_info, in X-Variant of each response "
        "and in the log (empty = no test).",
    )


@dataclass(frozen=True)
class TextConfig:
    """Item texts -> vectors (semantic_ids.text)."""

    encoder: str = choice(
        "tfidf", "minilm", "hf", "file",
        help="Selects the encoder: TF-IDF and SVD of the catalog (tfidf), the MiniLM of the package gt-all-"
        "minilm-l6-v2, a Hugging Face folder (hf), or vectors made elsewhere (file).",
    )  # fmt: skip
    source: str = opt(
        "",
        "Names a folder with config.json, weights and tokenizer (encoder=hf), or a .npy with one row per item"
        " (encoder=file).",
    )
    fields: str = choice("title_description", "title", help="Selects the fields of an item that are read.")
    dims: int = number(
        256,
        2,
        4096,
        why="the SVD of a catalog has no more dimensions that carry text",
        help="Sets the dimensions of the vectors with encoder=tfidf.",
    )
    max_tokens: int = number(
        256, 8, PROMPT, help="Cuts texts after this many tokens and counts the cuts, with encoder=minilm or hf."
    )
    batch_size: int = number(64, 1, ROWS, help="Sets the texts per forward pass, with encoder=minilm or hf.")
    precision: str = choice(
        "fp32", "bf16", help="Selects the number format of the forward pass, with encoder=minilm or hf."
    )
    processes: int = number(
        1,
        1,
        256,
        why="more processes than that wait for each other's files",
        help="Sets the processes that share the texts, with encoder=minilm or hf.",
    )
    shard_items: int = number(
        4096,
        1,
        ROWS,
        help="Sets the items per file, with encoder=minilm or hf; a stopped run continues after the last file.",
    )


@dataclass(frozen=True)
class RqVaeConfig:
    """The networks of method=rqvae and method=rqkmeans_plus (semantic_ids.rqvae)."""

    widths: list[int] = numbers(
        [512, 256, 128], 1, WIDTH, help="Lists the widths of the encoder's hidden layers; the decoder mirrors them."
    )
    latent: int = number(
        32,
        1,
        WIDTH,
        help="Sets the dimensions that are quantised with method=rqvae; rqkmeans_plus has those of the text.",
    )
    epochs: int = number(100, 0, EPOCHS, help="Sets the passes over the items.")
    batch_size: int = number(1024, 1, ROWS, help="Sets the items per optimizer step.")
    lr: float = number(1e-3, 0.0, LR, help="Sets AdamW's peak learning rate, which falls to 0 by a cosine.")
    weight_decay: float = number(1e-4, 0.0, WEIGHT, help="Sets AdamW's weight decay, on all weights.")
    commitment: float = number(0.25, 0.0, WEIGHT, help="Weights the loss that pulls the latents to their codes.")
    update: str = choice(
        "gradient", "ema", help="Selects how codebooks learn: by their loss (gradient), or as moving averages (ema)."
    )
    ema_decay: float = number(0.99, 0.0, SHARE, help="Sets the share that a codebook keeps per step with update=ema.")
    sinkhorn: str = choice(
        "off", "last", "all", help="Selects the levels whose codes are balanced within a batch in training."
    )
    sinkhorn_epsilon: float = number(
        0.003, 1e-6, SHARE, help="Sets the entropy weight of Sinkhorn, as a share of the largest distance."
    )
    restart_after: int = number(
        2, 0, help="Moves a code to a random item after this many epochs without use (0 = never)."
    )
    save_interval: int = number(10, 1, help="Sets the epochs between checkpoints.")


@dataclass(frozen=True)
class SemanticIdsConfig:
    """The verb tokenize: item texts -> codes -> index.json."""

    output: str = opt("", "Names the folder of the index (empty = RUN_DIR/semantic_ids).")
    method: str = choice(
        "rqkmeans", "constrained", "rqkmeans_plus", "rqvae", "random",
        help="Selects residual k-means (rqkmeans), the same with balanced sizes (constrained), the same refined by"
        " networks (rqkmeans_plus), RQ-VAE, or random codes as a control.",
    )  # fmt: skip
    levels: int = number(3, 2, 8, why="codes are named <a_N> to <h_N>", help="Sets the tokens per item.")
    codes: int = number(256, 2, 65_536, why="codes are numbers of 16 bits", help="Sets the codes per level.")
    kmeans_iterations: int = number(50, 1, EPOCHS, help="Limits Lloyd's iterations per level.")
    collisions: str = choice(
        "assign", "sinkhorn", "dedup", "keep",
        help="Selects what items with equal codes get: the cheapest different last codes (assign), Sinkhorn's, one"
        " more token (dedup), or the same codes (keep).",
    )  # fmt: skip
    duplicates: str = choice(
        "separate", "refuse",
        help="Handles items with equal vectors like collisions (separate), or as an error (refuse).",
    )  # fmt: skip
    layout: str = choice(
        "minionerec", "lcrec", help="Selects the layout of index.json; lcrec gives all items the same number of tokens."
    )
    given: str = opt(
        "", "Names an index.json made elsewhere, found like catalog.index; it is reported, exported and grown as ours."
    )
    grow_from: str = opt(
        "", "Names an earlier output: its items keep their codes, new items get codes of its codebooks."
    )
    text: TextConfig = field(default_factory=TextConfig)
    rqvae: RqVaeConfig = field(default_factory=RqVaeConfig)


#: The precision of a part of the run that is that of ``model.precision``.
AS_MODEL = "model"
#: Values of rollout.precision, reference.precision and eval.precision.
PRECISIONS_OF_A_PART = (AS_MODEL, "fp32", "bf16", "fp8-blockwise", "fp8-tensorwise", "fp8-delayed")


#: Endings of files that data.template takes for Jinja templates, and the built-in templates.
JINJA_FILES = (".jinja", ".jinja2", ".j2")
TEMPLATES = ("compact", "alpaca")


@dataclass(frozen=True)
class DataConfig:
    root: str = opt("", "Names the folder with the data: prepared Parquet, or raw files that `dataset` names.")
    dataset: str = choice(
        "auto", "prepared", "inter", "candidates", "amazon", "yelp", "synthetic", "table", "split_csv", "parquet",
        help="Says what lies in data.root; auto detects it, and raw data is prepared into RUN_DIR/data first.",
        imports=True,
    )  # fmt: skip
    max_history: int = number(
        10,
        1,
        200,
        why="longer histories do not fit into the prompts of any backbone here",
        help="Limits the items of history in a sample; the newest are kept.",
    )
    template: str = opt(
        "compact",
        "Selects the prompt wording, the same in SFT, RL, evaluation and serving: compact, alpaca, a Jinja file"
        " (NAME.jinja), Jinja text, or an import path (package.module:name).",
    )
    chat: bool = opt(
        False, "Puts the tokenizer's own chat template around the prompt, as one user's message, for Instruct models."
    )
    tokenizer: str = opt(
        "auto",
        "Selects the tokenizer: auto, a folder with tokenizer.json, bpe (trained on the titles), or codes (of"
        " the index).",
    )
    bpe_vocab_size: int = number(
        2048,
        300,
        200_000,
        why="a larger vocabulary has tokens that no title of a catalog repeats",
        help="Sets the vocabulary size of a BPE trained on the catalog.",
    )
    max_prompt_tokens: int = number(
        512, 8, PROMPT, help="Limits the tokens of a prompt; longer ones lose their oldest items, each as a whole."
    )
    show_candidates: bool = opt(
        False, "Lists the row's candidate set in the prompt, behind the history (data with candidates)."
    )
    train_limit: int = number(0, 0, help="Uses only the last N training rows by time (0 = all).")
    eval_limit: int = number(0, 0, help="Uses only the first N rows of valid and of test (0 = all).")

    @property
    def jinja(self) -> bool:
        """``template`` is a Jinja file or Jinja text, not the name of a built-in template."""
        return self.template.endswith(JINJA_FILES) or "{{" in self.template or "{%" in self.template


@dataclass(frozen=True)
class ColumnsConfig:
    """Columns of a table (``data.dataset=table``), by their names, or by number from 1 in a file without header."""

    user: str = opt("", "Names the column with the user's id (empty = user_id, userId, reviewerID and the like).")
    item: str = opt("", "Names the column with the item's id (empty = item_id, parent_asin, movieId and the like).")
    time: str = opt("", "Names the column with the time (empty = timestamp, time, event_time and the like).")
    event: str = opt("", "Names the column that prepare.events filters (empty = event_type, action and the like).")
    rating: str = opt("", "Names the column that prepare.min_rating filters (empty = rating, overall, stars, score).")
    title: str = opt("", "Names the column with the item's title (empty = title, name, movie_title and the like).")
    description: str = opt("", "Names the column with the item's description (empty = description).")
    brand: str = opt("", "Names the column with the item's brand (empty = brand, store, manufacturer).")
    category: str = opt("", "Names the column with the item's category (empty = categories, genres and the like).")
    price: str = opt("", "Names the column with the item's price, for Jinja templates (empty = price, list_price).")


@dataclass(frozen=True)
class PrepareConfig:
    """Raw reviews -> samples; used when ``data.dataset`` is amazon, yelp, table, parquet or synthetic.

    Titles, entities and reserved tokens are treated in ready-made splits (inter, candidates, split_csv) as well.
    """

    reviews: str = opt(
        "", "Names the file with the log, relative to data.root; for table also a pattern such as part-*.parquet."
    )
    metadata: str = opt(
        "", "Names the item file, relative to data.root; a table may have none, and its titles are then the ids."
    )
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    events: list[str] = opt([], "Keeps only these kinds of events, such as purchase,cart (empty = all).")
    min_rating: float = number(0.0, 0.0, help="Keeps only rows with at least this rating (0 = all).")
    preset: str = choice(
        "auto", "none", "toys_and_games", "office_products", "industrial_and_scientific", "yelp",
        help="Selects the published time window; auto takes the one that the review file's name contains.",
    )  # fmt: skip
    start: str = opt(
        "", "Sets the first day of the time window, YYYY-MM-DD or YYYY-MM (empty = the published limit, if any)."
    )
    end: str = opt("", "Sets the last day or month of the time window, inclusive (empty = as for start).")
    k_core: int = number(5, 1, help="Drops users and items with fewer interactions, until nothing changes.")
    max_title_words: int = number(40, 1, WORDS, help="Drops items whose titles have more words, as noise.")
    max_title_chars: int = number(1000, 1, WORDS, help="Drops items whose titles have more characters, as noise.")
    reserved_tokens: str = choice(
        "drop", "escape",
        help="Drops items whose title holds a tokenizer's reserved token such as <|endoftext|>, or writes it with a "
        "space (escape).",
    )  # fmt: skip
    decode_entities: bool = opt(
        False, "Decodes HTML entities in the texts of ready-made splits (raw logs are always decoded)."
    )
    ties: str = choice(
        "file",
        "random",
        "item",
        help="Orders a user's interactions of the same time: as in the file, at random by seed, or by item id.",
    )
    split: str = choice(
        "ratio", "leave_one_out", "date",
        help="Splits 8:1:1 by time (ratio), takes each user's last target for test and the one before for valid "
        "(leave_one_out), or begins valid and test on given days (date).",
    )  # fmt: skip
    valid_start: str = opt("", "Sets the first day of valid for prepare.split=date, YYYY-MM-DD or YYYY-MM.")
    test_start: str = opt("", "Sets the first day of test for prepare.split=date, YYYY-MM-DD or YYYY-MM.")
    engine: str = choice(
        "polars", "duckdb",
        help="Selects what filters a raw log: polars in memory, or duckdb, which spills to disk beside RUN_DIR/data. "
        "Both write the same bytes.",
    )  # fmt: skip
    memory_limit_gb: float = number(
        2.0, 0.25, MEMORY_GB, help="Limits the memory of prepare.engine=duckdb, in GiB; beyond it DuckDB spills."
    )
    synthetic_items: int = number(2400, 50, ROWS, help="Sets the items of the generated catalog.")
    synthetic_users: int = number(6000, 50, ROWS, help="Sets the users of the generated review log.")
    synthetic_reviews_per_user: float = number(
        8.0, 1, TRIES, help="Sets the mean number of reviews of a generated user."
    )


@dataclass(frozen=True)
class CatalogConfig:
    kind: str = choice("title", "sid", help="Writes items as their title (title) or as semantic-ID codes (sid).")
    index: str = opt(
        "", "Names the JSON file {item: [codes]} for kind=sid, absolute or below data.root; * matches one file there."
    )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation (arXiv 2106.09685): ``y = W x + alpha / rank * B A x`` with frozen ``W``."""

    rank: int = number(
        0,
        0,
        WIDTH,
        help="Trains adapters of this rank in every stage and freezes all other weights (0 = trains the weights).",
    )
    alpha: float = number(16.0, 1e-6, WEIGHT, help="Scales what the adapters add by alpha / rank.")
    dropout: float = number(0.0, 0.0, DROPOUT, help="Sets the dropout in front of the adapters in SFT.")
    target_modules: list[str] = words(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        help="Lists the matrices of every decoder layer that get adapters, by their Hugging Face names.",
    )


@dataclass(frozen=True)
class ModelConfig:
    backbone: str = opt("tiny", "Names the backbone, one of config/backbones.py such as qwen2.5-0.5b.")
    init: str = opt(
        "random",
        "Takes the initial weights from a Hugging Face directory (config.json and safetensors) or a model of its hub"
        " (OWNER/NAME), or draws them (random).",
    )
    revision: str = opt("", "Names the branch, tag or commit of a hub model in init (empty = main).")
    new_tokens: str = choice(
        "mean", "text",
        help="Starts tokens that model.init does not know from its mean row (mean), or from the mean over the "
        "words of the titles that a code is used for (text); both get a little noise.",
    )  # fmt: skip
    item_tokens: str = opt(
        "",
        "Names a finished baseline stage (RUN_DIR/sasrec) whose vector of each item stands behind the item's text in "
        "prompts, projected to one token; the projection is trained (LLaRA).",
    )
    freeze_backbone: bool = opt(False, "Lets SFT train only the rows of tokens that model.init does not know.")
    dropout: float = number(
        0.0, 0.0, DROPOUT, help="Sets the hidden and attention dropout of SFT from scratch; RL runs without."
    )
    tensor_model_parallel_size: int = number(1, 1, RANKS, help="Sets the ranks that share each layer.")
    pipeline_model_parallel_size: int = number(
        1, 1, RANKS, help="Sets the groups of layers that lie on different ranks."
    )
    sequence_parallel: bool = opt(False, "Splits activations along the sequence between TP ranks.")
    precision: str = choice(
        "fp32", "bf16", "fp8-blockwise", "fp8-tensorwise", "fp8-delayed",
        help="Selects the number format of the matrix products: bf16 also runs on CPUs (much faster with AVX-512 "
        "BF16 or AMX); FP8 is for the decoder's linear layers on a Hopper GPU, while embedding, LM head, "
        "norms and attention stay bf16.",
    )  # fmt: skip
    num_layers_at_start_in_bf16: int = number(
        0, 0, LAYERS, help="Keeps this many decoder layers at the beginning in bf16 under FP8."
    )
    num_layers_at_end_in_bf16: int = number(
        0, 0, LAYERS, help="Keeps this many decoder layers at the end in bf16 under FP8."
    )
    recompute: str = choice(
        "none", "selective", "full", help="Selects the activations that the backward pass recomputes."
    )
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True)
class TrainerConfig:
    num_nodes: int = number(1, 1, RANKS, help="Sets the number of machines.")
    devices: int = number(1, 1, DEVICES, help="Sets the processes per machine, one per GPU (on CPU: gloo).")
    max_time: str = opt("", "Saves and exits with code 75 after this time, DD:HH:MM:SS (empty = no limit).")
    save_interval: int = number(50, 1, help="Sets the optimizer steps between checkpoints.")
    save_minutes: float = number(
        0.0, 0.0, MONTH_MINUTES, help="Also saves when the last checkpoint is this many minutes old (0 = never)."
    )
    val_check_interval: int = number(
        0, 0, help="Sets the optimizer steps between validations in RL (0 = only at the end)."
    )
    keep_last: int = number(2, 1, help="Sets the number of newest checkpoints that are kept.")
    keep_best: bool = opt(True, "Also keeps the checkpoint with the best valid metric.")
    monitor: str = opt(
        "",
        "Names the valid metric for keep_best where valid is searched: ndcg@K or recall@K (empty = ndcg@max(eval.ks)).",
    )
    async_save: bool = opt(
        False, "Writes checkpoints in a thread while training continues, which needs CPU memory for a copy."
    )
    collective_timeout: float = number(
        30.0, 0.1, MONTH_MINUTES, help="Sets the minutes after which a rank gives up waiting for the others."
    )
    threads: int = number(
        0, 0, THREADS,
        help="Sets the CPU threads per process (0 = one for small models, else this process's cores, shared by the "
        "ranks of its node).",
    )  # fmt: skip
    deterministic: bool = opt(
        False, "Computes the same bytes in equal runs on CUDA as well, more slowly; fails at an operation that cannot."
    )
    peak_tflops: float = number(
        0.0, 0.0, TFLOPS, help="Sets one device's peak for MFU, in TFLOP/s (0 = by GPU name, or a short measurement)."
    )
    distributed_optimizer: bool = opt(True, "Shards the optimizer state over data-parallel ranks.")
    grad_reduce_in_fp32: bool = opt(
        True, "Sums gradients in float32; off keeps them in bf16 under bf16 and FP8, with half the memory and traffic."
    )
    overlap_grad_reduce: bool = opt(
        False, "Sums gradients over replicas, bucket by bucket, while the backward pass still computes others."
    )
    overlap_param_gather: bool = opt(
        False, "Hands the new weights out while the next forward pass runs, which waits for each layer's weights."
    )
    offload_optimizer: bool = opt(
        False, "Keeps the optimizer state in pinned CPU memory and frees gradients while rollouts run."
    )
    clip_grad: float = number(1.0, 0.0, WEIGHT, help="Limits the gradient norm (0 = no clipping).")
    max_skipped_steps: int = number(
        10, 0, help="Limits the steps of a stage that may be skipped because a loss or gradient is not finite."
    )
    callbacks: list[str] = imports("Lists classes of your own (package.module:Class) that are told of steps and saves.")
    metric_sinks: list[str] = imports(
        "Lists what rank 0 sends its metrics to: sinks of the product (section sinks), and functions of your own "
        "(package.module:function).",
        *SINKS,
    )  # fmt: skip
    weight_decay: float = number(
        0.01, 0.0, WEIGHT, help="Sets AdamW's weight decay, which norms and biases do not get."
    )
    adam_beta2: float = number(0.999, 0.0, SHARE, help="Sets AdamW's decay of the second moment.")


@dataclass(frozen=True)
class SinksConfig:
    """Where the sinks of the product send what ``trainer.metric_sinks`` names them for."""

    project: str = opt("tawin-nemo", "Names the project in W&B, and the experiment in MLflow.")
    mlflow_uri: str = opt("", "Sets MLflow's tracking URI, http://HOST:PORT (empty = MLFLOW_TRACKING_URI).")
    mlflow_model: str = opt(
        "",
        "Registers each model that retrain publishes under this name in MLflow's model registry (empty = none is "
        "registered).",
    )
    mlflow_upload: bool = opt(
        False,
        "Uploads the registered model's files to MLflow; off registers the path of the published folder, which an "
        "MLflow server refuses.",
    )
    pushgateway: str = opt("", "Names the Prometheus Pushgateway of sink prometheus, HOST:PORT or a URL.")
    otlp_endpoint: str = opt(
        "",
        "Sets the OTLP/HTTP collector of sink otlp, a URL with its path (empty = OTEL_EXPORTER_OTLP_ENDPOINT, else "
        "http://localhost:4318/v1/metrics).",
    )


@dataclass(frozen=True)
class TawinConfig:
    """Threshold-adjusted windowed reweighting (arXiv 2604.22504, Section 3.3)."""

    enabled: bool = opt(True, "Weights the negatives of each group; off is the plain algorithm.")
    k: float = number(4.0, 1e-6, BEAMS, help="Sets the mass of the window, in ranks (Eq. 16).")
    tau: float = number(0.1, 1e-6, WEIGHT, help="Sets the softness of the window's border (Eq. 17).")
    anchor: float = number(2.0, 0.0, BEAMS, help="Sets the rank, counted from 0, at which the window lies.")
    target_k: int = number(0, 0, BEAMS, help="Aims at Recall@K by setting anchor = K - 1 (0 = use anchor).")
    window: str = choice(
        "centred", "start", help="Makes the anchor the window's centre (centred) or its low-FPR border (start)."
    )
    mass: str = choice(
        "mean1", "k",
        help="Scales the weights of the negatives to 1 on average (mean1), or leaves those of Eq. 20, which sum to k.",
    )  # fmt: skip


@dataclass(frozen=True)
class RlConfig:
    enabled: bool = opt(True, "Runs RL after SFT.")
    algorithm: str = choice("grpo", "dapo", "gspo", help="Selects the policy objective.", imports=True)
    init: str = choice(
        "sft", "base", "preference",
        help="Starts from the SFT stage (turns sft.enabled on unless that is set beside it), from model.init (base), "
        "or from the preference stage.",
    )  # fmt: skip
    rows: str = choice(
        "fresh", "all",
        help="Selects rows of train: the last fresh_share by time, which SFT has not seen (fresh), or all.",
    )  # fmt: skip
    fresh_share: float = number(0.2, 0.0, SHARE, help="Sets the share of train that is kept for RL.")
    prompts_per_step: int = number(64, 1, ROWS, help="Sets the prompts of one rollout, over all ranks.")
    group_size: int = number(
        16, 2, 512, why="a group is computed at once, and each step has many", help="Sets the candidates per prompt."
    )
    max_steps: int = number(0, 0, STEPS, help="Sets the number of rollouts (0 = what rl.epochs gives).")
    epochs: float = number(1.0, 0.0, EPOCHS, help="Sets the passes over the RL rows.")
    inner_updates: int = number(1, 1, EPOCHS, help="Sets the optimizer steps on each rollout (GRPO's mu).")
    micro_batch_tokens: int = number(
        32768, 16, TOKENS, help="Sets the tokens per forward pass and rank; there is no padding."
    )
    lr: float = number(1e-4, 0.0, LR, help="Sets the peak learning rate.")
    schedule: str = choice(
        "constant", "cosine", "linear", help="Selects how the learning rate changes after the warm-up."
    )
    warmup: int = number(0, 0, STEPS, help="Sets the length of the linear warm-up, in optimizer steps.")
    min_lr_ratio: float = number(
        0.1, 0.0, SHARE, help="Sets the lowest learning rate of cosine and linear, as a share of lr."
    )
    beta: float = number(1e-3, 0.0, WEIGHT, help="Weights the KL to the reference (0 = no reference is built).")
    kl: str = choice("k3", "k1", "k2", help="Selects the KL estimator.")
    kl_groups: str = choice(
        "all", "informative",
        help="Applies the KL to all groups, or only to those whose rewards differ (informative); the others are then "
        "not computed at all.",
    )  # fmt: skip
    clip_low: float = number(0.2, 0.0, SHARE, help="Clips the probability ratio below 1 - clip_low.")
    clip_high: float = number(0.2, 0.0, WEIGHT, help="Clips the probability ratio above 1 + clip_high.")
    policy_space: str = choice(
        "trie", "vocab",
        help="Selects the distribution of ratio, KL and loss: admissible tokens (trie) or all tokens (vocab).",
    )  # fmt: skip
    length_norm: str = choice(
        "full", "branching", help="Counts all tokens of the path as |Y| (full), or only the branching ones."
    )
    advantage: str = choice(
        "group",
        help="Selects the advantage: the reward, normalised within its group (group, see rl.std).",
        imports=True,
    )
    candidate_weights: str = choice(
        "tawin", help="Selects the weights of the candidates: those of TAWin (tawin, see rl.tawin).", imports=True
    )
    std: str = choice("population", "sample", help="Selects the standard deviation of the group.")
    negatives: str = choice(
        "beam", "sample", "dynamic",
        help="Takes candidates from beam search (beam), from independent constrained draws (sample), or keeps "
        "distinct ones out of more draws (dynamic).",
    )  # fmt: skip
    oversample: float = number(
        1.5,
        1.0,
        64.0,
        why="more draws than that find the same items again",
        help="Sets the draws per candidate that is kept, with negatives=dynamic.",
    )
    reward: str = choice(
        "rule", "ranking", "semantic", "collaborative",
        help="Selects the reward: rule is 1 for the target; the others add ReRe's rank penalty (ranking), the "
        "similarity to the target (semantic), or a sequential recommender's score (collaborative). A sum is "
        "written rule + 0.5 * package.module:function. Rewards that are not the goal can be gamed.",
        imports=True,
    )  # fmt: skip
    reward_weight: float = number(
        1.0, 0.0, WEIGHT, help="Weights the added term with reward=semantic or collaborative."
    )
    reward_source: str = opt(
        "", "Names a .npy with one row per item (reward=semantic), or a finished baseline stage (reward=collaborative)."
    )
    ensure_target: str = choice(
        "off", "replace_last",
        help="Puts the target into a group that lacks it, in place of the last candidate (replace_last).",
    )  # fmt: skip
    inserted_weight: float = number(1.0, 0.0, WEIGHT, help="Weights groups whose target was put in by ensure_target.")
    inserted_correction: str = choice(
        "none", "ratio",
        help="Weights a group whose target was put in by how likely the policy finds the target, against the last "
        "candidate it searched (ratio, at most 1).",
    )  # fmt: skip
    sft_weight: float = number(
        0.0, 0.0, WEIGHT, help="Weights the log-likelihood of the target beside the RL objective."
    )
    max_refill_batches: int = number(
        0, 0, TRIES, help="Limits the further rollouts that replace groups of equal rewards, with algorithm=dapo."
    )
    importance_cap: float = number(
        0.0, 0.0, WEIGHT, help="Caps the ratio of training to rollout probabilities (0 = no correction)."
    )
    tawin: TawinConfig = field(default_factory=TawinConfig)


@dataclass(frozen=True)
class PreferenceConfig:
    """Preference optimisation: the target of each row against rejected items (DPO's family, NAPO)."""

    enabled: bool = opt(False, "Runs preference optimisation after SFT and before RL.")
    algorithm: str = choice(
        "sdpo", "dpo", "simpo", "napo", "rosepo", "alpha_dpo",
        help="Selects the objective; dpo, sdpo, rosepo and alpha_dpo need a reference (section reference).",
    )  # fmt: skip
    init: str = choice("sft", "base", help="Starts from the SFT stage, or from model.init (or `start`).")
    rows: str = choice("all", "fresh", help="Selects the rows of train: all, or the last rl.fresh_share by time.")
    beta: float = number(1.0, 0.0, WEIGHT, help="Scales the implicit reward.")
    gamma0: float = number(1.0, 0.0, WEIGHT, help="Sets the margin of napo, simpo and alpha_dpo.")
    alpha: float = number(
        0.3,
        0.0,
        WEIGHT,
        help="Sets how far napo's margin follows the confidence, or alpha_dpo's weight of the normalised margin.",
    )
    rho: float = number(
        0.7, 0.0, SHARE, help="Sets the share of the group whose rejected items a row uses, for napo (0 = none)."
    )
    momentum: float = number(
        0.9, 0.0, SHARE, help="Sets the share that the running mean confidence keeps at each step, for napo."
    )
    margin: str = choice(
        "dynamic", "fixed", help="Lets the margin of napo follow the confidence of `aux`, or keeps it at gamma0."
    )
    epsilon: float = number(
        0.1,
        0.0,
        0.5,
        why="above a half the label means its opposite",
        help="Sets rosepo's probability of a wrong label; with `aux` its largest value, by that model's scores.",
    )
    negatives: str = choice(
        "random", "candidates", "beam", "self_play",
        help="Selects the rejected items: any, out of the candidate set, the best wrong ones of a beam search, or "
        "draws of the policy (SPRec); never the target.",
        imports=True,
    )  # fmt: skip
    num_negatives: int = number(
        3,
        1,
        1024,
        why="the loss compares a row with all of its rejected items at once",
        help="Sets the rejected items per row.",
    )
    num_candidates: int = number(
        20, 2, WIDTH, help="Sets the items of a candidate set, the target included, for negatives=candidates."
    )
    search_every: int = number(
        0,
        0,
        STEPS,
        help="Sets the steps between searches, for negatives=beam|self_play (0 = once per epoch).",
    )
    share_group: int = number(
        16, 1, ROWS, help="Sets the rows among which napo shares rejected items; a group is never split over ranks."
    )
    aux: str = opt("", "Names a finished baseline stage (RUN_DIR/sasrec) whose states and scores napo and rosepo use.")
    length_norm: str = choice(
        "auto", "full", "branching", "off",
        help="Divides a log-probability by all tokens of the path, by the branching ones, or not; auto = full for "
        "simpo, napo and alpha_dpo, else off.",
    )  # fmt: skip
    policy_space: str = choice("trie", "vocab", help="Selects the distribution of the log-probabilities.")
    epochs: float = number(1.0, 0.0, EPOCHS, help="Sets the passes over the rows.")
    max_steps: int = number(0, 0, STEPS, help="Limits the optimizer steps (0 = what `epochs` gives).")
    lr: float = number(1e-5, 0.0, LR, help="Sets the peak learning rate.")
    schedule: str = choice(
        "cosine", "constant", "linear", help="Selects the decay of the learning rate after the warm-up."
    )
    warmup: int = number(0, 0, STEPS, help="Sets the steps of linear warm-up.")
    min_lr_ratio: float = number(0.1, 0.0, SHARE, help="Sets the floor of cosine and linear decay, as a share of lr.")
    global_batch_size: int = number(128, 1, ROWS, help="Sets the rows per optimizer step over all ranks.")
    micro_batch_tokens: int = number(
        16384, 16, TOKENS, help="Limits the tokens per forward pass and rank; a sharing group stays whole."
    )

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
class AssistConfig:
    """An auxiliary recommender that joins the search (D3, arXiv 2406.14900): a log p_LLM + (1 - a) log p_aux."""

    stage: str = opt(
        "",
        "Names a finished baseline (RUN_DIR/sasrec) that joins the searches of finished stages' evaluation, evaluate, "
        "generate and serve, never those of training (empty = none).",
    )
    weight: float = number(
        0.5, 0.0, 1.0, why="it is the language model's share",
        help="Sets the language model's share a of every choice's score; the baseline's is 1 - a.",
    )  # fmt: skip


@dataclass(frozen=True)
class RolloutConfig:
    width: int = number(0, 0, BEAMS, help="Sets the beams in rollouts (0 = rl.group_size).")
    score_space: str = choice(
        "trie", "vocab", help="Ranks beams by log-probs over admissible tokens (trie) or over all tokens (vocab)."
    )
    length_penalty: float = number(
        0.0,
        -10.0,
        10.0,
        why="beyond it the power of a path's length leaves float32",
        help="Sets the exponent in the final score, sum log p / len^penalty.",
    )
    temperature: float = number(1.0, 1e-6, WEIGHT, help="Sets the temperature of constrained sampling.")
    token_budget: int = number(
        262144, 16, TOKENS, help="Limits the tokens held at once per rank: prompts once, plus what beams may run."
    )
    cuda_graphs: str = choice(
        "off", "on",
        help="Runs searches in trie space in fixed shapes, as CUDA graphs on a GPU (on), or in the shapes of the beams "
        "at hand (off).",
    )  # fmt: skip
    precision: str = choice(
        *PRECISIONS_OF_A_PART,
        help="Selects the number format of rollouts and of checks during training (model = model.precision); others "
        "search with a copy of the weights, which bf16 and FP8 share with training in the same layout.",
    )
    overlap_interval: int = number(
        10, 0,
        help="Finds the candidates of every so many-th RL step in model.precision as well (in bf16 where rollouts and "
        "training are in FP8) and logs rl/mismatch_beam_overlap, where two precisions are in use (0 = never).",
    )  # fmt: skip
    placement: str = choice(
        "colocated", "separate", "server",
        help="Runs rollouts and evaluation on the training ranks (colocated), on ranks that do nothing else "
        "(separate), or on generation servers (server).",
    )  # fmt: skip
    devices: int = number(0, 0, RANKS, help="Sets how many of all processes only search, with placement=separate.")
    ahead: int = number(
        0, 0, 1, why="the policy would be older than one update",
        help="Searches the next rollout during the update, by the old weights (1), with placement=separate.",
    )  # fmt: skip
    servers: list[str] = opt(
        [],
        "Lists the address.json of every server with placement=server (RUN_DIR/serve/address.json; read again"
        " when the server is lost).",
    )
    api_key_file: str = opt(
        "", "Names a file with a key of the servers' data planes, with placement=server (empty = none is asked for)."
    )
    control_token_file: str = opt(
        "",
        "Names a file with the token of the servers' control planes, with placement=server (empty = "
        "control_token beside address.json).",
    )
    server_timeout_s: float = number(
        600.0,
        0.1,
        WEEK_S,
        help="Gives a server this many seconds for a rollout or for new weights, with placement=server.",
    )
    server_tries: int = number(
        4,
        1,
        TRIES,
        help="Limits how often a part of a rollout is sent, to the same or another server, with placement=server.",
    )
    server_silent_s: float = number(
        60.0,
        0.1,
        WEEK_S,
        help="Takes a server for hung whose /health has not answered for this many seconds during a request, with"
        " placement=server.",
    )
    server_wait_s: float = number(
        300.0,
        0.0,
        WEEK_S,
        help="Waits this many seconds for a server to come back when none is left, with placement=server.",
    )
    weights_backend: str = choice(
        "auto", "gloo", "nccl", help="Selects what carries weights with placement=server (auto = as training)."
    )
    tensor_model_parallel_size: int = number(
        0, 0, RANKS, help="Sets the ranks that share each layer in searches (0 = as in training)."
    )
    pipeline_model_parallel_size: int = number(
        0, 0, RANKS,
        help="Sets the groups of layers in searches (0 = as in training); the ranks left over search other prompts.",
    )  # fmt: skip
    assist: AssistConfig = field(default_factory=AssistConfig)


@dataclass(frozen=True)
class ReferenceConfig:
    mode: str = choice(
        "copy", "swap", "off",
        help="Keeps the reference as a copy of its own (copy), on the CPU and swapped in (swap), or not at all "
        "(off, needs rl.beta=0).",
    )  # fmt: skip
    precision: str = choice(
        *PRECISIONS_OF_A_PART,
        help="Selects the reference's number format (model = model.precision; others need mode=copy).",
    )
    refresh: str = choice(
        "off", "every", "ema",
        help="Lets the reference follow the actor: never (off), in jumps (every), or smoothly (ema).",
    )  # fmt: skip
    refresh_steps: int = number(100, 1, STEPS, help="Sets the steps between copies of the actor with refresh=every.")
    refresh_decay: float = number(
        0.99, 0.0, SHARE, help="Sets the share that the reference keeps at each step with refresh=ema."
    )


@dataclass(frozen=True)
class EvalConfig:
    beams: int = number(50, 1, BEAMS, help="Sets the beam width of evaluation.")
    precision: str = choice(
        *PRECISIONS_OF_A_PART,
        help="Selects the number format of finished stages' evaluation, of evaluate and of generate (model = "
        "model.precision); checks during training run in rollout.precision.",
    )  # fmt: skip
    splits: list[str] = opt(["valid", "test"], "Lists the splits that a finished stage is evaluated on.")
    ks: list[int] = numbers([1, 3, 5, 10], 1, BEAMS, help="Lists the cut-offs of Recall@K and NDCG@K.")
    metrics: list[str] = imports(
        "Lists further metrics of your own (package.module:function), each at every K of eval.ks."
    )
    candidates: int = number(
        0, 0,
        help="Measures the candidate protocol as well: picks the target among this many items, those of the data or "
        "drawn ones (0 = off).",
    )  # fmt: skip
    auc: bool = opt(
        False,
        "Measures AUC, partial AUC and TAWin's windowed partial AUC over the full catalog as well, and how many of the "
        "best items the beams find; it ranks every item for every row, so it is for small catalogs.",
    )  # fmt: skip
    grounding: int = number(
        0, 0, BEAMS,
        help="Measures BigRec's full ranking as well: the best of this many beams of free text (1 = greedy), then the "
        "items nearest to its embedding (0 = off).",
    )  # fmt: skip
    auc_rows: int = number(0, 0, help="Limits eval.auc to so many evenly spaced rows (0 = all).")
    collision: str = choice(
        "fractional", "optimistic",
        help="Credits items that share one token path with 1/number sharing (fractional), or with a full hit "
        "(optimistic).",
    )  # fmt: skip
    token_budget: int = number(
        262144, 16, TOKENS, help="Limits the tokens held at once per rank: prompts once, plus what beams may run."
    )


@dataclass(frozen=True)
class CompareConfig:
    """Rows printed beside RL, so that its gain can be judged."""

    sft_continued: bool = opt(True, "Continues SFT on the rows that RL uses, with early stopping.")
    sft_continued_lr: float = number(
        0.0, 0.0, LR, help="Sets the constant learning rate of sft_continued (0 = sft.lr with sft.schedule)."
    )
    sft_all: bool = opt(False, "Runs SFT on all training rows.")
    zero_shot: bool = opt(
        False,
        "Evaluates the model that the run starts from (model.init or start) as it is: plain prompting, without any "
        "training.",
    )


@dataclass(frozen=True)
class Recipe:
    name: str = opt("run", "Names the run; the run directory is runs/NAME.")
    seed: int = number(42, 0, SEED, help="Seeds data order, initial weights, dropout and sampling.")
    run_dir: str = opt("", "Names the folder that the run writes to (empty = runs/NAME).")
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
    start: str = opt("", "Takes the weights of a finished stage (RUN_DIR/sft) or of a step_N instead of model.init.")
    profile: str = choice("off", "torch", "nsys", help="Profiles steps 2-4 of each stage; torch writes STAGE/profile/.")
    checkpoint: str = opt(
        "",
        "Names the stage of a run (RUN_DIR/rl), or one of its step_N, for evaluate, generate, recommend, convert and "
        "serve.",
    )
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    recommend: RecommendConfig = field(default_factory=RecommendConfig)
    retrain: RetrainConfig = field(default_factory=RetrainConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    semantic_ids: SemanticIdsConfig = field(default_factory=SemanticIdsConfig)
    sinks: SinksConfig = field(default_factory=SinksConfig)
    exp_manager: dict[str, Any] = opt(
        {}, "Passes these keys to NeMo's exp_manager (TensorBoard, W&B, MLflow); empty = not used."
    )
    code: dict[str, str] = opt(
        {}, "Holds the hashes of the sources that import paths name; a run writes them, whatever is given here."
    )

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

    @property
    def rollout_precision(self) -> str:
        """Number format of rollouts and of checks during training."""
        return self.model.precision if self.rollout.precision == AS_MODEL else self.rollout.precision

    @property
    def eval_precision(self) -> str:
        """Number format of finished stages' evaluation and of the verbs that search."""
        return self.model.precision if self.eval.precision == AS_MODEL else self.eval.precision
