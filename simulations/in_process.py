"""The default engine: messages are carried to the ClientApp by a function call.

No server, no sockets, no processes; ServerApp and ClientApp cannot tell the difference.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import count

from flwr.app import Context, Message, MessageType, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedgraft.errors import DiskFullError
from fedgraft.flower import SERVER_NODE, error_reply, set_identity, set_message_id

log = logging.getLogger(__name__)
_run_ids = count(1)


class InProcessGrid(Grid):
    """A Flower Grid whose clients live in this process.

    Messages are kept until they are asked for: every `pull_messages` lets one client work and
    returns its reply, so replies stream to the server one by one.

    Args:
        client_app: called for every message.
        clients: how many; client k holds partition k.
        run_config: what ServerApp and ClientApp find in `context.run_config`.
    """

    def __init__(self, client_app: ClientApp, clients: int, run_config: UserConfig) -> None:
        self._client_app = client_app
        self._run = Run.create_empty(next(_run_ids))
        self._pending: dict[str, Message] = {}
        self._message_ids = count(1)
        self._contexts = {
            SERVER_NODE + 1 + index: Context(
                run_id=self._run.run_id,
                node_id=SERVER_NODE + 1 + index,
                node_config={"partition-id": index, "num-partitions": clients},
                state=RecordDict(),
                run_config=run_config,
            )
            for index in range(clients)
        }
        set_identity(self._run.run_id)

    def set_run(self, run: Run) -> None:
        """Set the run that messages belong to."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message (Flower's older way of `Message(...)`)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the clients' node ids."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages; nothing runs yet."""
        ids = []
        for message in messages:
            message_id = str(next(self._message_ids))
            set_message_id(message, message_id)
            self._pending[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Let the first waiting client work and return its reply."""
        wanted = set(message_ids)
        first = next((waiting for waiting in self._pending if waiting in wanted), None)
        return [] if first is None else [self._work(self._pending.pop(first))]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Carry all messages and return all replies."""
        ids = list(self.push_messages(messages))
        return [reply for _ in ids for reply in self.pull_messages(ids)]

    def _work(self, message: Message) -> Message:
        context = self._contexts[message.metadata.dst_node_id]
        try:
            reply = self._client_app(message=message, context=context)
        except DiskFullError:
            raise  # it is the disk of all clients, and of the server
        except Exception as error:  # what a SuperNode does with a ClientApp that raises
            # Anybody's own ClientApp need not know FedGraft's question for its name.
            asked = message.metadata.message_type.startswith(MessageType.QUERY)
            level = logging.DEBUG if asked else logging.ERROR
            log.log(level, "client on node %d failed", context.node_id, exc_info=True)
            return error_reply(message, error)
        set_message_id(reply, f"reply-{message.metadata.message_id}")
        return reply
