"""An epoll made to leave a socket alone, without its owner."""

import select
import socket

from everstep.collectives.epolls import leave_alone
from everstep.collectives.sockets import OpenSocket, open_sockets


def _opened(sock: socket.socket) -> OpenSocket:
    return next(opened for opened in open_sockets() if opened.fd == sock.fileno())


def test_an_epoll_no_longer_reports_a_socket_that_it_is_to_leave_alone_and_its_owner_can_still_remove_it() -> None:
    left, far = socket.socketpair()
    other, other_far = socket.socketpair()
    with left, far, other, other_far, select.epoll() as poll:
        poll.register(left, select.EPOLLIN)
        poll.register(other, select.EPOLLIN)
        far.send(b"x")
        other_far.send(b"x")
        left.shutdown(socket.SHUT_RD)
        assert {fd for fd, _ in poll.poll(0)} == {left.fileno(), other.fileno()}
        leave_alone([_opened(left)])
        assert poll.poll(0) == [(other.fileno(), select.EPOLLIN)]
        far.close()
        poll.poll(0)  # may say that it was closed
        assert poll.poll(0) == [(other.fileno(), select.EPOLLIN)]
        poll.unregister(left)
        poll.modify(other, 0)


def test_an_epoll_whose_owner_has_removed_the_socket_stays_as_it_is() -> None:
    left, far = socket.socketpair()
    with left, far, select.epoll() as poll:
        poll.register(far, select.EPOLLOUT)
        leave_alone([_opened(left)])
        assert poll.poll(0) == [(far.fileno(), select.EPOLLOUT)]
