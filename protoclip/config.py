"""Every setting of a run, and the command-line flags that are made from the settings.

A setting's field holds its default, meaning and limits. A flag has OpenCLIP's name if OpenCLIP has
the flag, otherwise the ProtoCLIP authors' name if they have it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import importlib.util
import io
import json
import math
import os
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

PRECISIONS = ("auto", "fp32", "amp_bf16", "amp")
BOARDS = ("tensorboard", "wandb", "tensorboard,wandb", "none")
PRESETS = Path(__file__).parent / "presets"
TABLE = ("csv_separator", "csv_img_key", "csv_caption_key", "csv_encoding")  # how to read a table
Config = TypeVar("Config")
to_dict = dataclasses.asdict  # a config as a nested plain dict, ready for JSON


def option(
    default: Any,
    help: str,
    *,
    flag: str = "",
    choices: Any = None,
    low: Any = 0,
    high: Any = None,
) -> Any:
    """A dataclass field that is also a flag; ``low`` and ``high`` limit numbers, inclusively."""
    limits = {"choices": choices, "low": low, "high": high}
    return field(default=default, metadata={"help": help, "flag": flag, **limits})


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
    known, changes = vars(base), {}
    if unknown := set(values) - set(known):
        raise ValueError(
            f"config: {cls.__name__} has no {sorted(unknown)}; it knows {sorted(known)}. "
            "The file is from another version of protoclip, or misspelt"
        )
    for key, value in values.items():
        kind = type(known[key])
        if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
            value = from_dict(kind, value, known[key])
        elif kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ValueError(f"config: expected {kind.__name__} for {key}, got {value!r}")
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
        low, high, choices = (item.metadata[name] for name in ("low", "high", "choices"))
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
        "builtin:icons, builtin:shapes[:N], a .csv/.tsv file, or webdataset shards such as "
        "'d/{000..012}.tar', globs, urls; sources joined by '::'",
    )
    val_data: str = option("", "data to evaluate on; default: the held-out part of built-in data")
    train_num_samples: int = option(0, "use only the first N samples; 0: all")
    shuffle_buffer: int = option(-1, "samples mixed; 0: all; -1: all, but 10000 of urls", low=-1)
    max_bad_fraction: float = option(0.05, "largest share of unusable samples", high=1)
    csv_separator: str = option("\t", "separator of a .csv/.tsv file (default: tab)")
    csv_img_key: str = option("filepath", "column of the image path")
    csv_caption_key: str = option("title", "column of the caption")
    csv_encoding: str = option("utf-8", "encoding of a .csv/.tsv file", flag="encoding")
    augmentation: str = option("clip", "paper: ProtoCLIP's", choices=("paper", "clip", "none"))
    captions: str = option(
        "canonical",
        "which of several is used: any, the first, or the first half of the time ('canonical')",
        choices=("random", "canonical", "first"),
    )
    workers: int = option(0, "processes that read images; 0: in the training process")


@dataclass(frozen=True)
class ModelConfig:
    """Model"""

    model: str = option(
        "protoclip-icons", "OpenCLIP model, config .json, local-dir:PATH, hf-hub:ID"
    )
    pretrained: str = option("", "weights to start from: an OpenCLIP tag or a checkpoint file")
    force_image_size: int = option(0, "side of an image in pixels; 0: the model's")
    force_context_length: int = option(0, "tokens of a caption; 0: the model's")
    lock_image: bool = option(False, "freeze the image tower, train only the text (LiT)")
    lock_text: bool = option(False, "freeze the text tower")
    siglip: bool = option(False, "SigLIP's sigmoid loss and logit bias instead of InfoNCE")
    grad_checkpointing: bool = option(False, "recompute activations: less memory, more time")
    add_projection_head: bool = option(True, "put projection heads before the prototypes")
    projection_hidden_dim: int = option(512, "width of the projection heads (paper: 2048)", low=1)
    use_bn_sync: bool = option(True, "batch norm of the projection heads over all ranks' samples")
    projection_dim: int = option(64, "output of the projection heads (paper: 128)", low=1)


@dataclass(frozen=True)
class EpisodeConfig:
    """Episodes and prototypes"""

    size: int = option(0, "samples per episode; 0: one epoch", flag="episode-size")
    replacement: bool = option(False, "draw with replacement (paper)", flag="episode-replacement")
    features: str = option(
        "auto",
        "features that give clusters and labels: 'extract' runs a forward pass over the episode's "
        "samples (paper); 'reuse' stores training's own projections, so prototypes begin with the "
        "second pass over the data; 'auto': reuse where the run makes two passes and memory allows",
        flag="episode-features",
        choices=("auto", "extract", "reuse"),
    )
    num_clusters: int = option(0, "prototypes per source; 0: a tenth of the episode", flag="k")
    target_temperature: float = option(0.01, "for internal soft targets; 0: hard labels")
    pbt: bool = option(True, "back translation; off: the other modality's centroids", flag="PBT")
    keep_empty: bool = option(False, "keep empty clusters as prototypes at zero (paper)")
    infonce_warmup: int = option(
        2, "episodes before the first prototypes (paper: 1)", flag="infonce-warmup-epoch"
    )
    lit_start: int = option(0, "freeze the image tower after N episodes, InfoNCE only; 0: never")
    kmeans_init: str = option("warm", "warm: last centroids", choices=("warm", "random"))
    kmeans_backend: str = option(
        "auto",
        "protoclip's fastest usable backend, one by name, or faiss (the paper's)",
        choices=("auto", "reference", "cpu", "cuda", "faiss"),
    )
    kmeans_max_iter: int = option(20, "iterations of k-means, at most", low=1)
    kmeans_nredo: int = option(1, "restarts of k-means when not warm (paper: 3)", low=1)
    external_teacher: str = option(
        "auto",
        "features that say which samples belong together: .npz of protoclip teacher, "
        ".npy or .safetensors of [dataset, d], builtin:minilm, none, or auto (builtin:minilm on "
        "built-in data if installed)",
    )
    external_teacher_dim: int = option(64, "principal components of the teacher; 0: all")


@dataclass(frozen=True)
class LossConfig:
    """Losses"""

    w_clip: float = option(1.0, "weight of InfoNCE")
    w_proto: float = option(1.0, "weight of the internal prototype loss")
    w_proto_external: float = option(1.0, "weight of the external prototype loss")
    w_distill: float = option(0.0, "weight of distilling the teacher's similarities (control)")
    distill_temperature: float = option(0.1, "temperature of --w-distill", low=1e-6)
    dedup: str = option(
        "off",
        "pairs of a batch that are not negatives in InfoNCE, and are positives in SigLIP: those "
        "with the same caption, or the same sample drawn twice; off: the loss as published",
        choices=("off", "caption", "id"),
    )


@dataclass(frozen=True)
class OptimConfig:
    """Optimisation"""

    epochs: float = option(24.0, "passes over the data")
    max_steps: int = option(0, "shorten the run and its schedule to N steps; 0: no limit")
    batch_size: int = option(256, "pairs per forward pass of a process", low=2)
    accum_freq: int = option(1, "passes per step; global batch = batch size x this x ranks", low=1)
    lr: float = option(3e-3, "peak learning rate")
    beta1: float = option(0.9, "AdamW", high=1)
    beta2: float = option(0.98, "AdamW", high=1)
    eps: float = option(1e-6, "AdamW")
    wd: float = option(0.2, "weight decay; none on vectors and projection heads (paper: 0.5)")
    warmup: float = option(0.1, "of the learning rate: a fraction of the run, or steps (>= 1)")
    lr_scheduler: str = option("cosine", "after the warm-up", choices=("cosine", "const"))
    grad_clip_norm: float = option(10.0, "largest norm of the gradient; 0: no clipping")


@dataclass(frozen=True)
class RunConfig:
    """Run"""

    name: str = option("", "folder under --logs; default: date and time, method, seed")
    logs: str = option("logs", "where run folders go")
    seed: int = option(0, "same seed, same machine, same run", high=2**31)
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto: cuda if there is one")
    precision: str = option("auto", "auto: amp_bf16 on a GPU that has it", choices=PRECISIONS)
    dist_backend: str = option("auto", "auto: nccl on GPUs", choices=("auto", "nccl", "gloo"))
    dist_timeout: float = option(1800.0, "seconds that a process waits for others", low=1)
    log_every_n_steps: int = option(1, "steps between lines of metrics.jsonl", low=1)
    val_frequency: float = option(6.0, "epochs between quick evaluations; 0: only at the end")
    save_frequency: int = option(0, "epochs between kept checkpoints; 0: only the last")
    delete_previous_checkpoint: bool = option(False, "keep only the newest of --save-frequency")
    save_every: str = option(
        "", "also save every 500steps, 10m or 2h; default: only when the run ends or stops"
    )
    resume: str = option(
        "", "continue a run: its folder or checkpoint; auto or latest: the run that --name names"
    )
    max_bad_steps: int = option(10, "stop after N non-finite steps in a row", low=1)
    report_to: str = option("tensorboard", "loggers besides metrics.jsonl", choices=BOARDS)
    wandb_project_name: str = option("protoclip", "the project of --report-to wandb")


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a run; written to config.json, read back by ``from_dict``."""

    method: str = option("protoclip", "clip: InfoNCE only", choices=("protoclip", "clip"))
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
    queue: int = option(16384, "newest pairs to cluster", flag="proto-queue", low=2)
    capacity: int = option(
        0,
        "newest pairs whose labels are kept, for loops that pass index=; at least the size of the "
        "data; 0: the queue",
        flag="proto-capacity",
    )
    k: int = option(0, "prototypes per modality; 0: queue / 10", flag="proto-k")
    every: int = option(0, "steps between clusterings; 0: a full queue", flag="proto-every")
    warmup: int = option(0, "first steps without prototypes (>= one queue)", flag="proto-warmup")
    target_temperature: float = option(
        0.01, "temperature of the soft targets; 0: hard labels", flag="proto-target-temperature"
    )
    logit_scale: float = option(
        0.0, "scale of the prototype logits; 0: the model's logit scale", flag="proto-logit-scale"
    )
    kmeans_max_iter: int = option(
        20, "iterations of k-means, at most", flag="proto-kmeans-max-iter", low=1
    )
    pbt: bool = option(True, "back translation; off: the other modality", flag="proto-PBT")
    seed: int = option(0, "seed of k-means", flag="proto-seed", high=2**31)

    def __post_init__(self) -> None:
        check(self)
        if self.k > self.queue:
            raise ValueError(
                f"--proto-k: expected at most --proto-queue = {self.queue}, got {self.k}; "
                f"use --proto-k {max(1, self.queue // 10)} or a longer queue"
            )

    @property
    def num_clusters(self) -> int:
        """Prototypes per modality."""
        return self.k or max(1, self.queue // 10)


EVALUATE = "evaluate the run afterwards: protoclip evaluate RUN --data DIR"
# Removed flags and common wrong names, each with what to do instead.
RETIRED = {
    "--ema-decay": "extraction uses the model itself; leave the flag out",
    "--normalize-centroids": "centroids are plain means; leave the flag out",
    "--external-target-temperature": "external targets are hard labels; leave the flag out",
    "--learning-rate": "the flag is --lr",
    "--weight-decay": "the flag is --wd",
    "--num-clusters": "the flag is --k",
    **dict.fromkeys(("--imagenet-val", "--imagenet-v2", "--zeroshot-frequency"), EVALUATE),
}
# Flags of OpenCLIP's trainer that are accepted and change nothing: arguments, and the reason.
NEEDLESS: dict[str, tuple[dict[str, Any], str]] = {
    "--local-loss": ({"action": "store_true"}, "the loss is exact over all processes"),
    "--gather-with-grad": ({"action": "store_true"}, "the loss is exact over all processes"),
    "--save-most-recent": ({"action": "store_true"}, "epoch_latest.pt is always written"),
    "--ddp-static-graph": ({"action": "store_true"}, "each step reduces its gradients once"),
    "--no-set-device-rank": ({"action": "store_true"}, "--device says which GPU"),
    "--dist-url": ({"metavar": "URL"}, "the launcher's variables say where processes meet"),
    "--opt": ({"choices": ["adamw"]}, "AdamW is the only optimiser"),
}


def open_clips_help() -> str:
    """The help of open_clip_train without its usage line; "" if it is not installed."""
    if importlib.util.find_spec("open_clip_train") is None:
        return ""
    from open_clip_train.params import parse_args  # loads nothing else

    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        parse_args(["--help"])
    return "open_clip_train's " + text.getvalue().partition("\n\n")[2].rstrip()


def refusal(flag: str, known: Collection[str]) -> str:
    """One line: why a command lacks this flag, and what to do."""
    name = flag.partition("=")[0]
    if name in RETIRED:
        return f"{name}: {RETIRED[name]}"
    if "--train-data" in known and name in open_clips_help().split():
        return f"{name}: a flag of OpenCLIP's trainer; use protoclip openclip"
    names = [option.removeprefix("--") for option in known]
    near = difflib.get_close_matches(name.removeprefix("--"), names, n=1)
    return f"{name}: no such flag; " + (f"did you mean --{near[0]}?" if near else "see --help")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line that names a remedy.

    --help shows only the ``everyday`` flags, if any are given, and ``example``; --help-all all.
    """

    def __init__(
        self, prog: str, everyday: Sequence[str] = (), example: str = "", **arguments: Any
    ) -> None:
        super().__init__(prog=prog, allow_abbrev=False, **arguments)
        self.example = f"\nexample: {example}\n" if example else ""
        words = "show the other flags too" if everyday else argparse.SUPPRESS
        self.add_argument("--help-all", action="help", help=words)
        self.everyday = {*everyday, "--help", "--help-all"} if everyday else set()

    def format_help(self) -> str:
        for action in self._actions if self.everyday else ():
            if action.option_strings and self.everyday.isdisjoint(action.option_strings):
                action.help = argparse.SUPPRESS
        return super().format_help() + self.example

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message.removeprefix('argument ')}\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        self.everyday = set() if "--help-all" in words else self.everyday
        options = self._option_string_actions
        for word in words:
            if word == "--":
                break
            # Checked before argparse, which would report a missing flag, not the misspelt one.
            if word.startswith("--") and " " not in word and word.partition("=")[0] not in options:
                self.error(refusal(word, options))
        parsed, rest = self.parse_known_args(words, namespace)
        if rest:
            self.error(f"expected a flag, got {rest[0]!r}; a flag takes one value")
        return parsed


def add_flag(
    group: Any, flag: str, default: Any, help: str, choices: Sequence[str] = (), setting: str = ""
) -> None:
    """Add a flag with the type of its default; the help shows the default. With ``setting``, a
    dotted name, the parsed flags hold a value only if the command line gives the flag."""
    kind, shown = type(default), "" if default in ("", "\t") else f" (default: {default})"
    words: dict[str, Any] = {"default": default, "help": help + shown}
    if kind is bool:
        words["action"] = argparse.BooleanOptionalAction
    elif choices:
        words["choices"] = choices
    else:
        words |= {"type": kind, "metavar": {int: "N", float: "X", str: "TEXT"}[kind]}
    if setting:
        words |= {"dest": setting, "default": argparse.SUPPRESS}
    group.add_argument(flag, **words)


def add_options(group: Any, settings: Any, prefix: str = "", only: Iterable[str] = ()) -> None:
    """Add a flag for each field of a section, or only for the named fields."""
    for item in dataclasses.fields(settings):
        default, words = getattr(settings, item.name), item.metadata
        if not dataclasses.is_dataclass(default) and (not only or item.name in only):
            flag, setting = flag_of(item), prefix + item.name
            add_flag(group, flag, default, words["help"], words["choices"], setting)


def build_parser(
    prog: str, description: str, everyday: Sequence[str] = (), example: str = ""
) -> Parser:
    """A parser with one titled group per section of ``TrainConfig``."""
    parser = Parser(prog, everyday, example, usage="%(prog)s [options]", description=description)
    words = f"settings to start from: {', '.join(preset_names())}, or a .json file, such as a "
    add_flag(parser, "--preset", "default", words + "run's config.json")
    add = parser.add_argument
    words = "the ProtoCLIP authors' settings: --preset paper"
    add("--paper", dest="preset", action="store_const", const="paper", help=words)
    add("--print-config", action="store_true", help="print all settings as JSON and exit")
    words = "OpenCLIP's flag; must agree with the name of --train-data; synthetic: "
    words += "builtin:shapes:N with N from --train-num-samples"
    kinds = ("auto", "webdataset", "csv", "synthetic")
    add_flag(parser, "--dataset-type", "auto", words, choices=kinds)
    for flag, (arguments, _) in NEEDLESS.items():
        add(flag, dest=flag, help=argparse.SUPPRESS, **arguments)
    defaults = TrainConfig()
    add_options(parser, defaults)
    for name, section in vars(defaults).items():
        if dataclasses.is_dataclass(section):
            add_options(parser.add_argument_group(str(section.__doc__)), section, f"{name}.")
    return parser


def parse(parser: Parser, argv: Sequence[str] | None) -> TrainConfig:
    """Command line to a checked config; see ``parse_more``."""
    return parse_more(parser, argv)[0]


def parse_more(parser: Parser, argv: Sequence[str] | None) -> tuple[TrainConfig, dict[str, Any]]:
    """Command line to a checked config, and the values of the command's own flags.

    Raises:
        ValueError: a value out of its limits, no such preset, or flags that contradict each other.
        SystemExit: with code 0 after --print-config, with 2 for a flag that the parser lacks.
    """
    given = vars(parser.parse_args(argv))  # only those on the command line
    kind, name, show = (given.pop(key) for key in ("dataset_type", "preset", "print_config"))
    for flag, (_, reason) in NEEDLESS.items():
        if given.pop(flag):
            print(f"{parser.prog}: note: {flag} changes nothing: {reason}", file=sys.stderr)
    own = {key: given.pop(key) for key in [*given] if "." not in key and key != "method"}
    preset = load_preset(name)
    changes: dict[str, Any] = {}
    for key, value in given.items():
        section, _, setting = key.rpartition(".")
        (changes.setdefault(section, {}) if section else changes)[setting] = value
    config = _of_type(kind, from_dict(TrainConfig, changes, preset))
    if config.run.resume == "latest":  # OpenCLIP's word
        config = replace(config, run=replace(config.run, resume="auto"))
    check(config)
    if config.episode.features == "reuse" and config.episode.infonce_warmup < 1:
        raise ValueError(
            "--episode-features reuse: needs an earlier episode's features; use "
            "--infonce-warmup-epoch 1 or more"
        )
    if show:
        print(json.dumps(to_dict(config), indent=2))
        raise SystemExit(0)
    return config, own


def _of_type(kind: str, config: TrainConfig) -> TrainConfig:
    """Apply OpenCLIP's --dataset-type; our readers follow from the name of the data."""
    data = config.data.train_data
    table, built_in = data.lower().endswith((".csv", ".tsv")), data.startswith("builtin:")
    fits = {"csv": table, "webdataset": not (table or built_in), "synthetic": built_in}
    if not fits.get(kind, True):
        raise ValueError(
            f"--dataset-type {kind}: expected such data in --train-data, got {data!r}; use "
            "--dataset-type auto or other data"
        )
    if kind != "synthetic":
        return config
    spec = f"builtin:shapes:{config.data.train_num_samples or 2000}"
    return replace(config, data=replace(config.data, train_data=spec, train_num_samples=0))


def preset_names() -> list[str]:
    """The presets that come with protoclip."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def load_preset(name: str) -> TrainConfig:
    """The settings of a preset or .json file, on top of the preset that it "extends".

    Raises:
        ValueError: no such preset, not JSON, or a setting that protoclip does not have.
    """
    path, names = Path(name if name.endswith(".json") else PRESETS / f"{name}.json"), preset_names()
    if not path.is_file():
        raise ValueError(
            f"--preset: expected one of {', '.join(names)} or a .json file, got {name!r}"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object, got {type(values).__name__}")
        values.pop("about", None)
        parent = values.pop("extends", "default")
        if parent not in names:
            raise ValueError(f"expected one of {', '.join(names)} in 'extends', got {parent!r}")
        base = TrainConfig() if parent == "default" else load_preset(parent)
        return from_dict(TrainConfig, values, base)
    except ValueError as error:
        raise ValueError(f"--preset: {path} cannot be used: {error}") from error


def output_file(path: str | os.PathLike[str], flag: str) -> Path:
    """Return the path if a file can be written there, else raise ValueError; folders may be new."""
    if os.path.isdir(path):
        raise ValueError(f"{flag}: expected a file, got the folder {path}; add a name to it")
    check_above(Path(path), flag)
    return Path(path)


def check_above(path: Path, flag: str) -> None:
    """Raise ValueError if no file or folder can be created at ``path``."""
    above = next(parent for parent in path.parents if os.path.lexists(parent))
    if not above.is_dir():
        raise ValueError(f"{flag}: expected a path in a folder, got {path}, but {above} is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{flag}: {above} is not writable; choose another folder")
