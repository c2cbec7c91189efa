"""Names of what the operator may choose; what each means is decided elsewhere."""

import enum


class RestartPolicyName(str, enum.Enum):
    """Which workers start again when one has failed."""

    ANY_FAILED = "any-failed"  # all workers of the world; torchrun's
    MIN_HEALTHY = "min-healthy"  # all, but only once fewer than min nodes have all their workers running
    GROUP = "group"  # those of the failed replica group; the others never stop
