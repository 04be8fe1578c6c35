"""ProtoCLIP at the price of CLIP."""
