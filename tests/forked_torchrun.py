"""PyTorch's torchrun, except that ranks are forked from the agent and import nothing again."""

from torch.distributed import run
from torch.distributed.launcher.api import elastic_launch

from protoclip.train import main as train


def main(argv: list[str]) -> int:
    words = run.parse_args(argv)
    config, _, _ = run.config_from_args(words)
    config.start_method = "fork"
    codes = elastic_launch(config, train)(words.training_script_args)
    return max(codes.values())
