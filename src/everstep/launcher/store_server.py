"""Hosts a TCPStore for a group's workers until it is killed: `python -m everstep.launcher.store_server HOST`.

Its stdin is the socket to listen on, bound by the agent: the address is known, and connections wait, from the start.
"""

import os
import signal
import socket
import sys

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch's stubs do not export it


def main() -> None:
    (host,) = sys.argv[1:]
    listener = socket.socket(fileno=os.dup(0))
    port = listener.getsockname()[1]
    _store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    while True:
        signal.pause()  # the agent's SIGKILL ends it, or the agent's end


if __name__ == "__main__":
    main()
