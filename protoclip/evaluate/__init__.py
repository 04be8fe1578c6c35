"""Evaluate a model: ``python -m protoclip.evaluate MODEL --data ... --tasks ...``."""
