"""`ollamapy serve`: the log, the process that engines are forked from, and then the server. Imports little before that."""

from __future__ import annotations

import logging
import sys

from ollamapy.env import Settings
from ollamapy.lifecycle.spawner import Spawner

_TRACE = 5


def start(settings: Settings) -> int:
    """Serves until SIGINT or SIGTERM. Returns the exit status, as `main.run`. Call on the main thread.

    Importing the server takes 0.3 s and torch, in the other process, 1 s: they go side by side.
    """
    set_up_logging(settings)
    spawner = Spawner()
    spawner.launch()
    try:
        from ollamapy.lifecycle.residents import Residents
        from ollamapy.server.main import run

        return run(settings, Residents(settings, spawner=spawner))
    finally:
        spawner.close()


def set_up_logging(settings: Settings) -> None:
    level = {"": logging.INFO, "0": logging.INFO, "false": logging.INFO, "2": _TRACE}.get(settings.debug.lower(), logging.DEBUG)
    logging.basicConfig(
        level=level, stream=sys.stderr, format="time=%(asctime)s level=%(levelname)s source=%(name)s msg=%(message)s"
    )
    logging.getLogger("asyncio").setLevel(max(level, logging.INFO))
