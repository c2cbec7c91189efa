"""A TCP relay on loopback whose far end a test can change: an address that moves to another server."""

import contextlib
import socket
import threading

CHUNK_BYTES = 1 << 16
DEADLINE_S = 10.0


class Relay:
    """`with Relay(address) as relay`: connect to `relay.address`."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._listener.getsockname())
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Relay":
        self._run(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # ends its accept
        self._cut()
        for thread in list(self._threads):
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
        self._listener.close()

    def point_at(self, target: str) -> None:
        """Cut what is connected; whoever connects from now on gets to `target`."""
        with self._lock:
            self._target = target
        self._cut()

    def _cut(self) -> None:
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            with near:
                self._connect(near.dup())

    def _connect(self, near: socket.socket) -> None:
        with self._lock:
            target = self._target
        host, _, port = target.rpartition(":")
        try:
            far = socket.create_connection((host, int(port)), timeout=DEADLINE_S)
        except OSError:
            near.close()
            return
        far.settimeout(None)
        with self._lock:
            if target != self._target:
                near.close()
                far.close()
                return
            self._open += [near, far]
        self._run(self._pass, near, far)
        self._run(self._pass, far, near)

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        with self._lock:
            if source in self._open:
                self._open.remove(source)
        source.close()

    def _run(self, target: object, *args: socket.socket) -> None:
        thread = threading.Thread(target=target, args=args, name="relay", daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()
