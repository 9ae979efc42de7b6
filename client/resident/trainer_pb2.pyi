from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class Greeting(_message.Message):
    __slots__ = ("protocol", "fedgraft")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    FEDGRAFT_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    fedgraft: str
    def __init__(self, protocol: _Optional[int] = ..., fedgraft: _Optional[str] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol", "fedgraft", "client", "busy", "base")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    FEDGRAFT_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    BUSY_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    fedgraft: str
    client: str
    busy: bool
    base: str
    def __init__(self, protocol: _Optional[int] = ..., fedgraft: _Optional[str] = ..., client: _Optional[str] = ..., busy: _Optional[bool] = ..., base: _Optional[str] = ...) -> None: ...

class Order(_message.Message):
    __slots__ = ("protocol", "fedgraft", "run", "kind", "run_config", "content")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    FEDGRAFT_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    RUN_CONFIG_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    fedgraft: str
    run: int
    kind: str
    run_config: str
    content: bytes
    def __init__(self, protocol: _Optional[int] = ..., fedgraft: _Optional[str] = ..., run: _Optional[int] = ..., kind: _Optional[str] = ..., run_config: _Optional[str] = ..., content: _Optional[bytes] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("content",)
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    content: bytes
    def __init__(self, content: _Optional[bytes] = ...) -> None: ...
