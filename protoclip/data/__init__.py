"""Image-text pairs."""
