"""Flower's SuperNode with what it lacks: a client certificate, and shorter waits.

`python -m deploy.supernode OPTIONS` takes flower-supernode's own options. Flower's SuperNode has no
option for a client certificate, which the gateway asks for, and looks for messages every 3 s. What
is touched of Flower is here, with a test.
"""

from __future__ import annotations

import logging
import os
import ssl
import sys
import time
from types import SimpleNamespace
from typing import Any

from flwr.supernode import start_client_internal as loop
from flwr.supernode.cli import flower_supernode

CERTIFICATE, KEY = "FEDGRAFT_CLIENT_CERTIFICATE", "FEDGRAFT_CLIENT_KEY"
"""Environment variables with the paths of the client's certificate and its key."""
LONGEST_SLEEP = 0.2
"""Seconds between two questions to the server, or to the ClientApp."""


def wait_less() -> None:
    """Cap the SuperNode's sleeps."""
    capped = SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, LONGEST_SLEEP)))
    module: Any = loop
    module.time = capped


def present(certificate: str, key: str) -> None:
    """Let every TLS context that trusts the federation's CA also present a client certificate."""
    trust = ssl.SSLContext.load_verify_locations

    def trust_and_present(context: ssl.SSLContext, *args: Any, **kwargs: Any) -> None:
        trust(context, *args, **kwargs)
        if context.protocol == ssl.PROTOCOL_TLS_CLIENT:
            context.load_cert_chain(certificate, key)

    patched: Any = ssl.SSLContext
    patched.load_verify_locations = trust_and_present


def main() -> None:
    """Run the SuperNode in this process."""
    wait_less()
    logging.getLogger("flwr").addFilter(lambda record: bool(record.getMessage().strip()))
    if CERTIFICATE in os.environ:
        present(os.environ[CERTIFICATE], os.environ[KEY])
    sys.argv[0] = "flower-supernode"
    flower_supernode()


if __name__ == "__main__":
    main()
