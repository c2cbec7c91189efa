"""Peers over real Gloo whose messages are struck on their way out: damaged, replaced, or the last of this process."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from everstep.collectives.gloo_peers import GlooPeers
from everstep.recovery import Place, Transfer
from everstep.recovery.over_group import GroupTransport
from everstep.train.transports import check_place, over_gloo

Strike = Callable[[int, int, Tensor], Tensor]  # number of the message on its lane, lane, tensor -> what is sent


class StruckTransport(GroupTransport):
    """Every message that it sends goes through `strike`. Pickles, for processes of their own, as `strike` does."""

    def __init__(self, strike: Strike) -> None:
        super().__init__(self._struck, check_place)
        self._strike = strike

    def __reduce__(self) -> Any:
        return StruckTransport, (self._strike,)

    def _struck(self, place: Place, transfer: Transfer, number: int) -> Any:
        return _StruckPeers(over_gloo(place, transfer, number), self._strike)


class _StruckPeers:
    def __init__(self, inner: GlooPeers, strike: Strike) -> None:
        self._inner = inner
        self._strike = strike
        self._links: dict[tuple[int, int], _StruckLink] = {}

    def link(self, peer: int, number: int) -> Any:
        inner = self._inner.link(peer, number)
        return self._links.setdefault((peer, number), _StruckLink(inner, self._strike))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _StruckLink:
    def __init__(self, inner: Any, strike: Strike) -> None:
        self._inner = inner
        self._strike = strike
        self._sent = [0, 0, 0]

    def send(self, tensor: Tensor, lane: int, patience_s: float) -> Any:
        self._sent[lane] += 1
        return self._inner.send(self._strike(self._sent[lane], lane, tensor), lane, patience_s)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
