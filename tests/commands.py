"""Calls a command in this process as the shell would call it."""

import logging
import warnings
from collections.abc import Callable
from unittest import mock

__all__ = ["invoke"]


def invoke(main: Callable[[], object], *arguments: str) -> int:
    """The exit status of `main` with these arguments; the log files that it opened are closed again."""
    loggers = [logging.getLogger(name) for name in (None, "pytorch_lightning", "lightning_fabric")]
    before = [(logger, logger.handlers[:], logger.propagate) for logger in loggers]
    try:
        with mock.patch("sys.argv", ["revnet-command", *arguments]), warnings.catch_warnings():
            main()
    except SystemExit as end:
        return 0 if end.code is None else int(end.code)
    finally:
        for logger, handlers, propagate in before:
            for handler in set(logger.handlers) - set(handlers):
                handler.close()
            logger.handlers[:], logger.propagate = handlers, propagate
    return 0
