"""The entry point of every command: ``protoclip COMMAND ...`` or ``python -m protoclip COMMAND``.

Only the requested command is imported, after its flags and files have been checked, and for its
--help only its flags.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from protoclip import __version__
from protoclip.common.files import printable_lines
from protoclip.common.signals import EarlySignals
from protoclip.settings.command_line import PROCESS_COUNTS, check_command_line
from protoclip.settings.commands import HELP_FLAGS, PARSERS, show_help

PACKAGES = ("cluster", "curate", "data", "encode", "evaluate", "report")
HELP = """protoclip: contrastive losses, ProtoCLIP training, and groups of pictures.

  protoclip train                         train a small ProtoCLIP on built-in
                                          icons: minutes on a CPU
  protoclip train --train-data pairs.csv  train on your pictures and captions
  protoclip compare --train-data PAIRS    does ProtoCLIP help on your data?
  protoclip report logs/A logs/B          show runs next to each other on a page
  protoclip evaluate logs/RUN             evaluate a run, or any CLIP
  protoclip encode photos/ --out DIR      store features of pictures, captions
  protoclip cluster photos/ --k 50        group a folder of pictures
  protoclip curate features/ --levels 1000,100 --target 5000
                                          choose a balanced subset of features
  protoclip export logs/RUN --out DIR     write the model for OpenCLIP

The losses are for your own loop, in Python:

  loss = protoclip.ClipLoss()             # was open_clip.loss.ClipLoss()
  python -c "import protoclip; help(protoclip)"

More commands: openclip (OpenCLIP's trainer with these losses), plan (the
memory of a run), data (check or export pairs).
Flags of a command: protoclip COMMAND --help"""
# What else people call a command -> its name.
SYNONYMS = {"group": "cluster", "eval": "evaluate", "kmeans": "cluster", "teacher": "encode"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code, or 2 for an unknown command."""
    try:
        try:
            with EarlySignals():
                return _run(list(sys.argv[1:] if argv is None else argv))
        finally:  # argparse exits after its help
            sys.stdout.flush()
    except BrokenPipeError:  # the reader is gone, as after | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(words: list[str]) -> int:
    command = words[0] if words else "--help"
    arguments = words[1:]
    if command == "help" and arguments:  # protoclip help train
        command, arguments = arguments[0], ["--help"]
    if command in ("help", *HELP_FLAGS):
        print(HELP)
        return 0
    if command == "--version":
        print(f"protoclip {__version__}")
        return 0
    if command not in PARSERS:
        near = difflib.get_close_matches(command, [*PARSERS, *SYNONYMS], n=1)
        near = [SYNONYMS.get(name, name) for name in near]
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(PARSERS)}"
        print(f"protoclip: error: {command!r} is not a command; {hint}", file=sys.stderr)
        return 2
    show_help(command, arguments)
    if not any(name in os.environ for name in PROCESS_COUNTS):  # else every process would say it
        try:
            check_command_line(command, arguments)
        except ValueError as error:
            print(f"protoclip {command}: error: {printable_lines(str(error))}", file=sys.stderr)
            return 2
    module = f"protoclip.{command}"
    if command in PACKAGES:
        module += ".__main__"
    return importlib.import_module(module).main(arguments)


if __name__ == "__main__":
    sys.exit(main())
