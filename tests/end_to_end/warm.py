"""Imported by the server that tests fork processes from: libraries, data and base are loaded."""

from command_line import SMALL

import simulations.compare  # noqa: F401
from fedgraft.config import Config
from simulations.check import check

check(Config().with_overrides(SMALL))
