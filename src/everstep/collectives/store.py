"""Where a quorum's members meet before they have a group: everyone brings some bytes, everyone gets all of them.

Not torch's TCPStore: each connection to one makes both ends ask the DNS for the other's name (torch 2.13), which takes
5 s whenever an answer is lost, and the server answers nobody meanwhile; and a wait on it can only be cut off with
pages of warnings. What building a group needs of a store is a single gather, one round trip.

Frames are a length (4 bytes, big endian) and a MessagePack value:

    member   Bring(key, rank, size, value)    once per key
    store    Gathered(values)                 when all `size` have brought theirs
             Left(rank)                       somebody who had brought his left before that
    member   AskMissing(key)
    store    Missing(ranks)                   who has not brought anything yet
"""

import selectors
import socket
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

import msgspec

from everstep import fork_guard
from everstep.collectives.sockets import Address, joined

MEMBERS_MAX = 4096
CONNECTIONS_MAX = 4 * MEMBERS_MAX
REQUEST_BYTES_MAX = 256 * 1024
REPLY_BYTES_MAX = 256 * 1024 * 1024
MEETINGS_MAX = 1024  # open at once
ENDED_KEPT = 256  # whose `Left` is still told to those who come late
CLOSE_TIMEOUT_S = 5.0
LENGTH = struct.Struct(">I")
_READ_BYTES = 64 * 1024


class Bring(msgspec.Struct, frozen=True, tag="bring"):
    key: str
    rank: int
    size: int
    value: bytes


class AskMissing(msgspec.Struct, frozen=True, tag="ask-missing"):
    key: str


class Gathered(msgspec.Struct, frozen=True, tag="gathered"):
    values: list[bytes]


class Left(msgspec.Struct, frozen=True, tag="left"):
    rank: int


class Missing(msgspec.Struct, frozen=True, tag="missing"):
    ranks: list[int]


Request = Bring | AskMissing
Reply = Gathered | Left | Missing

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)


def frame(message: Request | Reply) -> bytes:
    payload = _encoder.encode(message)
    return LENGTH.pack(len(payload)) + payload


class HostedStore:
    """A store of this process: one listening address, one thread that sleeps unless members meet."""

    def __init__(self, bind_host: str) -> None:
        self._bind_host = bind_host
        self._listener: socket.socket | None = None
        self._wake: tuple[socket.socket, socket.socket] | None = None
        self._thread: threading.Thread | None = None
        self._address: Address | None = None
        self._server: _Server | None = None
        self._lift_guard: Callable[[], None] | None = None

    def start(self) -> None:
        """Listen on a free port. Raises OSError when `bind_host` is not an address of this host."""
        family, kind, protocol, _, target = socket.getaddrinfo(self._bind_host, 0, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.bind(target)
            listener.listen(MEMBERS_MAX)
            listener.setblocking(False)
        except OSError:
            listener.close()
            raise
        self._listener, self._wake = listener, socket.socketpair()
        name = listener.getsockname()
        self._address = (str(name[0]), int(name[1]))
        self._server = _Server(listener, self._wake[0])
        self._lift_guard = fork_guard.guard(self._server.fds)
        self._thread = threading.Thread(target=self._server.serve, name="everstep-store", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """`host:port` for `Membership.store`."""
        assert self._address is not None, "start() it first"
        return joined(self._address)

    def close(self) -> None:
        """Stop serving: members that are still meeting there fail. Idempotent."""
        if self._wake is None or self._listener is None or self._thread is None or self._lift_guard is None:
            return
        self._wake[1].close()
        self._thread.join(CLOSE_TIMEOUT_S)
        self._wake[0].close()
        self._listener.close()
        self._lift_guard()
        self._wake = None

    def __enter__(self) -> "HostedStore":
        if self._thread is None:
            self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def host_store(bind_host: str = "127.0.0.1") -> HostedStore:
    """A running store: tell the members its `address`, and `close()` it in the end."""
    hosted = HostedStore(bind_host)
    hosted.start()
    return hosted


@dataclass(eq=False)
class _Member:
    """One connection."""

    sock: socket.socket
    received: bytearray = field(default_factory=bytearray)
    unsent: bytearray = field(default_factory=bytearray)
    meetings: set[str] = field(default_factory=set)  # where it is awaited that the others come


@dataclass
class _Meeting:
    size: int
    values: dict[int, bytes] = field(default_factory=dict)
    members: dict[int, _Member] = field(default_factory=dict)


class _Server:
    """The thread's own state; only `fds` is for others, namely a forked child."""

    def __init__(self, listener: socket.socket, wake: socket.socket) -> None:
        self._listener = listener
        self._wake = wake
        self._members: dict[int, _Member] = {}  # by descriptor
        self._meetings: dict[str, _Meeting] = {}
        self._ended: OrderedDict[str, int] = OrderedDict()  # key -> the rank that left
        self._selector = selectors.DefaultSelector()

    def fds(self) -> list[int]:
        return [self._listener.fileno(), *self._members]

    def serve(self) -> None:
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        while True:
            for key, events in self._selector.select():
                if key.fileobj is self._wake:
                    return self._end()
                if key.fileobj is self._listener:
                    self._accept()
                elif (member := self._members.get(key.fd)) is not None:
                    self._attend(member, events)

    def _end(self) -> None:
        for member in tuple(self._members.values()):
            self._dismiss(member)
        self._selector.close()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:  # it has gone already, or we have run out of descriptors: it will notice
            return
        if len(self._members) >= CONNECTIONS_MAX:
            sock.close()
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._members[sock.fileno()] = _Member(sock)
        self._selector.register(sock, selectors.EVENT_READ)

    def _attend(self, member: _Member, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                self._flush(member)
            if events & selectors.EVENT_READ:
                data = member.sock.recv(_READ_BYTES)
                if not data:
                    self._dismiss(member)
                    return
                member.received += data
                self._take_requests(member)
        except BlockingIOError:
            return
        except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError, _Illegal):
            self._dismiss(member)

    def _take_requests(self, member: _Member) -> None:
        received = member.received
        while len(received) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(received)
            if length > REQUEST_BYTES_MAX:
                raise _Illegal
            if len(received) < LENGTH.size + length:
                return
            request = _decoder.decode(bytes(received[LENGTH.size : LENGTH.size + length]))
            del received[: LENGTH.size + length]
            if isinstance(request, Bring):
                self._bring(member, request)
            else:
                meeting = self._meetings.get(request.key)
                missing = [] if meeting is None else [r for r in range(meeting.size) if r not in meeting.values]
                self._reply(member, Missing(missing))

    def _bring(self, member: _Member, brought: Bring) -> None:
        if not 0 <= brought.rank < brought.size <= MEMBERS_MAX:
            raise _Illegal
        if brought.key in self._ended:
            self._reply(member, Left(self._ended[brought.key]))
            return
        meeting = self._meetings.get(brought.key)
        if meeting is None:
            if len(self._meetings) >= MEETINGS_MAX:
                raise _Illegal
            meeting = self._meetings[brought.key] = _Meeting(brought.size)
        if meeting.size != brought.size or brought.rank in meeting.values:
            raise _Illegal
        meeting.values[brought.rank] = brought.value
        meeting.members[brought.rank] = member
        member.meetings.add(brought.key)
        if len(meeting.values) == meeting.size:
            self._conclude(brought.key, Gathered([meeting.values[rank] for rank in range(meeting.size)]))

    def _conclude(self, key: str, reply: Reply) -> None:
        meeting = self._meetings.pop(key)
        for other in meeting.members.values():
            other.meetings.discard(key)
        encoded = frame(reply)
        for other in meeting.members.values():
            self._send(other, encoded)

    def _dismiss(self, member: _Member) -> None:
        if self._members.pop(member.sock.fileno(), None) is None:
            return
        self._selector.unregister(member.sock)
        member.sock.close()
        for key in tuple(member.meetings):
            meeting = self._meetings[key]
            rank = next(rank for rank, other in meeting.members.items() if other is member)
            del meeting.members[rank]
            self._ended[key] = rank
            if len(self._ended) > ENDED_KEPT:
                self._ended.popitem(last=False)
            self._conclude(key, Left(rank))

    def _reply(self, member: _Member, reply: Reply) -> None:
        self._send(member, frame(reply))

    def _send(self, member: _Member, encoded: bytes) -> None:
        if member.sock.fileno() not in self._members:
            return
        if len(member.unsent) + len(encoded) > REPLY_BYTES_MAX:
            self._dismiss(member)
            return
        member.unsent += encoded
        try:
            self._flush(member)
        except OSError:
            self._dismiss(member)

    def _flush(self, member: _Member) -> None:
        while member.unsent:
            try:
                sent = member.sock.send(member.unsent)
            except BlockingIOError:
                break
            del member.unsent[:sent]
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if member.unsent else 0)
        if self._selector.get_key(member.sock).events != wanted:
            self._selector.modify(member.sock, wanted)


class _Illegal(Exception):
    """A request that the protocol does not allow: drop the member."""
