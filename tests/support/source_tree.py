"""Python sources as syntax trees, and what they import and use. Nothing is executed."""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PACKAGE = "everstep"


@dataclass(frozen=True, kw_only=True)
class Use:
    """A dotted name and where it stands."""

    name: str
    line: int


@dataclass(frozen=True)
class Source:
    """One file. `path` is relative to the repository's root and uses `/`."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All of the tree's, breadth first."""
        return list(ast.walk(self.tree))

    @cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @property
    def unit(self) -> str:
        """Its folder in the package, or its own name if it stands at the top: `core`, `cli`, `__init__`."""
        parts = self.path.removeprefix(f"src/{PACKAGE}/").split("/")
        return parts[0].removesuffix(".py")

    @property
    def is_package_source(self) -> bool:
        return self.path.startswith(f"src/{PACKAGE}/")

    @property
    def module(self) -> str:
        """Dotted name that an importer would use."""
        dotted = self.path.removeprefix("src/").removesuffix(".py").replace("/", ".")
        return dotted.removesuffix(".__init__")

    @cached_property
    def imports(self) -> tuple[Use, ...]:
        """Every import wherever it stands, `from a import b` as `a.b`, relative ones resolved."""
        return tuple(self._imports())

    @cached_property
    def uses(self) -> tuple[Use, ...]:
        """`imports`, and attribute paths that start at an imported name: `dist.abort` as `torch.distributed.abort`."""
        found = list(self.imports)
        for node in self.nodes:
            if isinstance(node, ast.Attribute | ast.Call | ast.Name):
                name = self._dotted(node)
                if name and "." in name:
                    found.append(Use(name=name, line=node.lineno))
        return tuple(found)

    def calls(self, name: str) -> Iterator[ast.Call]:
        """Calls of this imported function (`asyncio.sleep`) or bare builtin (`open`)."""
        for node in self.nodes:
            if isinstance(node, ast.Call):
                is_builtin = isinstance(node.func, ast.Name) and node.func.id == name and name not in self._bindings
                if is_builtin or self._dotted(node.func) == name:
                    yield node

    def _imports(self) -> Iterator[Use]:
        for node in self.nodes:
            if isinstance(node, ast.Import):
                yield from (Use(name=alias.name, line=node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                origin = self._origin(node)
                yield from (Use(name=f"{origin}.{alias.name}", line=node.lineno) for alias in node.names)
            elif isinstance(node, ast.Call) and _is_dynamic_import(node.func):
                name = _literal(node.args, 0)
                if name:
                    yield Use(name=name, line=node.lineno)

    @cached_property
    def _bindings(self) -> dict[str, str]:
        """What each imported name stands for."""
        found: dict[str, str] = {}
        for node in self.nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    root = alias.name.partition(".")[0]
                    found[alias.asname or root] = alias.name if alias.asname else root
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    found[alias.asname or alias.name] = f"{self._origin(node)}.{alias.name}"
        return found

    def _origin(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = self.module.split(".")
        drop = node.level - (1 if self.path.endswith("/__init__.py") else 0)
        package = package[: len(package) - drop]
        return ".".join([*package, *([node.module] if node.module else [])])

    def _dotted(self, node: ast.expr) -> str | None:
        if isinstance(node, ast.Name):
            return self._bindings.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self._dotted(node.value)
            return f"{owner}.{node.attr}" if owner else None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            name = _literal(node.args, 1)
            owner = self._dotted(node.args[0]) if name else None
            return f"{owner}.{name}" if owner else None
        return None


def read_sources(root: Path, folders: Iterable[str]) -> list[Source]:
    """All python files below these folders of the repository, in a fixed order."""
    paths = [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]
    return [Source(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


def _is_dynamic_import(func: ast.expr) -> bool:
    if isinstance(func, ast.Attribute):
        return func.attr == "import_module"
    return isinstance(func, ast.Name) and func.id in ("import_module", "__import__")


def _literal(args: list[ast.expr], index: int) -> str | None:
    """The argument at `index` if it is a string written out in the source."""
    if len(args) > index:
        arg = args[index]
        if isinstance(arg, ast.Constant) and isinstance(arg.value, str):
            return arg.value
    return None
