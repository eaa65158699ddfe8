"""A relay between this process and the coordinator, which outlives the coordinator."""

import socket
import threading


class Relay:
    """Passes bytes between a port of this host and the coordinator, and keeps the near end open when the far one goes.

    JAX's client ends its process from C++, with a stack trace, in the moment in which its connection breaks. Behind a
    relay it does not learn of that, and `broken` says so to whoever can end the process in words.

    Args:
      target: HOST:PORT of the coordinator.
    """

    def __init__(self, target: str):
        host, _, port = target.rpartition(":")
        self._target = host.strip("[]"), int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.broken = threading.Event()
        threading.Thread(target=self._accept, name="relay", daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            try:
                far = socket.create_connection(self._target)
            except OSError:  # the coordinator has not started: the client asks again
                near.close()
                continue
            for each in (near, far):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._send, args=(near, far), daemon=True).start()
            threading.Thread(target=self._receive, args=(near, far), daemon=True).start()

    def _send(self, near: socket.socket, far: socket.socket) -> None:
        """Passes on what the client says, and its good-bye."""
        try:
            _copy(near, far)
            far.shutdown(socket.SHUT_WR)
        except OSError:
            self.broken.set()

    def _receive(self, near: socket.socket, far: socket.socket) -> None:
        """Passes on what the coordinator says; its good-bye is kept from the client."""
        try:
            _copy(far, near)
        except OSError:
            pass
        self.broken.set()


def _copy(source: socket.socket, target: socket.socket) -> None:
    while data := source.recv(1 << 16):
        target.sendall(data)
