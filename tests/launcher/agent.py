"""A stand-in for an agent: `python -m tests.launcher.agent template|plain SCRIPT COUNT` starts workers and waits.

SIGUSR1 has it reap orphans, which it otherwise does when a worker has ended.
"""

import os
import signal
import sys
from pathlib import Path

from everstep.launcher.death_watch import Surroundings
from everstep.launcher.plain import PlainStarter
from everstep.launcher.starting import Starter, WorkerDeath
from everstep.launcher.template_client import TemplateSettings, TemplateStarter
from tests.launcher.workers import Scripts, environment


def main() -> None:
    way, script, count = sys.argv[1:]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    around = Surroundings(adopts_orphans=True)
    starter: Starter
    if way == "template":
        settings = TemplateSettings(environment=environment(), search_path=os.getcwd(), preload=(), spares=1)
        starter = template = TemplateStarter(settings, around)
        template.open()
        template.wait_ready()
        print("template", template.template_pid)
    else:
        starter = PlainStarter(around)
    scripts = Scripts(Path(script).parent)
    for _ in range(int(count)):
        process = starter.start(scripts.script(Path(script).read_text()))
        process.watch(lambda death: print("death", _seen(death)), lambda status: print("exit", status.describe()))
        print("worker", process.pid)
    print("all started", flush=True)
    while True:
        signal.sigwait({signal.SIGUSR1})
        around.reap_orphans()


def _seen(death: WorkerDeath) -> str:
    return death.seen_by


if __name__ == "__main__":
    main()
