"""The command: pop our flags, put our losses into OpenCLIP's trainer, run its ``main``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import importlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from protoclip.config import flag_of
from protoclip.openclip.factory import create_loss, create_task
from protoclip.openclip.repairs import repaired
from protoclip.proto_clip_loss import ProtoConfig

PROG = "python -m protoclip.openclip"
DESCRIPTION = (
    "OpenCLIP's own training (open_clip_train) with protoclip's losses. Every flag of "
    "open_clip_train works as it does there; without a --proto-* flag the losses are the same, in "
    "less memory. Runs under torchrun as OpenCLIP does."
)


def build_parser() -> argparse.ArgumentParser:
    """Our flags alone."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        usage="%(prog)s <open_clip_train flags> [--proto-* flags]",
        description=DESCRIPTION,
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,  # tells a flag that was given from one that was not
    )
    group = parser.add_argument_group(str(ProtoConfig.__doc__))
    for item in dataclasses.fields(ProtoConfig):
        words: dict[str, Any] = {"help": f"{item.metadata['help']} (default: {item.default})"}
        if isinstance(item.default, bool):
            words["action"] = argparse.BooleanOptionalAction
        else:
            words.update(type=type(item.default), metavar="N")
        group.add_argument(flag_of(item), dest=item.name, **words)
    return parser


def split_flags(argv: Sequence[str]) -> tuple[ProtoConfig | None, list[str]]:
    """Our settings (None: no --proto-* flag) and OpenCLIP's part of the command line.

    Raises:
        ValueError: a --proto-* flag that does not exist, or a value out of range.
    """
    given, rest = build_parser().parse_known_args(list(argv))
    known = [flag_of(item) for item in dataclasses.fields(ProtoConfig)]
    for word in rest:
        if word.startswith(("--proto", "--no-proto")):
            near = difflib.get_close_matches(word.split("=")[0], known, n=1)
            raise ValueError(
                f"{word}: no such flag; "
                + (f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}")
            )
    return (ProtoConfig(**vars(given)) if vars(given) else None), rest


def load_trainer() -> Any:
    """The module ``open_clip_train.main``.

    Raises:
        ValueError: it, or something it needs, is not installed.
    """
    try:
        return importlib.import_module("open_clip_train.main")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"OpenCLIP's trainer cannot be imported ({error}); pip install 'protoclip[openclip]'"
        ) from error


@contextlib.contextmanager
def patched(trainer: Any, proto: ProtoConfig | None) -> Iterator[None]:
    """Our factories in the place of the trainer's, for the time of the block.

    Raises:
        ValueError: a trainer that takes its loss from neither.
    """
    ours: dict[str, Callable[..., Any]] = {"create_task": create_task, "create_loss": create_loss}
    name = next((name for name in ours if hasattr(trainer, name)), None)
    if name is None:
        raise ValueError(
            "expected an open_clip_train.main with create_loss (3.x) or create_task (4.x), found "
            "neither; install open_clip_torch 3.3 or 4"
        )
    original = getattr(trainer, name)
    setattr(trainer, name, functools.partial(ours[name], proto=proto))
    try:
        with repaired():
            yield
    finally:
        setattr(trainer, name, original)


def registered(rest: list[str]) -> list[str]:
    """Makes our models, and a --model that is a config file, known to OpenCLIP."""
    from protoclip.model import register_configs

    parser = argparse.ArgumentParser(PROG, add_help=False, allow_abbrev=False)
    parser.add_argument("--model", default="")
    given, others = parser.parse_known_args(rest)
    name = register_configs(given.model)
    return [*others, "--model", name] if name else rest


def _their_help(trainer: Any) -> str:
    """What open_clip_train says about its flags, without its own usage, which is not this one's."""
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        trainer.parse_args(["--help"])
    return "open_clip_train's " + text.getvalue().partition("\n\n")[2].rstrip()


def _check(trainer: Any, proto: ProtoConfig | None, rest: list[str]) -> None:
    """Say now what the factories would say after minutes of loading."""
    args = trainer.parse_args(list(rest))
    if proto is None:
        return
    other = {
        "--siglip": args.siglip,
        "a CoCa model": "coca" in args.model.lower(),
        "--distill-model": bool(args.distill_model),
        "--horovod": getattr(args, "horovod", False),
    }
    for name, is_on in other.items():
        if is_on:
            raise ValueError(f"--proto-* do not go with {name}: leave one of them out")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; a user's mistake in our flags ends it with one line and status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        proto, rest = split_flags(argv)
        trainer = load_trainer()
        if {"-h", "--help"} & set(rest):
            print(build_parser().format_help() + "\n" + _their_help(trainer))
            return 0
        rest = registered(rest)
        _check(trainer, proto, rest)
    except ValueError as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2
    with patched(trainer, proto):
        return 1 if trainer.main(rest) else 0
