"""A wall clock that jumps by an hour changes nothing: everything that decides uses the monotonic clock."""

import os
import subprocess
import time
from pathlib import Path

import msgspec
import pytest

from tests.support.processes import Spawned, Spawner

ROOT = Path(__file__).parent.parent.parent
HOUR_S = 3600
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static long shift(void) { const char *flag = getenv("CLOCK_FLAG"); return flag && !access(flag, F_OK) ? 3600 : 0; }
int clock_gettime(clockid_t id, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(id, now);
    if (!result && id == CLOCK_REALTIME) now->tv_sec += shift();
    return result;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec precise;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
"""
LIGHTHOUSE = ["-m", "everstep.cli", "lighthouse", "--port", "0"]


def until_step(worker: Spawned, step: int) -> None:
    worker.expect_line(lambda line: line.startswith("step ") and int(line.split()[1]) >= step, 60.0)


@pytest.mark.soak
def test_a_clock_that_jumps_by_an_hour_accuses_nobody(spawn: Spawner, tmp_path: Path) -> None:
    source, library, flag = tmp_path / "clock.c", tmp_path / "clock.so", tmp_path / "an hour later"
    source.write_text(SHIM)
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True, timeout=60)
    env = {"LD_PRELOAD": str(library), "CLOCK_FLAG": str(flag), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    lighthouse = spawn(LIGHTHOUSE, env=env)
    address = lighthouse.expect_line("listening on").rpartition(" ")[2]
    job = env | {"EVERSTEP_LIGHTHOUSE": address, "NUM_REPLICA_GROUPS": "2"}
    script = [str(ROOT / "examples" / "train_ddp.py"), "--steps", "1000000"]
    workers = [spawn(script, env=job | {"REPLICA_GROUP_ID": str(group)}) for group in range(2)]
    for worker in workers:
        until_step(worker, 40)
    before = time.time()
    flag.touch()
    seen = [worker.expect_line("step ", 60.0) for worker in workers]
    beyond = max(int(line.split()[1]) for line in seen) + 200
    for worker in workers:
        until_step(worker, beyond)
    watching = spawn(["-m", "everstep.cli", "drain", "1", "--lighthouse", address], env=os.environ | env)
    assert watching.wait() == 0
    assert workers[1].wait() == 0
    shown = spawn(["-m", "everstep.cli", "events", "--json", "--lighthouse", address], env=os.environ | env)
    assert shown.wait() == 0
    events = shown.stdout_path.read_text()
    assert '"kind":"member-left"' in events
    latest = max(msgspec.json.decode(line)["at"] for line in events.splitlines())
    assert before + HOUR_S <= latest < before + 2 * HOUR_S, "the shim did not shift the lighthouse's clock"
    assert "member-failed" not in events
    assert "round-opened" not in events
    for process in (workers[0], lighthouse):
        process.kill()
        process.wait()
