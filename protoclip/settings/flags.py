"""Command lines: parsers built from the settings, and settings from what was parsed.

``settings.commands`` says which flags each command has, ``settings.config`` what a setting means.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import importlib.util
import inspect
import io
import json
import math
import sys
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from protoclip.common.paths import run_of
from protoclip.settings.config import (
    FEATURES,
    PRECISIONS,
    TrainConfig,
    check,
    flag_of,
    from_dict,
    load_preset,
    preset_names,
    to_dict,
)

PRESET_FLAGS = ("--preset", "--config", "--paper")
PURE_PRECISIONS = ("bf16", "fp16", "pure_bf16", "pure_fp16")  # OpenCLIP's, with 16-bit weights

DATA_NAMES = ("--data", "--dataset", "--data-path", "--csv", "--images", "--folder")
# What else people call a flag -> its name.
SYNONYMS = {
    "--learning-rate": "--lr",
    "--weight-decay": "--wd",
    "--num-clusters": "--k",
    **dict.fromkeys(DATA_NAMES, "--train-data"),
}
# Flags of protoclip compare that were removed -> what to do instead.
REMOVED = {
    "--equal-steps": "rows are always compared at equal steps, and where their times differ the "
    "output ends with a command that compares at equal time; leave it out",
    "--count-teacher": "the table has the teacher's time next to the training time; leave it out",
}
# What --help shows for the value of a flag, where TEXT would not say enough.
METAVARS = {
    **dict.fromkeys(("--train-data", "--val-data", "--data"), "DATA"),
    **dict.fromkeys(("--logs", "--out", "--link-to", "--copy-to", "--heads"), "DIR"),
    **dict.fromkeys(
        ("--features", "--captions", "--weights", "--rows", "--external-teacher"), "FILE"
    ),
    **dict.fromkeys(("--labels", "--image-features", "--text-features"), "FILE"),
    "--class-features": "DIR|FILE",
    **dict.fromkeys(("--csv-img-key", "--csv-caption-key", "--csv-label-key"), "COLUMN"),
    "--out --output": "FILE",
    "--model": "MODEL",
    "--pretrained": "FILE|TAG",
    "--resume": "DIR|FILE",
    "--run": "DIR|FILE",
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


def refusal(flag: str, flags: Collection[str]) -> str:
    """One line: why a command, which has ``flags``, lacks this one, and what to do."""
    name = flag.partition("=")[0]
    if name in REMOVED and "--seeds" in flags:
        return f"{name}: {REMOVED[name]}"
    if SYNONYMS.get(name) in flags:
        return f"{name}: the flag is {SYNONYMS[name]}"
    if "--train-data" in flags and name in open_clips_help().split():
        return f"{name}: a flag of OpenCLIP's trainer; use protoclip openclip"
    names = [option.removeprefix("--") for option in flags]
    near = difflib.get_close_matches(name.removeprefix("--"), names, n=1)
    return f"{name}: no such flag; " + (f"did you mean --{near[0]}?" if near else "see --help")


class HelpLines(argparse.HelpFormatter):
    """Help whose lines do not end within a name, such as local-dir:PATH."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line that names a remedy.

    --help shows only the ``everyday`` flags, if any are given, and ``example``; --help-all all.
    ``raises``: whether an error raises ValueError; else it ends the process with code 2.
    """

    raises = False

    def __init__(
        self, prog: str, everyday: Sequence[str] = (), example: str = "", **arguments: Any
    ) -> None:
        super().__init__(prog=prog, allow_abbrev=False, formatter_class=HelpLines, **arguments)
        self.example = f"\nexample: {example}\n" if example else ""
        words = "show all flags" if everyday else argparse.SUPPRESS
        self.add_argument("--help-all", action="help", help=words)
        self.everyday = {*everyday, "--help", "--help-all"} if everyday else set()

    def format_help(self) -> str:
        for action in self._actions if self.everyday else ():
            if action.option_strings and self.everyday.isdisjoint(action.option_strings):
                action.help = argparse.SUPPRESS
        return super().format_help() + self.example

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        if self.raises:
            raise ValueError(message)
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        self.everyday = set() if "--help-all" in words else self.everyday
        options = self._option_string_actions
        for word in words:
            if word == "--":
                break
            # Checked before argparse, which would report a missing flag, not the misspelt one.
            if word.startswith("--") and " " not in word and word.partition("=")[0] not in options:
                self._name_the_data(word.partition("=")[0])
                self.error(refusal(word, options))
        parsed, rest = self.parse_known_args(words, namespace)
        if rest:
            remedy = "a flag takes one value"
            if "--train-data" in options:
                remedy += f"; the data of a run is --train-data {rest[0]}"
            self.error(f"expected a flag, got {rest[0]!r}; {remedy}")
        return parsed

    def _name_the_data(self, flag: str) -> None:
        """End with the name of the data, if it has no flag and ``flag`` is a guess at one."""
        for action in self._actions if flag in DATA_NAMES else ():
            if not action.option_strings:
                self.error(
                    f"{flag}: no such flag; {action.metavar} has none: {self.prog} {action.metavar}"
                )


def add_flag(
    group: Any,
    flag: str,
    default: Any,
    help: str,
    choices: Sequence[str] = (),
    setting: str = "",
    words: Mapping[str, int] | None = None,
    low: float | None = None,
) -> None:
    """Add a flag with the type of its default; ``flag`` is its name, or several between blanks. The
    help shows the default. With ``setting``, a dotted name, the parsed flags hold a value only if
    the command line gives the flag. ``words`` may be given for numbers; ``low`` is the least
    number."""
    if words:
        names = {number: word for word, number in words.items()}
        help += f" (default: {names.get(default, default)})"
    elif default not in ("", "\t"):
        help += f" (default: {default})"
    arguments: dict[str, Any] = {"default": default, "help": help}
    if isinstance(default, bool):
        arguments["action"] = argparse.BooleanOptionalAction
    elif choices:
        arguments["choices"] = choices
        if choices == PRECISIONS:
            arguments["type"] = precision_name
    else:
        arguments["type"] = type(default)
        arguments["metavar"] = METAVARS.get(
            flag, {int: "N", float: "X", str: "TEXT"}[type(default)]
        )
        if words:
            arguments["type"] = partial(word_or_number, words)
            arguments["metavar"] = "|".join(["N", *words])
        elif low is not None:
            arguments["type"] = partial(number_from, type(default), low)
    if setting:
        arguments["dest"] = setting
        arguments["default"] = argparse.SUPPRESS
    if setting == "data.train_data":
        arguments["action"] = _TrainData
    group.add_argument(*flag.split(), **arguments)


def add_options(group: Any, settings: Any, prefix: str = "", only: Iterable[str] = ()) -> None:
    """Add a flag for each field of a section, or only for the named fields."""
    for item in dataclasses.fields(settings):
        default = getattr(settings, item.name)
        if not dataclasses.is_dataclass(default) and (not only or item.name in only):
            add_flag(
                group,
                flag_of(item),
                default,
                item.metadata["help"],
                choices=item.metadata["choices"],
                setting=prefix + item.name,
                words=item.metadata["words"],
            )


class _TrainData(argparse.Action):
    """--train-data, or the flags of feature files, two or more of which name the training data."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        before = getattr(namespace, self.dest, None)
        is_file = option_string != "--train-data"
        if before is not None and before.startswith(FEATURES) != is_file:
            other = "--image-features or --text-features; leave them or it out"
            if is_file:
                other = f"--train-data {before}; leave one of them out"
            parser.error(f"{option_string}: expected no other data, got {other}")
        if is_file:
            images, *texts = (before or FEATURES).removeprefix(FEATURES).split("::")
            if option_string == "--image-features":
                images = values
            else:
                texts.append(values)
            values = FEATURES + "::".join([images, *texts])
        setattr(namespace, self.dest, values)


def add_feature_flags(group: Any) -> None:
    """--image-features and --text-features, which are another way to write --train-data."""
    words = "in place of --train-data: rows of the pictures [N, d], a .npy or a folder of parts"
    other = "and rows of their captions, in the same order; repeat the flag for more captions"
    for flag, help_text in (("--image-features", words), ("--text-features", other)):
        add_flag(group, flag, "", help_text, setting="data.train_data")


def build_parser(
    prog: str, description: str, everyday: Sequence[str] = (), example: str = ""
) -> Parser:
    """A parser with one titled group per section of ``TrainConfig``."""
    parser = Parser(prog, everyday, example, usage="%(prog)s [options]", description=description)
    add_flag(
        parser,
        "--preset --config",
        "default",
        f"settings to start from: {', '.join(preset_names())}, or a .json file: a run's "
        "config.json, or an object of flags and values",
    )
    parser.add_argument(
        "--paper",
        dest="preset",
        action="store_const",
        const="paper",
        help="the ProtoCLIP authors' settings: --preset paper",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print all settings as JSON and exit"
    )
    add_flag(
        parser,
        "--dataset-type",
        "auto",
        "OpenCLIP's flag; must agree with the name of --train-data; synthetic: builtin:shapes:N "
        "with N from --train-num-samples",
        choices=("auto", "webdataset", "csv", "synthetic"),
    )
    for flag, (arguments, _) in NEEDLESS.items():
        parser.add_argument(flag, dest=flag, help=argparse.SUPPRESS, **arguments)
    defaults = TrainConfig()
    add_options(parser, defaults)
    for name, section in vars(defaults).items():
        if dataclasses.is_dataclass(section):
            title, _, about = inspect.cleandoc(str(section.__doc__)).partition("\n\n")
            group = parser.add_argument_group(title, " ".join(about.split()) or None)
            add_options(group, section, f"{name}.")
            if name == "data":
                add_feature_flags(group)
    return parser


def words_of(parser: Parser, keywords: Mapping[str, Any]) -> list[str]:
    """The command line that says the same as keywords: flags with underscores, bools for switches,
    None for a flag that is not given.

    Raises:
        TypeError: a keyword that is not a flag of the parser.
    """
    ends = ("--help", "--help-all", "--print-config")  # and gives no config
    flags = [flag for flag in parser._option_string_actions if flag not in ends]
    words = []
    for name, value in keywords.items():
        flag = "--" + name.replace("_", "-")
        if flag not in flags:
            raise TypeError(_no_such_keyword(name, flag, flags))
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words.append(f"{flag}={value}")
    return words


def _no_such_keyword(name: str, flag: str, flags: Sequence[str]) -> str:
    near = difflib.get_close_matches(flag, flags, n=1)
    if flag in SYNONYMS:
        near = [SYNONYMS[flag]]
    if near:
        return f"{name}: no such setting; did you mean {near[0][2:].replace('-', '_')}?"
    return f"{name}: no such setting; protoclip train --help-all lists them, as flags"


def with_saved_config(argv: Sequence[str] | None) -> list[str]:
    """The command line; with ``--resume RUN`` and no preset it starts from that run's settings."""
    words = list(sys.argv[1:] if argv is None else argv)
    chosen = [new for old, new in pairwise(words) if old == "--resume"]
    chosen += [word.partition("=")[2] for word in words if word.startswith("--resume=")]
    if chosen and not any(word.split("=")[0] in PRESET_FLAGS for word in words):
        path = Path(chosen[-1])
        settings = run_of(path) / "config.json"
        if chosen[-1] not in ("auto", "latest") and path.exists() and settings.is_file():
            return ["--preset", str(settings), *words]
    return words


def parse(parser: Parser, argv: Sequence[str] | None) -> TrainConfig:
    """Command line to a checked config; see ``parse_more``."""
    return parse_more(parser, argv)[0]


def parse_more(parser: Parser, argv: Sequence[str] | None) -> tuple[TrainConfig, dict[str, Any]]:
    """Command line to a checked config, and the values of the command's own flags.

    Raises:
        ValueError: a value out of its limits, no such preset, or flags that contradict each other.
        SystemExit: with code 0 after --print-config, with 2 for a flag that the parser lacks.
    """
    flags = vars(parser.parse_args(argv))
    for flag, (_, reason) in NEEDLESS.items():
        if flags[flag]:
            print(f"{parser.prog}: note: {flag} changes nothing: {reason}", file=sys.stderr)
    config, of_command = checked_config(flags)
    if of_command.pop("print_config"):
        print(json.dumps(to_dict(config), indent=2))
        raise SystemExit(0)
    return config, of_command


def checked_config(flags: Mapping[str, Any]) -> tuple[TrainConfig, dict[str, Any]]:
    """Parsed flags, of the settings only those on the command line, to a checked config and the
    values of the command's own flags.

    Raises:
        ValueError: a value out of its limits, no such preset, or flags that contradict each other.
    """
    settings: dict[str, Any] = {}
    of_command: dict[str, Any] = {}
    for name, value in flags.items():
        section, _, setting = name.rpartition(".")
        if section:
            settings.setdefault(section, {})[setting] = value
        elif name == "method":
            settings[name] = value
        elif name not in NEEDLESS:
            of_command[name] = value
    config = from_dict(TrainConfig, settings, load_preset(of_command.pop("preset")))
    config = _with_dataset_type(of_command.pop("dataset_type"), config)
    if config.run.resume == "latest":  # OpenCLIP's word
        config = replace(config, run=replace(config.run, resume="auto"))
    if config.run.precision == "amp_bfloat16":  # from a file; a flag has been translated
        config = replace(config, run=replace(config.run, precision="amp_bf16"))
    check(config)
    if config.episode.features == "reuse" and config.episode.infonce_warmup < 1:
        raise ValueError(
            "--episode-features reuse: needs an earlier episode's features; use "
            "--infonce-warmup-epoch 1 or more"
        )
    return config, of_command


def _with_dataset_type(dataset_type: str, config: TrainConfig) -> TrainConfig:
    """Apply OpenCLIP's --dataset-type; our readers follow from the name of the data."""
    data = config.data.train_data
    table = data.lower().endswith((".csv", ".tsv"))
    built_in = data.startswith("builtin:")
    shards = not (table or built_in or ".parquet" in data)
    fits = {"csv": table, "webdataset": shards, "synthetic": built_in}
    if not fits.get(dataset_type, True):
        raise ValueError(
            f"--dataset-type {dataset_type}: expected such data in --train-data, got {data!r}; use "
            "--dataset-type auto or other data"
        )
    if dataset_type != "synthetic":
        return config
    spec = f"builtin:shapes:{config.data.train_num_samples or 2000}"
    return replace(config, data=replace(config.data, train_data=spec, train_num_samples=0))


def word_or_number(words: Mapping[str, int], text: str) -> int:
    """The number that a flag's text means; for argparse."""
    try:
        return words[text] if text in words else int(text)
    except ValueError:
        expected = " or ".join(["a number", *words])
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None


def number_from(kind: type[int] | type[float], low: float, text: str) -> int | float:
    """The number of a flag's text, ``low`` or more; for argparse."""
    expected = f"expected a {'whole ' if kind is int else ''}number of at least {low}, got {text}"
    try:
        number = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(expected) from None
    if not low <= number < math.inf:  # NaN too
        raise argparse.ArgumentTypeError(expected)
    return number


def group_number(text: str) -> str:
    """``--k`` of protoclip cluster: "auto" or a number; for argparse."""
    if text != "auto" and not (text.isdecimal() and int(text) >= 2):
        raise argparse.ArgumentTypeError(f"expected auto or 2 to N groups, got {text}")
    return text


def levels_of(text: str) -> list[int]:
    """``--levels`` of protoclip curate: falling numbers between commas; for argparse."""
    numbers = [part.strip() for part in text.split(",")]
    levels = [int(number) for number in numbers if number.isdecimal()]
    if len(levels) < len(numbers) or 0 in levels or sorted(set(levels), reverse=True) != levels:
        raise argparse.ArgumentTypeError(
            f"expected numbers of clusters that fall, such as 1000,100, got {text}"
        )
    return levels


def seeds_of(text: str) -> list[int]:
    """Seeds of ``protoclip compare``: "3" are 0, 1 and 2, and "0,3,7" are these; for argparse."""
    numbers = [part.strip() for part in text.split(",") if part.strip()]
    most = 2**31 if "," in text else 1000
    if not all(number.isdecimal() and int(number) <= most for number in numbers):
        raise argparse.ArgumentTypeError(
            f"expected a number of seeds, or seeds such as 0,3,7, got {text}"
        )
    seeds = list(map(int, numbers))
    return seeds if "," in text else list(range(seeds[0])) if seeds else []


def precision_name(name: str) -> str:
    """The precision that a flag names, by our name or OpenCLIP's; for argparse."""
    if name in PURE_PRECISIONS:
        remedy = "amp_bf16" if "bf16" in name else "amp"
        raise argparse.ArgumentTypeError(
            f"expected fp32 weights, got {name}, which keeps them in 16 bits; use {remedy}, which "
            "only computes in 16 bits"
        )
    return "amp_bf16" if name == "amp_bfloat16" else name
