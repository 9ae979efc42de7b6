"""Keep the screen ours: what Flower, transformers and datasets have to say goes to a log file."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedgraft.files import disk_errors

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_CHATTY = ("flwr", "transformers", "datasets", "peft", "ray", "huggingface_hub")


def quiet_environment() -> dict[str, str]:
    """Return the variables that silence progress bars, telemetry and update checks."""
    return {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }


@contextmanager
def quiet(path: Path) -> Iterator[None]:
    """Inside the block all logging and warnings go to a file and nothing to the screen.

    Raises:
        RunError: the file cannot be written.
    """
    for name, value in quiet_environment().items():
        os.environ.setdefault(name, value)
    with disk_errors(path):
        handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter(_FORMAT))
    _hide_bars()  # first, since transformers gives its logger a handler when it is loaded
    loggers = [logging.getLogger(name) for name in _CHATTY]
    saved = [(logger, logger.handlers[:], logger.propagate) for logger in loggers]
    root = logging.getLogger()
    root_handlers, root_level = root.handlers[:], root.level
    for logger in loggers:
        logger.handlers, logger.propagate = [], True
    root.handlers = [handler]
    raises, logging.raiseExceptions = logging.raiseExceptions, False  # a full disk must stay quiet
    root.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            logging.captureWarnings(True)
            yield
    finally:
        logging.captureWarnings(False)
        logging.raiseExceptions = raises
        root.handlers = root_handlers
        root.setLevel(root_level)
        for logger, handlers, propagate in saved:
            logger.handlers, logger.propagate = handlers, propagate
        with suppress(OSError):  # what a full disk kept back is given up
            handler.close()


@contextmanager
def hushed() -> Iterator[None]:
    """Inside the block libraries print nothing; for work before there is a log file."""
    for name, value in quiet_environment().items():
        os.environ.setdefault(name, value)
    _hide_bars()
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def _hide_bars() -> None:
    """Switch off the bars of libraries that are loaded already and so read no variables."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
