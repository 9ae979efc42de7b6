"""Chat records: lists of messages with roles, as OpenAI's and ShareGPT's formats write them."""

from __future__ import annotations

import json
from typing import Any, TypedDict

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {"human": "user", "gpt": "assistant"}
"""What ShareGPT's `from` calls the roles."""
COLUMNS = ("messages", "conversations")
"""The columns taken for chat records, the first that is there."""


class Message(TypedDict):
    """One turn."""

    role: str
    content: str


def read_messages(value: Any) -> list[Message]:
    """Check one record.

    Args:
        value: a list of {role, content} or of ShareGPT's {from, value}, or its JSON (a CSV file
            has only text).

    Raises:
        ValueError: what is wrong with it, a clause that follows "line 3 ...".
    """
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError("holds text that is no list of messages") from None
    if not value:
        raise ValueError("has no messages")
    if not isinstance(value, list):
        kind = "an object" if isinstance(value, dict) else "no list of messages"
        raise ValueError(f"holds {kind}, where a list of messages is wanted,")
    messages = [_message(turn, number) for number, turn in enumerate(value, start=1)]
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("has no message of an assistant, so nothing to learn,")
    return messages


def _message(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"has a message {number} that is no object with role and content")
    named = "role" if "role" in turn else "from"
    if named not in turn:
        raise ValueError(f"has a message {number} without a role")
    role = SHAREGPT.get(str(turn[named]), turn[named])
    if role not in ROLES:
        raise ValueError(
            f"has a message {number} of role {turn[named]!r}, which is none of {', '.join(ROLES)},"
        )
    content = turn.get("content") if named == "role" else turn.get("value")
    if not isinstance(content, str):
        raise ValueError(f"has a message {number} whose content is no text")
    if role == "assistant" and not content.strip():
        raise ValueError(f"has a message {number} of an assistant that says nothing")
    return {"role": role, "content": content}
