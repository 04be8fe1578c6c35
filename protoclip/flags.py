"""The command line of a run, made from ``protoclip.config``: flags, presets, checks."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from protoclip.config import TrainConfig
from protoclip.fields import check, flag_of, from_dict, to_dict

PRESETS = Path(__file__).parent / "presets"
METAVARS = {int: "N", float: "X", str: "TEXT"}


def _add_options(group: Any, cls: type, defaults: Any, prefix: str) -> None:
    hints = get_type_hints(cls)
    for item in dataclasses.fields(cls):
        hint, default = hints[item.name], getattr(defaults, item.name)
        if dataclasses.is_dataclass(hint):
            continue
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else "%(default)s"
        shown = "" if default in ("", "\t") else f" (default: {shown})"
        arguments: dict[str, Any] = {
            "dest": prefix + item.name,
            "default": default,
            "help": item.metadata["help"] + shown,
        }
        if hint is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        else:
            if get_origin(hint) is tuple:
                hint = get_args(hint)[0]
                arguments["nargs"] = "+"
            arguments.update(type=hint, choices=item.metadata["choices"])
            if arguments["choices"] is None:
                arguments["metavar"] = METAVARS[hint]
        group.add_argument(flag_of(item), **arguments)


def build_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser with one titled group per section of ``TrainConfig``."""
    parser = argparse.ArgumentParser(
        prog=prog, usage="%(prog)s [options]", description=description, allow_abbrev=False
    )
    parser.add_argument(
        "--preset",
        default="default",
        metavar="TEXT",
        help=f"settings to start from: {', '.join(preset_names())}, or a .json file, such as the "
        "config.json of a run; other flags change them (default: %(default)s)",
    )
    parser.add_argument(
        "--paper",
        dest="preset",
        action="store_const",
        const="paper",
        help="the ProtoCLIP authors' settings: --preset paper",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print all settings as JSON, and end"
    )
    defaults = TrainConfig()
    hints = get_type_hints(TrainConfig)
    _add_options(parser, TrainConfig, defaults, "")
    for name, cls in hints.items():
        if isinstance(cls, type) and dataclasses.is_dataclass(cls):
            group = parser.add_argument_group(str(cls.__doc__))
            _add_options(group, cls, getattr(defaults, name), f"{name}.")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> TrainConfig:
    """Command line to a checked config; argparse ends the program for a flag it does not know.

    Raises:
        ValueError: a value out of its limits, a preset that is none, or flags that contradict.
        SystemExit: with code 0 after --print-config.
    """
    chosen = parser.parse_args(argv)
    parser.set_defaults(**dict(_flat(load_preset(chosen.preset))))
    values = vars(parser.parse_args(argv))
    del values["preset"]
    show = values.pop("print_config")
    nested: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    config = from_dict(TrainConfig, nested)
    check(config)
    check_together(config)
    if show:
        print(json.dumps(to_dict(config), indent=2))
        raise SystemExit(0)
    return config


def preset_names() -> list[str]:
    """The presets that come with protoclip."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def load_preset(name: str) -> dict[str, Any]:
    """Settings of a preset or .json file, as nested dicts; what it "extends" comes first.

    Raises:
        ValueError: no such preset, no JSON, or a setting that protoclip does not have.
    """
    path = Path(name) if name.endswith(".json") else PRESETS / f"{name}.json"
    if not path.is_file():
        raise ValueError(
            f"--preset: expected one of {', '.join(preset_names())} or a .json file, got {name!r}"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--preset {name}: {path} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--preset {name}: expected a JSON object in {path}")
    values.pop("about", None)
    merged = load_preset(values.pop("extends")) if "extends" in values else {}
    try:
        known = to_dict(from_dict(TrainConfig, values))
    except (ValueError, TypeError) as error:
        raise ValueError(f"--preset {name}: {error}") from error
    for key, value in values.items():
        if isinstance(value, dict):
            merged[key] = {**merged.get(key, {}), **{k: known[key][k] for k in value}}
        else:
            merged[key] = known[key]
    return merged


def _flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in nested.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def check_together(config: TrainConfig) -> None:
    """Raise ValueError for settings that are fine one by one and contradict each other."""
    episode = config.episode
    if len(episode.target_temperature) > 2:
        raise ValueError(
            "--target-temperature: expected one number, or two (image clusters, text clusters), "
            f"got {len(episode.target_temperature)}"
        )
    if len(set(episode.clusters)) != len(episode.clusters):
        raise ValueError(f"--k: expected different numbers, got {episode.clusters}")
    if episode.ema_decay >= 1:
        raise ValueError(f"--ema-decay: expected less than 1, got {episode.ema_decay}")
    if episode.features == "reuse" and episode.ema_decay > 0:
        raise ValueError(
            "--ema-decay: a moving average needs a forward pass of its own; use "
            "--episode-features extract"
        )
    if episode.features == "reuse" and episode.infonce_warmup < 1:
        raise ValueError(
            "--episode-features reuse: clusters what an earlier episode left; use "
            "--infonce-warmup-epoch 1 or more"
        )
