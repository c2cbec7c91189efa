"""Which torch Everstep works with; the layers that use torch check it once, when they are imported."""

import logging
import re
from types import ModuleType

from everstep.errors import ConfigError

# The test suite has run on both ends of this range, and on what constraints.txt pins. Also in pyproject.toml.
OLDEST = (2, 6)
NEWEST_TESTED = (2, 15)

_log = logging.getLogger("everstep")
_warned: set[str] = set()


def check_torch(torch: ModuleType) -> None:
    """Raise ConfigError for a torch that is too old, or none; warn, once, of one newer than any that was tested.

    A newer one is no error: Everstep uses some private names of torch (collectives/torch_private.py), which a release
    may change, but most do not.
    """
    version, where = getattr(torch, "__version__", None), getattr(torch, "__file__", None)
    parts = re.match(r"(\d+)\.(\d+)", str(version))
    if parts is None:
        # A folder named torch in the working directory imports, too, and is empty.
        raise ConfigError(
            f"what `import torch` found is not PyTorch: version {version}, at {where or list(torch.__path__)}; "
            "rename it, or run from another folder"
        )
    release = (int(parts[1]), int(parts[2]))
    if release < OLDEST:
        raise ConfigError(
            f"torch {version} (at {where}) is too old: Everstep needs torch {_dotted(OLDEST)} or newer and is tested "
            f"up to {_dotted(NEWEST_TESTED)}; pip install --upgrade 'torch>={_dotted(OLDEST)}'"
        )
    if release > NEWEST_TESTED and str(version) not in _warned:
        _warned.add(str(version))
        _log.warning(
            "torch %s is newer than %s, the newest that this Everstep was tested with; if its collectives misbehave, "
            "use that one or a newer Everstep",
            version,
            _dotted(NEWEST_TESTED),
        )


def _dotted(release: tuple[int, int]) -> str:
    return f"{release[0]}.{release[1]}"
