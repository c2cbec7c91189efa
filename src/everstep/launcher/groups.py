"""Which replica groups this node runs, what they are called, and which devices each has."""

from dataclasses import dataclass

from everstep.config import REPLICA_GROUPS_MAX, check_count
from everstep.core.types import REPLICA_ID_CHARS_MAX
from everstep.errors import ConfigError
from everstep.launcher.machine import Machine
from everstep.launcher.values import Values

GROUPS_MAX = 1024  # on one node
WORKERS_MAX = 10_000


@dataclass(frozen=True, kw_only=True)
class Place:
    """This node among the others. `node_rank`: None where nothing says it."""

    min_nodes: int
    max_nodes: int
    node_rank: int | None
    is_alone: bool
    hostname: str


def group_ids(values: Values, place: Place) -> tuple[str, ...]:
    """Empty without replica groups. Names that were given, else numbers, else names after the host.

    With `max_nodes` nodes to a group, nodes 0 to max_nodes - 1 make up the first groups, and so on.
    """
    given = values.optional_text("replica_group_id")
    count = values.optional_integer("replica_groups")
    if count is None:
        count = 1 if given else 0
    check_count(values.named("replica_groups"), count, 0, GROUPS_MAX)
    if count == 0:
        if given:
            raise ConfigError(
                f"{values.named('replica_group_id')}={given} names a replica group, and "
                f"{values.named('replica_groups')}=0 says that there is none; leave one of them out"
            )
        return ()
    if given:
        names = [given] if count == 1 else [f"{given}-{index}" for index in range(count)]
    elif place.is_alone:
        names = [str(index) for index in range(count)]
    elif place.node_rank is not None and place.min_nodes == place.max_nodes:
        first = place.node_rank // place.max_nodes * count
        names = [str(first + index) for index in range(count)]
    elif place.max_nodes > 1:
        raise ConfigError(
            f"the nodes of a replica group ({values.named('nnodes')}: {place.min_nodes} to {place.max_nodes}) must "
            "call it by one name: give --replica-group-id (or REPLICA_GROUP_ID), the same on each of them"
        )
    else:
        names = [place.hostname] if count == 1 else [f"{place.hostname}-{index}" for index in range(count)]
    for name in names:
        if len(name) > REPLICA_ID_CHARS_MAX or not name.isprintable() or name != name.strip():
            raise ConfigError(
                f"{values.named('replica_group_id')}={name[:REPLICA_ID_CHARS_MAX]!r} must have 1 to "
                f"{REPLICA_ID_CHARS_MAX} printable characters"
            )
    return tuple(names)


def groups_in_total(values: Values, place: Place, groups: int) -> int:
    """How many the first step waits for; 0: not known."""
    given = values.optional_integer("num_replica_groups")
    if given is None:
        return groups if place.is_alone else 0
    check_count(values.named("num_replica_groups"), given, 0, REPLICA_GROUPS_MAX)
    if 0 < given < groups:
        raise ConfigError(
            f"{values.named('num_replica_groups')}={given} is less than the {groups} replica groups of this node alone"
        )
    return given


def split_devices(values: Values, groups: int, devices: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """A share for each group, in order; () where they are not split. Raises ConfigError where they cannot be."""
    if groups < 2 or not devices or values.flag("share_devices"):
        return ()
    if len(devices) % groups:
        raise ConfigError(
            f"{len(devices)} devices cannot be split between {groups} replica groups: set CUDA_VISIBLE_DEVICES to a "
            "multiple of that (or to nothing, to train on the CPU), or let all see all of them with --share-devices"
        )
    share = len(devices) // groups
    return tuple(devices[index * share : (index + 1) * share] for index in range(groups))


def workers_per_node(values: Values, groups: int, machine: Machine) -> int:
    """Of one group. `auto` and `gpu` count its share of the devices."""
    text, name = values.text("nproc_per_node").strip().lower(), values.named("nproc_per_node")
    give_it = "give the number of workers instead"
    if text.isascii() and text.isdigit() and len(text) < 10:
        count = int(text)
    elif text == "cpu" or (text == "auto" and not machine.devices and machine.accelerator != "hip"):
        count = machine.cpus
    elif text in ("gpu", "auto"):
        if machine.accelerator == "hip":
            raise ConfigError(f"{name}={text}: devices of ROCm are not counted without torch; {give_it}")
        if not machine.devices:
            why = "the installed torch has no CUDA" if machine.accelerator == "cpu" else "no CUDA device is visible"
            raise ConfigError(f"{name}={text}: {why}; {give_it}, or `cpu`")
        is_split = groups > 1 and not values.flag("share_devices")
        count = len(machine.devices) // (groups if is_split else 1)
    elif text == "xpu":
        raise ConfigError(f"{name}=xpu: such devices are not counted without torch; {give_it}")
    else:
        raise ConfigError(f"{name}={values.text('nproc_per_node')!r} must be a number, auto, gpu or cpu")
    check_count(name, count, 1, WORKERS_MAX)
    return count
