"""Evaluate a model: ``protoclip evaluate MODEL --data ... --tasks ...``."""
