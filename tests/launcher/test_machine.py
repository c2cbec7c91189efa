"""What is read of this machine without torch, beside what torch says."""

import os
import socket
from pathlib import Path

import pytest
import torch

from everstep.launcher.machine import cuda_devices, is_this_host, this_machine, torch_accelerator


def machine_with(folder: Path, in_proc: int, in_dev: int) -> Path:
    (folder / "dev").mkdir(parents=True)
    (folder / "dev/nvidiactl").touch()
    for index in range(in_dev):
        (folder / f"dev/nvidia{index}").touch()
    for index in range(in_proc):
        (folder / f"proc/driver/nvidia/gpus/0000:{index:02x}:00.0").mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("in_proc", "in_dev", "visible", "expected"),
    [
        (0, 0, None, ""),
        (4, 4, None, "0,1,2,3"),
        (8, 2, None, "0,1"),
        (2, 0, None, "0,1"),
        (4, 4, "", ""),
        (4, 4, "2,0", "2,0"),
        (4, 4, " 1 , 3", "1,3"),
        (4, 4, "1,9,2", "1"),
        (4, 4, "0,-1,1", "0"),
        (4, 4, "1,1", ""),
        (4, 4, "GPU-3b,MIG-4c", "GPU-3b,MIG-4c"),
        (0, 0, "0,1", ""),
    ],
)
def test_devices_are_those_that_the_driver_would_show(
    tmp_path: Path, in_proc: int, in_dev: int, visible: str | None, expected: str
) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    found = cuda_devices(environ, machine_with(tmp_path, in_proc, in_dev))
    assert ",".join(found) == expected


def test_this_machine_is_as_torch_sees_it() -> None:
    found = this_machine(os.environ)
    assert len(found.devices) == torch.cuda.device_count()
    assert found.accelerator == ("hip" if torch.version.hip else "cuda" if torch.version.cuda else "cpu")
    assert found.accelerator == torch_accelerator()
    assert found.cpus == len(os.sched_getaffinity(0))


def test_a_hosts_own_names_and_addresses_are_known_and_others_are_not() -> None:
    for host in ("localhost", "127.0.0.1", "::1", "127.9.9.9", socket.gethostname()):
        assert is_this_host(host), host
    for host in ("192.0.2.1", "2001:db8::1", "0.0.0.0", "host.invalid", "a" * 300):
        assert not is_this_host(host), host
