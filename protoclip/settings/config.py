"""Every setting of a run, its checks, and its way to JSON and back; presets.

A setting's field holds its default, meaning and limits. Its flag has OpenCLIP's name if OpenCLIP
has the flag, otherwise the ProtoCLIP authors' name if they have it; ``settings.flags`` makes the
parsers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from protoclip.common.json_text import parse_json

PRECISIONS = ("auto", "fp32", "amp_bf16", "amp")
BOARDS = ("tensorboard", "wandb", "tensorboard,wandb", "none")
PRESETS = Path(__file__).parent / "presets"
# How to read pairs that are not built in.
TABLE = (
    *("csv_separator", "csv_img_key", "csv_caption_key", "csv_encoding", "skip_bad"),
    "class_template",
)
FEATURES = "features:"  # begins the name of two or more files of rows, joined by "::"
Config = TypeVar("Config")
to_dict = dataclasses.asdict  # a config as a nested plain dict, ready for JSON


def default_clusters(samples: int) -> int:
    """The number of prototypes where none is set: a tenth of the samples that are clustered."""
    return max(1, samples // 10)


def option(
    default: Any,
    help: str,
    *,
    flag: str = "",
    choices: Any = None,
    low: Any = 0,
    high: Any = None,
    fixed: bool = False,
    words: Mapping[str, int] | None = None,
) -> Any:
    """A dataclass field that is also a flag.

    ``low`` and ``high`` limit numbers, inclusively. ``fixed``: the setting decides the order of the
    samples or the set of tensors, so a resumed run must keep it. ``words`` stand for numbers, in
    flags and files.
    """
    metadata = {
        "help": help,
        "flag": flag,
        "choices": choices,
        "low": low,
        "high": high,
        "fixed": fixed,
        "words": words or {},
    }
    return field(default=default, metadata=metadata)


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a nested dict of settings to dotted names."""
    sections = {key: value for key, value in settings.items() if isinstance(value, dict)}
    named = {f"{key}.{name}": x for key, section in sections.items() for name, x in section.items()}
    return named | {key: value for key, value in settings.items() if key not in sections}


def from_dict(cls: type[Config], values: Mapping[str, Any], base: Config | None = None) -> Config:
    """The inverse of ``to_dict``; missing settings come from ``base``, or are the defaults.

    Raises:
        ValueError: a setting that ``cls`` does not have, or a value of another type.
    """
    base = base or cls()
    settings = vars(base)
    if unknown := set(values) - set(settings):
        raise ValueError(
            f"config: {cls.__name__} has no {sorted(unknown)}; it knows {sorted(settings)}. "
            "The file is from another version of protoclip, or misspelt"
        )
    changes = {}
    fields = dataclasses.fields(base)  # type: ignore[arg-type]
    words = {item.name: item.metadata.get("words", {}) for item in fields}
    for key, value in values.items():
        expected = type(settings[key])
        if isinstance(value, str):
            value = words[key].get(value, value)
        if dataclasses.is_dataclass(expected) and isinstance(value, Mapping):
            value = from_dict(expected, value, settings[key])
        elif expected is float and type(value) is int:
            value = float(str(value))  # inf, which is refused, where float(int) would overflow
        if type(value) is not expected:
            raise ValueError(f"config: expected {expected.__name__} for {key}, got {value!r}")
        changes[key] = value
    return replace(base, **changes)  # type: ignore[type-var]


def flag_of(item: dataclasses.Field) -> str:
    """The flag of a setting."""
    return "--" + (item.metadata["flag"] or item.name.replace("_", "-"))


def check(config: Any) -> None:
    """Raise ValueError, naming the flag, for the first value outside its limits or choices."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            check(value)
            continue
        low = item.metadata["low"]
        high = item.metadata["high"]
        choices = item.metadata["choices"]
        wanted = ""
        if choices is not None and value not in choices:
            wanted = f"one of {', '.join(choices)}"
        elif isinstance(value, float) and not math.isfinite(value):
            wanted = "a finite number"
        elif isinstance(value, int | float) and value < low:
            wanted = f"at least {low}"
        elif high is not None and value > high:
            wanted = f"at most {high}"
        if wanted:
            raise ValueError(f"{flag_of(item)}: expected {wanted}, got {value!r}")


@dataclass(frozen=True)
class DataConfig:
    """Data"""

    train_data: str = option(
        "builtin:icons",
        "builtin:icons, builtin:shapes[:N], a .csv/.tsv file, a folder of class folders, "
        "webdataset shards or parquet files ('d/{000..012}.tar', globs, folders, URLs; sources "
        "joined by '::'), or a folder of protoclip encode, whose features train heads",
    )
    val_data: str = option(
        "",
        "data to evaluate on; default: the held-out part of built-in data, the pairs of "
        "--val-fraction, or 1,000 training pairs",
    )
    val_fraction: float = option(
        0.0,
        "share of the pictures of --train-data to hold out for evaluation, such as 0.1; "
        "chosen by --val-seed and position, never trained on",
        high=0.9,
        fixed=True,
    )
    val_seed: int = option(
        0,
        "chooses the pictures that --val-fraction or built-in data holds out; independent of "
        "--seed, so that all seeds are evaluated on the same pictures",
        high=2**31,
        fixed=True,
    )
    rows: str = option(
        "",
        "train only on these pairs: selected.csv of protoclip curate, matched by key (by position "
        "if it has no keys); other pairs of the same pictures are used too",
        fixed=True,
    )
    train_num_samples: int = option(0, "use only the first N samples; 0: all", fixed=True)
    shuffle_buffer: int = option(
        -1,
        "samples in the shuffle window; 0: everything; -1: everything, or a window of "
        "10,000 for shards from URLs and one that fits in memory for large parquet files",
        low=-1,
        fixed=True,
    )
    max_bad_fraction: float = option(0.05, "largest fraction of unusable samples", high=1)
    csv_separator: str = option(
        "\t", "separator of a .csv/.tsv file; default: tab, or , ; | if the header has none"
    )
    csv_img_key: str = option(
        "filepath", "column of the image path in a .csv/.tsv file, or of the image in .parquet"
    )
    csv_caption_key: str = option("title", "column of the caption")
    csv_encoding: str = option("utf-8", "encoding of a .csv/.tsv file", flag="encoding")
    skip_bad: bool = option(
        False,
        "leave out rows of a .csv/.tsv file without a picture or caption; by default such rows are "
        "counted and the run ends",
        fixed=True,
    )
    class_template: str = option(
        "a photo of a {}.",
        "makes captions from class names: a text with {}, openai (80), simple (7), or a file with "
        "one template per line",
    )
    augmentation: str = option(
        "clip",
        "image augmentation; paper: ProtoCLIP's",
        choices=("paper", "clip", "none"),
        fixed=True,
    )
    captions: str = option(
        "canonical",
        "which of several captions is used: any, the first, or the first "
        "half of the time ('canonical')",
        choices=("random", "canonical", "first"),
        fixed=True,
    )
    labels: str = option(
        "",
        "file with the class of each row of stored features: one per line (empty: not known), or "
        "integers in a .npy",
    )
    class_features: str = option(
        "",
        "rows of class names for zero-shot with stored features, from protoclip encode --classes",
    )
    mixup: float = option(
        0.0,
        "with stored features, mix each pair of a global batch with another one (FuseMix): alpha "
        "of the Beta distribution of the shares; 0: off",
        fixed=True,
    )
    workers: int = option(
        -1,
        "processes that read images; 0: the training process itself; auto: 0 on a CPU, one per "
        "core on a GPU, at most 8",
        low=-1,
        words={"auto": -1},
    )
    prefetch_factor: int = option(2, "batches that each worker loads ahead", low=1)


@dataclass(frozen=True)
class ModelConfig:
    """Model"""

    model: str = option(
        "protoclip-icons",
        "OpenCLIP model such as ViT-B-32, config .json, local-dir:PATH, hf-hub:ID; the default is "
        "a small model for 48-pixel pictures",
        fixed=True,
    )
    pretrained: str = option("", "weights to start from: an OpenCLIP tag or a checkpoint file")
    force_image_size: int = option(0, "image size in pixels; 0: the model's", fixed=True)
    force_context_length: int = option(0, "context length in tokens; 0: the model's", fixed=True)
    lock_image: bool = option(
        False, "freeze the image encoder and train only the text encoder (LiT)", fixed=True
    )
    lock_text: bool = option(False, "freeze the text encoder", fixed=True)
    siglip: bool = option(
        False, "SigLIP's sigmoid loss and logit bias instead of InfoNCE", fixed=True
    )
    head: str = option(
        "linear",
        "heads on stored features: linear, or mlp (FuseMix's residual blocks)",
        choices=("linear", "mlp"),
        fixed=True,
    )
    head_depth: int = option(1, "residual blocks of --head mlp", low=1, fixed=True)
    embed_dim: int = option(512, "columns of the embeddings of --head", low=1, fixed=True)
    image_width: int = option(
        0, "columns of the image rows that --head takes; 0: as stored", fixed=True
    )
    text_width: int = option(
        0, "columns of the text rows that --head takes; 0: as stored", fixed=True
    )
    grad_checkpointing: bool = option(False, "recompute activations: less memory, more time")
    torchcompile: bool = option(
        False, "compile encoders and heads for training: slow start, faster steps"
    )
    add_projection_head: bool = option(
        True, "put projection heads before the prototypes", fixed=True
    )
    projection_hidden_dim: int = option(
        512, "width of the projection heads (paper: 2048)", low=1, fixed=True
    )
    use_bn_sync: bool = option(
        True, "batch norm of the projection heads over all ranks' samples", fixed=True
    )
    projection_dim: int = option(
        64, "output of the projection heads (paper: 128)", low=1, fixed=True
    )

    @property
    def name(self) -> str:
        """The model in words: OpenCLIP's name, or the heads with their columns."""
        if not self.image_width:
            return self.model
        return f"{self.head} heads {self.image_width}/{self.text_width} to {self.embed_dim}"


@dataclass(frozen=True)
class EpisodeConfig:
    """Episodes and prototypes

    A prototype is the mean of a cluster of training samples. An episode is the part of training
    that uses one clustering, by default a pass over the data. A source is what is clustered: the
    image features, the caption features, a teacher's features.
    """

    size: int = option(0, "samples per episode; 0: one epoch", flag="episode-size", fixed=True)
    replacement: bool = option(
        False, "draw with replacement (paper)", flag="episode-replacement", fixed=True
    )
    features: str = option(
        "auto",
        "features to cluster: 'extract' runs a forward pass over the episode's samples (paper); "
        "'reuse' stores the projections of training, so internal prototypes start with the second "
        "pass over the data; 'auto': reuse if the run makes two passes and memory allows",
        flag="episode-features",
        choices=("auto", "extract", "reuse"),
        fixed=True,
    )
    num_clusters: int = option(0, "prototypes per source; 0: a tenth of the episode", flag="k")
    target_temperature: float = option(0.01, "temperature of internal soft targets; 0: hard labels")
    pbt: bool = option(True, "back translation; off: the other modality's centroids", flag="PBT")
    keep_empty: bool = option(False, "keep empty clusters as prototypes at zero (paper)")
    infonce_warmup: int = option(
        2, "episodes before the first prototypes (paper: 1)", flag="infonce-warmup-epoch"
    )
    lit_start: int = option(
        0, "after N episodes freeze the image encoder and train InfoNCE only; 0: never"
    )
    kmeans_init: str = option(
        "warm", "start of k-means; warm: the last centroids", choices=("warm", "random")
    )
    kmeans_backend: str = option(
        "auto",
        "auto: protoclip's fastest usable backend; or a backend by name, or faiss (the paper's)",
        choices=("auto", "reference", "cpu", "cuda", "triton", "faiss"),
    )
    kmeans_max_iter: int = option(20, "maximum number of k-means iterations", low=1)
    kmeans_nredo: int = option(1, "restarts of k-means when not warm (paper: 3)", low=1)
    external_teacher: str = option(
        "auto",
        "features that say which samples belong together: stored features (a folder of protoclip "
        "encode, .npz with keys, or [dataset, d]), builtin:minilm, none, or auto "
        "(builtin:minilm on built-in data if installed)",
    )
    external_teacher_dim: int = option(64, "principal components of the teacher; 0: all")


@dataclass(frozen=True)
class LossConfig:
    """Losses"""

    w_clip: float = option(1.0, "weight of InfoNCE")
    w_proto: float = option(
        -1.0,
        "weight of the internal prototype loss; -1: 1 without a teacher's prototypes, 0 with them",
        low=-1,
    )
    w_proto_external: float = option(1.0, "weight of the external prototype loss")
    w_distill: float = option(0.0, "weight of distilling the teacher's similarities (control)")
    distill_temperature: float = option(0.1, "temperature of --w-distill", low=1e-6)
    dedup: str = option(
        "off",
        "pairs of a batch that are not negatives in InfoNCE (positives in SigLIP): those with the "
        "same caption, or the same sample drawn twice; off: none",
        choices=("off", "caption", "id"),
    )


@dataclass(frozen=True)
class OptimConfig:
    """Optimisation"""

    epochs: float = option(28.0, "passes over the data")
    max_steps: int = option(0, "limit the run and its schedule to N steps; 0: no limit")
    batch_size: int = option(256, "pairs per forward pass of a process", low=2)
    accum_freq: int = option(
        1, "forward passes per step; global batch = batch size x this x ranks", low=1
    )
    lr: float = option(3e-3, "peak learning rate")
    beta1: float = option(0.9, "beta1 of AdamW", high=1)
    beta2: float = option(0.98, "beta2 of AdamW", high=1)
    eps: float = option(1e-6, "epsilon of AdamW")
    wd: float = option(0.2, "weight decay; none on vectors and projection heads (paper: 0.5)")
    warmup: float = option(
        0.1, "learning-rate warm-up: a fraction of the run (< 1) or a number of steps (>= 1)"
    )
    lr_scheduler: str = option(
        "cosine", "learning rate after the warm-up", choices=("cosine", "const")
    )
    grad_clip_norm: float = option(10.0, "clip the gradient to this norm; 0: no clipping")


@dataclass(frozen=True)
class RunConfig:
    """Run"""

    name: str = option("", "folder under --logs; default: date and time, method, seed")
    logs: str = option("logs", "folder in which run folders are created")
    seed: int = option(
        0,
        "seed of training; the same seed gives the same run on one machine",
        high=2**31,
        fixed=True,
    )
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto: cuda if there is one")
    precision: str = option(
        "auto", "auto: amp_bf16 where the hardware supports it", choices=PRECISIONS, fixed=True
    )
    dist_backend: str = option(
        "auto", "auto: nccl on GPUs, gloo on CPUs", choices=("auto", "nccl", "gloo")
    )
    dist_timeout: float = option(1800.0, "seconds that a process waits for the others", low=1)
    log_every_n_steps: int = option(
        0, "steps between lines of metrics.jsonl; 0: 1 on a CPU, 10 on a GPU"
    )
    val_frequency: float = option(6.0, "epochs between quick evaluations; 0: only at the end")
    save_frequency: int = option(0, "epochs between kept checkpoints; 0: only the last")
    delete_previous_checkpoint: bool = option(False, "keep only the newest of --save-frequency")
    save_every: str = option(
        "10m",
        "how often to save, such as 500steps, 10m or 2h; 0: only when the run ends or stops",
    )
    resume: str = option(
        "", "continue a run: its folder or checkpoint; auto or latest: the run that --name names"
    )
    max_bad_steps: int = option(10, "stop after N non-finite steps in a row", low=1)
    report_to: str = option("tensorboard", "loggers in addition to metrics.jsonl", choices=BOARDS)
    wandb_project_name: str = option("protoclip", "project name for --report-to wandb")


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a run; written to config.json, read back by ``from_dict``."""

    method: str = option(
        "protoclip", "clip: InfoNCE only", choices=("protoclip", "clip"), fixed=True
    )
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    episode: EpisodeConfig = field(default_factory=EpisodeConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True)
class ProtoConfig:
    """Online prototypes (any of these switches them on)"""

    weight: float = option(1.0, "weight of the prototype loss", flag="proto-weight")
    queue: int = option(
        16384,
        "number of newest pairs to cluster, at most --proto-capacity",
        flag="proto-queue",
        low=2,
    )
    capacity: int = option(
        0,
        "number of pairs whose labels are kept, for loops that pass index=; at least the size of "
        "the data; 0: the queue",
        flag="proto-capacity",
    )
    k: int = option(0, "prototypes per modality; 0: queue / 10", flag="proto-k")
    every: int = option(
        0, "steps between clusterings; 0: when the queue has been renewed", flag="proto-every"
    )
    warmup: int = option(
        0,
        "steps without prototypes at the start (at least until the queue is full)",
        flag="proto-warmup",
    )
    target_temperature: float = option(
        0.01, "temperature of the soft targets; 0: hard labels", flag="proto-target-temperature"
    )
    logit_scale: float = option(
        0.0, "scale of the prototype logits; 0: the model's logit scale", flag="proto-logit-scale"
    )
    kmeans_max_iter: int = option(
        20, "maximum number of k-means iterations", flag="proto-kmeans-max-iter", low=1
    )
    pbt: bool = option(True, "back translation; off: the other modality", flag="proto-PBT")
    seed: int = option(0, "seed of k-means", flag="proto-seed", high=2**31)

    def __post_init__(self) -> None:
        check(self)
        longest = self.effective_queue
        if self.k > longest:
            raise ValueError(
                f"--proto-k: expected at most --proto-queue = {longest}, got {self.k}; use "
                f"--proto-k {default_clusters(longest)} or a longer queue"
            )

    @property
    def effective_queue(self) -> int:
        """The number of pairs that are clustered: no more than are kept, so that none is clustered
        twice."""
        return min(self.queue, max(2, self.capacity)) if self.capacity else self.queue

    @property
    def num_clusters(self) -> int:
        """Prototypes per modality."""
        return self.k or default_clusters(self.effective_queue)


ProtoConfig.__module__ = "protoclip"  # in pickles


def preset_names() -> list[str]:
    """The presets that come with protoclip."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def in_sections(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in their sections, where a preset may also name them by their flags: "batch-size",
    "batch_size" or "--batch-size" next to, or instead of, "optim"."""
    places = {
        flag_of(item).removeprefix("--"): (section, item.name)
        for section, defaults in vars(TrainConfig()).items()
        if dataclasses.is_dataclass(defaults)
        for item in dataclasses.fields(defaults)
    }
    sections: dict[str, Any] = {}
    for name, value in values.items():
        flag = name.removeprefix("--").replace("_", "-")
        if name in vars(TrainConfig()) and isinstance(value, dict):
            sections.setdefault(name, {}).update(value)
        elif flag in places:
            section, setting = places[flag]
            sections.setdefault(section, {})[setting] = value
        else:  # --method, or a mistake
            sections[name.removeprefix("--")] = value
    return sections


def load_preset(name: str) -> TrainConfig:
    """The settings of a preset or .json file, on top of the preset that it "extends".

    Raises:
        ValueError: no such preset, not JSON, or a setting that protoclip does not have.
    """
    path = Path(name if name.endswith(".json") else PRESETS / f"{name}.json")
    names = preset_names()
    if not path.is_file():
        raise ValueError(
            f"--preset: expected one of {', '.join(names)} or a .json file, got {name!r}"
        )
    try:
        values = parse_json(path.read_text(encoding="utf-8-sig"))  # Windows may put a mark first
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object, got {type(values).__name__}")
        values.pop("about", None)
        parent = values.pop("extends", "default")
        if parent not in names:
            raise ValueError(f"expected one of {', '.join(names)} in 'extends', got {parent!r}")
        base = TrainConfig() if parent == "default" else load_preset(parent)
        return from_dict(TrainConfig, in_sections(values), base)
    except ValueError as error:
        raise ValueError(f"--preset: {path} cannot be used: {error}") from error
