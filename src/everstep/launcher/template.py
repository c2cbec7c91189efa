"""The template: a process that has imported torch, and what else to preload, and forks workers on the agent's word.

`python -c "from everstep.launcher.template import main; main()" CONTROL AGENT_PID SEARCH_PATH PADDING`. A worker is
forked twice: its parent ends at once, and the agent, a subreaper, adopts it, and reads its real exit status. It then
returns out of the template's loop, becomes the script, and ends by the interpreter's normal finish.

The template must never run a parallel operation: OpenMP's threads do not survive a fork, but what waits for them does.
"""

import dataclasses
import gc
import importlib
import os
import select
import socket
import sys
import warnings

from everstep import config
from everstep.launcher import script
from everstep.launcher.parenthood import die_with_parent
from everstep.launcher.template_messages import (
    MESSAGE_BYTES_MAX,
    WORK_FDS,
    Fork,
    Loaded,
    Preload,
    Work,
    decode_to_template,
    encode,
    work_from_file,
)

__all__ = ["main"]

REAP_POLL_MS = 20
CANARY_ELEMENTS = 1 << 18  # enough for torch to use more than one thread
CANARY_MATRIX = 192


@dataclasses.dataclass(frozen=True)
class _Place:
    """What a forked worker brings out of the template's loop."""

    channel: socket.socket
    work: Work


def main() -> None:
    control_fd, agent_pid, search_path, _ = sys.argv[1:]
    script.close_all_but({int(control_fd)})
    os.set_inheritable(int(control_fd), False)
    control = socket.socket(fileno=int(control_fd))
    os.setsid()
    die_with_parent(int(agent_pid))
    script.set_title(["everstep-template"])
    script.set_first_path(search_path)
    place = _serve(control, int(agent_pid))
    if place.work.is_canary:
        script.tell_going(place.channel)
        place.channel.close()
        _run_in_parallel()
        return
    work = place.work
    # Its own folder takes this one's place.
    if search_path in sys.path:
        sys.path.remove(search_path)
    script.run(place.channel, work.run_as, os.fsdecode(work.target), [os.fsdecode(arg) for arg in work.args])


def _serve(control: socket.socket, agent_pid: int) -> _Place:
    """Do what the agent says until it is gone. Returns in the forked workers only."""
    control.send(encode(Loaded()))
    intermediate: set[int] = set()
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while True:
        while intermediate and not poll.poll(REAP_POLL_MS):
            _reap(intermediate)
        packet, fds = _receive(control, MESSAGE_BYTES_MAX, 2)
        if not packet:
            os._exit(0)  # not by the interpreter's finish: what the modules would do there is the workers' affair
        match decode_to_template(packet):
            case Preload(module=module):
                control.send(encode(_import(module)))
            case Fork():
                _reap(intermediate)
                channel = socket.socket(fileno=fds[0])
                is_worker = _fork_twice(channel, intermediate)
                if is_worker:
                    control.close()
                    # By its parent's number, which it must see change: who adopts it is not decided before.
                    return _Place(channel, _take_place(channel, agent_pid, is_worker, fds[1:]))
                channel.close()
                for fd in fds[1:]:
                    os.close(fd)


def _receive(source: socket.socket, size: int, fds_max: int) -> tuple[bytes, list[int]]:
    packet, fds, _, _ = socket.recv_fds(source, size, fds_max)
    for fd in fds:
        os.set_inheritable(fd, False)  # `recv_fds` has a parameter for flags, and does not use it
    return packet, fds


def _import(module: str) -> Loaded:
    try:
        importlib.import_module(module)
    except BaseException as error:  # process boundary: the agent says so, and starts its workers without a template
        return Loaded(f"{type(error).__name__}: {error}")
    if _uses_cuda():
        return Loaded("it used CUDA, which no process forked from there can")
    gc.collect()
    gc.freeze()  # or each worker's first collection would copy every page that has an object on it
    return Loaded()


def _fork_twice(channel: socket.socket, intermediate: set[int]) -> int:
    """In the worker: the number of the process between, its parent for now. In the template: 0."""
    with warnings.catch_warnings():
        # Python warns of forks beside threads, such as those of numpy's OpenBLAS. Whether all is well a canary tells.
        warnings.simplefilter("ignore")
        try:
            pid = os.fork()
            if pid == 0:
                between = os.getpid()
                if os.fork() == 0:
                    return between
                os._exit(0)
        except OSError as error:
            script.tell_problem(channel, f"no process could be forked: {error}")
            if os.getpid() != _template_pid:
                os._exit(script.NOT_RUN)
            return 0
    intermediate.add(pid)
    return 0


def _reap(intermediate: set[int]) -> None:
    for pid in sorted(intermediate):
        if os.waitpid(pid, os.WNOHANG)[0]:
            intermediate.discard(pid)


def _take_place(channel: socket.socket, agent_pid: int, between: int, mutex: list[int]) -> Work:
    try:
        script.take_place(channel, agent_pid, between, mutex[0] if mutex else -1)
        word, fds = _receive(channel, len(script.GO), WORK_FDS)
        if not word:
            os._exit(script.NOT_RUN)
        work = work_from_file(fds[0])
        for number, fd in enumerate(fds[1:]):
            os.dup2(fd, number)
        for fd in fds:
            os.close(fd)
        if not work.is_canary:
            config.replace_environment(work.environment)
            os.chdir(work.cwd)
            _undo_what_is_shared(os.fsdecode(work.cwd))
    except (OSError, ValueError) as error:
        script.tell_problem(channel, str(error))
        os._exit(script.NOT_RUN)
    return work


def _undo_what_is_shared(cwd: str) -> None:
    """What an interpreter draws or notes at its start, and all forks of one would have in common.

    `random` and `tempfile` see to themselves.
    """
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.default_generator.seed()  # of the CPU; those of GPUs begin with a constant, and later
    process = sys.modules.get("multiprocessing.process")
    if process is not None:
        process.current_process().authkey = os.urandom(32)
        process.ORIGINAL_DIR = cwd  # type: ignore[attr-defined]  # where a spawned child begins


def _run_in_parallel() -> None:
    """The canary: hangs where a worker would. At least two threads, whatever the environment says."""
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(max(2, torch.get_num_threads()))
        assert torch.ones(CANARY_ELEMENTS).sum().item() == CANARY_ELEMENTS
        matrix = torch.ones(CANARY_MATRIX, CANARY_MATRIX, requires_grad=True)
        torch.autograd.backward([(matrix @ matrix).sum()])
    numpy = sys.modules.get("numpy")
    if numpy is not None:  # its OpenBLAS has threads of its own
        product = numpy.ones((CANARY_MATRIX, CANARY_MATRIX)) @ numpy.ones((CANARY_MATRIX, CANARY_MATRIX))
        assert product[0, 0] == CANARY_MATRIX


def _uses_cuda() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())


_template_pid = os.getpid()
