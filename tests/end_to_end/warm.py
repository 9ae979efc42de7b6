"""Imported by the server that tests fork processes from: libraries, data and base are loaded."""

import client.app
import server.app
import simulations.compare  # noqa: F401
from command_line import SMALL
from fedgraft.config import Config
from simulations.check import check

check(Config().with_overrides(SMALL))
