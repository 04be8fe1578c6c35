"""PyTorch's torchrun, except that ranks are forked from the agent and import nothing again."""

import sys

from torch.distributed import run
from torch.distributed.launcher.api import elastic_launch

from protoclip import train


def rank(argv: list[str]) -> int:
    """A rank that fails exits: one that returns waits until the agent has read its value, and an
    agent that was told to stop reads none for 30 s."""
    if code := train.main(argv):
        sys.exit(code)
    return code


def main(argv: list[str]) -> int:
    words = run.parse_args(argv)
    config, _, _ = run.config_from_args(words)
    config.start_method = "fork"
    codes = elastic_launch(config, rank)(words.training_script_args)
    return max(codes.values())
