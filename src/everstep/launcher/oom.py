"""How many processes of this process's memory cgroup the kernel has killed for want of memory (v2 and v1)."""

import os
import threading

_FILES = {"cgroup2": "memory.events", "cgroup": "memory.oom_control"}


class OomKills:
    """Tells which SIGKILLs were the kernel's. Each kill that it counted explains one death. Any thread."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._explained = self._count()

    @classmethod
    def of_this_process(cls) -> "OomKills":
        """Says no for ever where the system does not tell."""
        try:
            with open("/proc/self/cgroup", encoding="utf-8") as file:
                groups = file.read()
            with open("/proc/self/mountinfo", encoding="utf-8") as file:
                mounts = file.read()
        except OSError:
            return cls(None)
        return cls(find_counter(groups, mounts))

    def explains(self, *, is_killed: bool) -> bool:
        """To be asked at each death, of any cause: kills counted before a death of another cause explain none later."""
        with self._lock:
            count = self._count()
            is_explained = is_killed and count > self._explained
            # Several workers may have been killed at once: each takes one.
            self._explained = self._explained + 1 if is_explained else count
            return is_explained

    def _count(self) -> int:
        if self._path is None:
            return 0
        try:
            with open(self._path, encoding="utf-8") as file:
                for line in file:
                    name, _, number = line.partition(" ")
                    if name == "oom_kill":
                        return int(number)
        except (OSError, ValueError):
            pass
        return 0


def find_counter(groups: str, mounts: str) -> str | None:
    """The file that counts, from the texts of /proc/self/cgroup and /proc/self/mountinfo."""
    wanted: dict[str, str] = {}
    for line in groups.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            wanted["cgroup"] = path
        elif number == "0" and not controllers:
            wanted["cgroup2"] = path
    for line in mounts.splitlines():
        fields, _, more = line.partition(" - ")
        root, mounted_at = fields.split()[3:5]
        kind, _, options = more.split(" ", 2)
        path = wanted.get(kind, "")
        if not path or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        # In a container the mount often begins at the container's own group, whatever the path says.
        inside = os.path.relpath(path, root) if path.startswith(root) else "."
        for folder in (os.path.normpath(os.path.join(mounted_at, inside)), mounted_at):
            file = os.path.join(folder, _FILES[kind])
            if os.access(file, os.R_OK):
                return file
    return None
