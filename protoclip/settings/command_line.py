"""What a command line alone shows to be wrong, so that it is answered before torch is imported."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

from protoclip.common.paths import check_exists
from protoclip.settings.commands import PARSERS
from protoclip.settings.comparison import parse_record
from protoclip.settings.config import ProtoConfig
from protoclip.settings.flags import Parser, checked_config, refusal, with_saved_config

# Flags and arguments that name data or files.
PATHS = {
    "--train-data", "--val-data", "--resume", "--data", "--check", "--export", "--run",
    "--features", "--captions", "--classes", "--weights", "--rows", "DATA", "RUN",
    "RUN_OR_CHECKPOINT",
}  # fmt: skip
PATHS_OR_NAMES = ("MODEL", "--external-teacher")  # a name contains no slash
REMEDIES = {  # what to do where they do not exist, for most: check the path
    "--train-data": "check the path, or use builtin:icons",
    "--resume": "check the path, or use --resume auto, which starts where there is no checkpoint",
}
# The variables in which launchers say how many processes there are; see protoclip.distributed.
PROCESS_COUNTS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
NO_PATHS = ("auto", "latest")  # values of --resume


def check_command_line(command: str, argv: Sequence[str]) -> None:
    """Check the flags of a command, its numbers, and that the files exist which it names.

    Raises:
        ValueError: what is wrong, in a sentence.
        SystemExit: after --help.
    """
    parser = PARSERS[command]()
    parser.raises = True
    if command == "openclip":
        settings, words = parser.parse_known_args(list(argv))
        del settings.dedup
        ProtoConfig(**vars(settings))
        if importlib.util.find_spec("open_clip_train"):  # else the command says what to install
            check_openclips_flags(words)
        return
    if command in ("train", "plan"):
        argv = with_saved_config(argv)
    flags = parse_record(argv)[1] if command == "compare" else parser.parse_args(argv)
    _check_paths(parser, flags)
    if command in ("train", "plan"):
        checked_config(vars(flags))


def check_openclips_flags(words: Sequence[str]) -> None:
    """Raise ValueError for a flag that neither OpenCLIP's trainer nor its command here has."""
    flags = set(re.findall(r"--[\w-]*\w", PARSERS["openclip"]().format_help()))
    for word in words:
        name = word.partition("=")[0]  # OpenCLIP accepts abbreviations
        if name.startswith("--") and not any(flag.startswith(name) for flag in flags):
            raise ValueError(refusal(name, flags))


def _check_paths(parser: Parser, flags: Any) -> None:
    for action in parser._actions:
        flag = action.option_strings[0] if action.option_strings else str(action.metavar)
        value = getattr(flags, action.dest, "")
        for name in value if isinstance(value, list) else [value]:
            if not name or name in NO_PATHS:
                continue
            if flag in PATHS or (flag in PATHS_OR_NAMES and os.sep in name):
                check_exists(name, flag, REMEDIES.get(flag, "check the path"))
