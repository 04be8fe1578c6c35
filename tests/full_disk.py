"""A full disk for a test."""

import contextlib
import resource


@contextlib.contextmanager
def full_disk(room):
    """Files cannot grow past ``room`` bytes: the system refuses the write as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
