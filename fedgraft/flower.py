"""The parts of Flower that are not its public interface, isolated here, and its processes.

Everything private that FedGraft touches is in this file, each with a test, so that a new Flower
release breaks one place and says so.
"""

from __future__ import annotations

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE = 1
"""Node id of the server in an in-process federation; clients come after it."""


def set_identity(run_id: int, node_id: int = SERVER_NODE) -> None:
    """Tell Flower which run and node this process acts for; messages cannot be made without."""
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = node_id
    TaskIdentity.task_id = 1


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message the id that a SuperLink would have given it."""
    message.metadata.__dict__["_message_id"] = message_id


def error_reply(message: Message, error: Exception) -> Message:
    """Return the reply that a SuperNode sends when its ClientApp raises."""
    code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    return Message(Error(code=code, reason=f"{type(error).__name__}: {error}"), reply_to=message)
