"""A disk that fills up, for tests of what is left behind."""

import contextlib
import resource


@contextlib.contextmanager
def file_limit(size):
    """Let the operating system refuse to write more than ``size`` bytes to a file, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
