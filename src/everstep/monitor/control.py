"""What a script may ask of its launcher. Names and values are those that users of NVIDIA's launcher know."""

import dataclasses
import enum

REASON_CHARS_MAX = 1000


class WorkloadAction(enum.Enum):
    """Sorted by how much it changes."""

    Continue = 0  # go on as usual
    ExcludeThisNode = 1  # this node leaves the job, and stays out until `everstep nodes admit`
    ShutdownWorkload = 2  # the whole job ends, and nothing is restarted


@dataclasses.dataclass(frozen=True)
class WorkloadControlRequest:
    action: WorkloadAction
    description: str = ""
