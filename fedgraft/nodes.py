"""The nodes of a deployed SuperLink, over Flower's Control API: listed, registered, taken away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    RegisterNodeRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor

from fedgraft.errors import RunError


@dataclass(frozen=True)
class Node:
    """One SuperNode as its SuperLink knows it.

    Attributes:
        node_id: Flower's id.
        name: what it was registered as.
        public_key: PEM.
        status: "registered" (never seen), "online", "offline" or "unregistered".
        online_until: Unix time at which it counts as offline unless heard of; None unless online.
    """

    node_id: int
    name: str
    public_key: bytes
    status: str
    online_until: float | None


class Nodes:
    """The nodes of one SuperLink."""

    def __init__(self, client: ControlHttpClient) -> None:
        self._client = client

    def all(self) -> list[Node]:
        """Return every node, those that were taken away included."""
        found = self._client.ListNodes(ListNodesRequest()).nodes_info
        return [
            Node(
                one.node_id,
                one.name,
                one.public_key,
                one.status,
                one.online_until if one.status == "online" else None,
            )
            for one in found
        ]

    def register(self, public_key: bytes, name: str) -> int:
        """Let the node with this public key (PEM) in, and return its new id."""
        request = RegisterNodeRequest(public_key=public_key, name=name)
        return self._client.RegisterNode(request).node_id

    def unregister(self, node_id: int) -> None:
        """Take a node away; its SuperNode is refused from then on."""
        self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))


@contextmanager
def nodes_of(port: int, root_certificates: Path) -> Iterator[Nodes]:
    """Speak to the SuperLink on a port of loopback.

    Args:
        port: where it listens.
        root_certificates: the CA of its certificate.

    Raises:
        RunError: it does not answer, or refuses.
    """
    client = ControlHttpClient.from_server_address(
        server_address=f"127.0.0.1:{port}",
        insecure=False,
        root_certificates=root_certificates.read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    )
    try:
        yield Nodes(client)
    except httpx.HTTPStatusError as error:
        said = error.response.text[:200]
        raise RunError(f"the SuperLink refused: {error.response.status_code} {said}") from error
    except httpx.HTTPError as error:
        raise RunError(
            f"the SuperLink on 127.0.0.1:{port} does not answer: {error}", "Is the server running?"
        ) from error
    finally:
        client.close()
