"""The rules of DESIGN section 3 as functions from one source file to the lines that break it.

Each finding reads `file:line: what is wrong; what to do`. To change what may import what, change the tables here
together with the design; a rule is never worked around.
"""

import ast
import sys
from collections.abc import Iterator

from tests.support.source_tree import PACKAGE, Source

FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 70

SHELLS_ALL = frozenset({"errors", "exit_codes", "fork_guard", "torch_version", "worker_environment"})
# Which folders (and modules at the top) of the package may import which. None: anything.
MAY_IMPORT: dict[str, frozenset[str] | None] = {
    "core": frozenset({"core"}),
    "sim": frozenset({"sim", "core"}),
    "errors": frozenset({"core"}),
    "exit_codes": frozenset(),
    "fork_guard": frozenset(),
    "worker_environment": frozenset(),
    "torch_version": frozenset({"errors"}),
    "config": frozenset({"core", "errors"}),
    "logs": frozenset({"core", "errors"}),
    "rendezvous_conf": frozenset({"core", "errors", "config"}),
    "status": frozenset({"core"}),
    "subscribe": SHELLS_ALL | {"link", "core", "config"},
    "link": SHELLS_ALL | {"link", "core"},
    "lighthouse": SHELLS_ALL | {"lighthouse", "link", "core", "config"},
    "launcher": SHELLS_ALL | {"launcher", "lighthouse", "monitor", "link", "core", "config", "rendezvous_conf"},
    "monitor": SHELLS_ALL | {"monitor", "core"},
    "collectives": SHELLS_ALL | {"collectives", "core"},
    "recovery": SHELLS_ALL | {"recovery", "core"},
    "train": SHELLS_ALL | {"train", "collectives", "recovery", "monitor", "link", "core", "config", "logs"},
    "demo": None,
    "integrations": SHELLS_ALL | {"integrations", "train", "monitor", "link", "core", "config", "rendezvous_conf"},
    "cli": None,
    "__init__": None,
    "__main__": None,
}
# Not part of the layering: reading the version needs no arrow.
ALWAYS_IMPORTABLE = f"{PACKAGE}.__version__"

TORCH_UNITS = frozenset({"collectives", "recovery", "train", "integrations", "demo"})
TORCH_FILES = frozenset({f"src/{PACKAGE}/launcher/{name}.py" for name in ("template", "store_server")})
TORCH_PRIVATE_FILE = f"src/{PACKAGE}/collectives/torch_private.py"
ENVIRONMENT_FILES = frozenset(f"src/{PACKAGE}/{name}.py" for name in ("config", "worker_environment", "cli"))
ENVIRONMENT_NAMES = ("os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv", "os.unsetenv")

CORE_STDLIB = frozenset(
    [
        "__future__",
        "abc",
        "bisect",
        "collections",
        "dataclasses",
        "enum",
        "functools",
        "hashlib",
        "heapq",
        "itertools",
        "math",
        "operator",
        "re",
        "string",
        "struct",
        "types",
        "typing",
    ]
)
CORE_BUILTINS_BANNED = ("open", "print", "input", "eval", "exec", "compile", "breakpoint", "__import__")
# The simulator's own clock, fabric and seed replace these; its command line may show wall time and use all CPUs.
SIM_BANNED = frozenset(
    [
        "asyncio",
        "datetime",
        "logging",
        "multiprocessing",
        "os",
        "secrets",
        "select",
        "selectors",
        "signal",
        "socket",
        "ssl",
        "subprocess",
        "tempfile",
        "threading",
        "time",
        "uuid",
    ]
)
SIM_COMMAND_LINE = f"src/{PACKAGE}/sim/__main__.py"

DEPENDENCIES = frozenset({"torch", "aiohttp", "msgspec", "xxhash", "typer", "rich", "yaml", "tomli", "uvloop"})
# What a user who needs it has anyway; imported only where it is met.
DEPENDENCIES_OF = {
    "integrations": frozenset({"lightning", "pytorch_lightning"}),
    "recovery": frozenset({"numpy"}),  # only when the state holds numpy values
}

PICKLING_MODULES = frozenset({"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"})
PICKLING_CALLS = frozenset(
    {"torch.save", "torch.load"}
    | {
        f"torch.distributed.{name}"
        for name in [
            "all_gather_object",
            "gather_object",
            "scatter_object_list",
            "broadcast_object_list",
            "send_object_list",
            "recv_object_list",
        ]
    }
)
# Files that may read or write pickles, each with why. Empty, and better so.
PICKLING_ALLOWED: dict[str, str] = {}

WALL_CLOCKS = frozenset({"time.time", "time.time_ns", "datetime.datetime.now", "datetime.datetime.utcnow"})
# They stamp events and failures, for people.
WALL_CLOCK_FILES = frozenset({f"src/{PACKAGE}/lighthouse/event_stream.py", f"src/{PACKAGE}/launcher/workers.py"})

VAGUE_NAMES = frozenset(["util", "utils", "common", "base", "helper", "helpers", "misc"])
MOCK_MODULES = ("unittest.mock", "mock", "pytest_mock")


def import_direction(source: Source) -> Iterator[str]:
    allowed = MAY_IMPORT.get(source.unit, frozenset())
    if source.unit not in MAY_IMPORT:
        yield _at(source, 1, f"`{source.unit}` has no place in the layout; add it to MAY_IMPORT and to the design")
    if allowed is None:
        return
    for use in source.imports:
        parts = use.name.split(".")
        if parts[0] != PACKAGE or use.name == ALWAYS_IMPORTABLE:
            continue
        unit = parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "__init__"
        if unit not in allowed:
            yield _at(
                source,
                use.line,
                f"{source.unit} imports {use.name}, but may import only "
                f"{', '.join(sorted(allowed)) or 'nothing of ours'}; "
                "move the shared type to core, or hand the object in from above",
            )


def core_is_pure(source: Source) -> Iterator[str]:
    if source.unit != "core":
        return
    for use in source.imports:
        root = use.name.partition(".")[0]
        if root not in CORE_STDLIB | {PACKAGE, "msgspec"}:
            yield _at(
                source, use.line, f"core imports {use.name}; take it as an argument (`now`, ids) or do it in a shell"
            )
    for builtin in CORE_BUILTINS_BANNED:
        for call in source.calls(builtin):
            yield _at(source, call.lineno, f"core calls {builtin}(); return what should happen, a shell does it")


def sim_depends_on_its_seed_alone(source: Source) -> Iterator[str]:
    if source.unit != "sim" or source.path == SIM_COMMAND_LINE:
        return
    for use in source.imports:
        if use.name.partition(".")[0] in SIM_BANNED:
            yield _at(source, use.line, f"sim imports {use.name}; use the world's clock, network and seed")
    for use in source.uses:
        if use.name.startswith("random.") and use.name != "random.Random" and not use.name.startswith("random.Random."):
            yield _at(source, use.line, f"sim uses {use.name}; draw from the world's seeded random.Random")


def torch_stays_in_its_folders(source: Source) -> Iterator[str]:
    if not source.is_package_source or source.unit in TORCH_UNITS or source.path in TORCH_FILES:
        return
    for use in source.imports:
        if use.name.partition(".")[0] == "torch":
            yield _at(
                source,
                use.line,
                f"{use.name} outside {', '.join(sorted(TORCH_UNITS))}; it makes every start slow, move it",
            )


def private_torch_is_in_one_file(source: Source) -> Iterator[str]:
    if not source.is_package_source or source.path == TORCH_PRIVATE_FILE:
        return
    for use in source.uses:
        parts = use.name.split(".")
        if parts[0] == "torch" and any(_is_private(part) for part in parts[1:]):
            yield _at(source, use.line, f"private {use.name}; wrap it in {TORCH_PRIVATE_FILE}, with why")


def environment_is_read_in_one_place(source: Source) -> Iterator[str]:
    if not source.is_package_source or source.path in ENVIRONMENT_FILES:
        return
    for use in source.uses:
        if use.name in ENVIRONMENT_NAMES:
            yield _at(source, use.line, f"{use.name} outside config.py and cli.py; take the value as an argument")


def nothing_is_pickled(source: Source) -> Iterator[str]:
    if not source.is_package_source or source.path in PICKLING_ALLOWED:
        return
    for use in source.uses:
        if use.name.partition(".")[0] in PICKLING_MODULES or use.name in PICKLING_CALLS:
            yield _at(
                source, use.line, f"{use.name} runs code from bytes; use msgspec, or a manifest and raw tensor bytes"
            )


def dependencies_are_declared(source: Source) -> Iterator[str]:
    if not source.is_package_source:
        return
    declared = DEPENDENCIES | DEPENDENCIES_OF.get(source.unit, frozenset()) | {PACKAGE}
    for use in source.imports:
        root = use.name.partition(".")[0]
        if root not in sys.stdlib_module_names | declared:
            yield _at(source, use.line, f"{root} is no runtime dependency; do without, or declare it in pyproject.toml")


def files_are_short(source: Source) -> Iterator[str]:
    if len(source.lines) > FILE_LINES_MAX:
        yield _at(source, FILE_LINES_MAX + 1, f"{len(source.lines)} lines, at most {FILE_LINES_MAX}; split it by topic")


def functions_are_short(source: Source) -> Iterator[str]:
    for node in source.nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES_MAX:
                yield _at(
                    source, node.lineno, f"{node.name} has {lines} lines, at most {FUNCTION_LINES_MAX}; extract steps"
                )


def names_say_what_is_inside(source: Source) -> Iterator[str]:
    for part in source.path.removesuffix(".py").split("/"):
        if part.strip("_") in VAGUE_NAMES:
            yield _at(source, 1, f"`{part}` names no topic; call it after what it holds")


def modules_have_docstrings(source: Source) -> Iterator[str]:
    if source.is_package_source and not ast.get_docstring(source.tree):
        yield _at(source, 1, "no module docstring; say in one line what it is")


def broad_excepts_say_why(source: Source) -> Iterator[str]:
    if not source.is_package_source:
        return
    for node in source.nodes:
        if isinstance(node, ast.ExceptHandler) and _is_broad(node.type) and not _reraises(node):
            around = source.lines[max(0, node.lineno - 2) : node.body[0].lineno]
            if not any("#" in line for line in around):
                yield _at(
                    source, node.lineno, "broad except without a comment; name the errors, or say which boundary it is"
                )


def wall_clocks_are_for_people(source: Source) -> Iterator[str]:
    """Hosts disagree about it and it jumps: whatever decides takes the monotonic clock."""
    if not source.is_package_source or source.path in WALL_CLOCK_FILES:
        return
    for use in source.uses:
        if use.name in WALL_CLOCKS:
            yield _at(source, use.line, f"{use.name}; use time.monotonic(), or add the file to WALL_CLOCK_FILES")


def tests_do_not_sleep(source: Source) -> Iterator[str]:
    for use in source.uses:
        if use.name == "time.sleep":
            yield _at(source, use.line, "time.sleep; wait for an event, or tests.support.waiting.wait_until")
    for call in source.calls("asyncio.sleep"):
        if not (call.args and isinstance(call.args[0], ast.Constant) and call.args[0].value == 0):
            yield _at(
                source, call.lineno, "asyncio.sleep; wait for an event, or tests.support.waiting.wait_until_async"
            )


def tests_do_not_mock(source: Source) -> Iterator[str]:
    for use in source.imports:
        if any(use.name == name or use.name.startswith(f"{name}.") for name in MOCK_MODULES):
            yield _at(source, use.line, f"{use.name}; use the real part, or hand a simple one in")
    for node in source.nodes:
        if isinstance(node, ast.Attribute) and node.attr in ("setattr", "delattr"):
            yield _at(source, node.lineno, f".{node.attr} patches our code; hand the value in as an argument")
        if isinstance(node, ast.arg) and node.arg == "mocker":
            yield _at(source, node.lineno, "mocker; use the real part, or hand a simple one in")


def _at(source: Source, line: int, what: str) -> str:
    return f"{source.path}:{line}: {what}"


def _is_private(part: str) -> bool:
    return part.startswith("_") and not (part.startswith("__") and part.endswith("__"))


def _is_broad(kind: ast.expr | None) -> bool:
    if isinstance(kind, ast.Tuple):
        return any(_is_broad(element) for element in kind.elts)
    return kind is None or (isinstance(kind, ast.Name) and kind.id in ("Exception", "BaseException"))


def _reraises(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None
