"""Which programs were compiled, and in which thread."""

import contextlib
import logging
import re

import jax


@contextlib.contextmanager
def compilations():
    """A list of (name of a jitted function, name of the thread), one for each compilation."""
    seen: list[tuple[str, str]] = []

    class Handler(logging.Handler):
        def emit(self, record):
            if match := re.match(r"Finished XLA compilation of jit\((\w+)\)", record.getMessage()):
                seen.append((match[1], record.threadName))

    logger, handler = logging.getLogger("jax._src.dispatch"), Handler()
    logger.addHandler(handler)
    propagates, logger.propagate = logger.propagate, False
    jax.config.update("jax_log_compiles", True)  # the context manager is of one thread
    try:
        yield seen
    finally:
        jax.config.update("jax_log_compiles", False)
        logger.propagate = propagates
        logger.removeHandler(handler)
