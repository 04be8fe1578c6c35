"""``protoclip COMMAND ...``, or ``python -m protoclip COMMAND ...``: every command by one name.

Only the command that is asked for is loaded, and for its --help only its flags.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from protoclip import __version__
from protoclip.commands import PARSERS

PACKAGES = ("data", "evaluate", "report")
HELP = """protoclip trains CLIP with prototypes, and shows which pictures belong together.

  protoclip train                       a small ProtoCLIP on built-in emoji, minutes on a CPU
  protoclip cluster photos/ --k 50      pictures, or rows of features, in groups
  protoclip evaluate logs/RUN           the numbers of a run, or of any CLIP on your data
  protoclip report logs/RUN             one page about a run, or about several side by side
  protoclip export logs/RUN --out DIR   the model, as OpenCLIP and CLIP_benchmark load it

More commands: plan, data, teacher, openclip. The flags of one: protoclip COMMAND --help"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is the command's, 2 where there is no such command."""
    command, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help", "--help-all"):
        print(HELP)
        return 0
    if command == "--version":
        print(f"protoclip {__version__}")
        return 0
    if command not in PARSERS:
        near = difflib.get_close_matches(command, PARSERS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(PARSERS)}"
        print(f"protoclip: error: {command!r} is no command; {hint}", file=sys.stderr)
        return 2
    if asked := [word for word in rest if word in ("-h", "--help", "--help-all")]:
        PARSERS[command]().parse_args(asked)
    module = f"protoclip.{command}" + ".__main__" * (command in PACKAGES)
    return importlib.import_module(module).main(rest)


if __name__ == "__main__":
    sys.exit(main())
