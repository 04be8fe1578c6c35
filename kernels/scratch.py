"""The most memory that launchers take beside their results, in bytes. No Triton here:
``protoclip.ops`` hands these on to whoever plans memory."""

PARTIAL_BYTES = 64 << 20  # partial sums of a forward pass over tiles
GRADIENT_BYTES = 128 << 20  # a chunk of G, the gradient of the logits (waves.py)
PROTOTYPE_BYTES = 256 << 20  # weights of fp32 or wide rows (prototype_cross_entropy.py)
