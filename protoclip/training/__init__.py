"""The parts of a training run; ``protoclip.train`` puts them together."""
