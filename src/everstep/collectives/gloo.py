"""The reconfigurable process group over Gloo (CPU tensors)."""

from everstep.collectives.gloo_group import HELPER_NAME, GlooGroup
from everstep.collectives.rebuilt import RebuiltProcessGroup


class GlooProcessGroup(RebuiltProcessGroup):
    """Works with any number of members; with one, no socket is opened and every operation is the identity.

    `bind_host` is the local address on which to accept the peers' connections; None takes the one from which the store
    is reached. `threads` run a group's operations; with one, operations run in the order they were issued.
    """

    def __init__(self, *, bind_host: str | None = None, threads: int = 1) -> None:
        super().__init__(lambda membership: GlooGroup(membership, bind_host, threads), HELPER_NAME)
