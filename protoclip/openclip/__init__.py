"""OpenCLIP's trainer with our losses: ``python -m protoclip.openclip <open_clip_train flags>``."""

from protoclip.openclip.factory import create_loss, create_task

__all__ = ["create_loss", "create_task"]
