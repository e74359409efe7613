"""The structure of the code: who may import whom, no circles, and rooms of a size one can take in."""

import ast
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent
FILES = sorted(path for package in ("agent", "exporter", "streams") for path in (TOP / package).rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def module(path: Path) -> str:
    return ".".join(path.relative_to(TOP).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in FILES}


def imported(path: Path, run_time: bool = True) -> set[str]:
    """Full names that a module imports, also inside functions; with `run_time` not those for type checkers alone."""
    names: set[str] = set()

    def look(node: ast.AST) -> None:
        if run_time and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}: imports are written in full"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            look(child)

    look(TREES[path])
    return names


def edges() -> dict[str, set[str]]:
    """Every module and the modules of ours it needs; a package's own modules do not count as needing the package."""
    return {
        name: {
            other for other in imported(path, run_time=False) if other in MODULES and not name.startswith(f"{other}.")
        }
        - {name}
        for name, path in MODULES.items()
    }


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The modules that need each other: what remains when those that need nothing are taken away, again and again."""
    left = {name: set(needs) for name, needs in graph.items()}
    while free := [name for name, needs in left.items() if not needs]:
        for name in free:
            del left[name]
        for needs in left.values():
            needs.difference_update(free)
    needed = {other for needs in left.values() for other in needs}
    return [sorted(name for name in left if name in needed)] if left else []


def importers(library: str) -> set[str]:
    return {name for name, path in MODULES.items() if any(f"{n}.".startswith(f"{library}.") for n in imported(path))}


def test_no_modules_import_each_other_in_a_circle():
    assert circles({"a": {"b"}, "b": {"a"}, "c": {"a"}}) == [["a", "b"]]  # the search finds one
    assert circles(edges()) == []


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("streams", ("agent", "exporter", "torch", "numpy", "prometheus_client", "onnxruntime")),
        ("exporter", ("agent", "streams", "kafka")),
        ("agent.run", ("agent.trainer", "agent.model", "agent.methods", "torch")),
        ("agent.worker", ("agent.trainer", "agent.model", "agent.methods", "torch")),
        ("agent.commits", ("agent.trainer", "agent.model", "agent.methods", "torch")),
        ("agent.methods", ("agent.commits", "agent.worker", "agent.trainer", "agent.scoring", "exporter", "streams")),
        ("agent.model", ("agent.methods", "agent.scoring", "agent.trainer", "agent.commits", "streams.kafka")),
        ("agent.config", ("agent.model", "agent.methods", "agent.trainer", "streams", "torch")),
        ("agent.pipeline", ("agent.config", "agent.trainer", "exporter", "torch", "kafka", "prometheus_client")),
        ("agent.sharing", ("agent.run", "agent.pipeline", "agent.trainer", "agent.commits", "streams.kafka", "kafka")),
        ("agent.fleet", ("agent.trainer", "agent.model", "agent.methods", "torch", "kafka")),
        ("agent.fleet_states", ("agent.trainer", "agent.model", "agent.methods", "torch", "kafka")),
        ("agent.fleet_trainer", ("agent.run", "agent.pipeline", "streams.kafka", "kafka", "prometheus_client")),
        ("agent.trainer", ("agent.run", "agent.pipeline", "streams.kafka", "kafka", "prometheus_client")),
    ],
)
def test_arrows_point_one_way(package, forbidden):
    for name, path in MODULES.items():
        if f"{name}.".startswith(f"{package}."):
            wrong = {one for one in imported(path) if any(f"{one}.".startswith(f"{other}.") for other in forbidden)}
            assert not wrong, f"{name} must not import {sorted(wrong)}"


@pytest.mark.parametrize(
    ("library", "rooms"),
    [
        ("kafka", "streams.kafka."),
        ("open_clip", "agent.model.clip"),
        ("prometheus_client", "exporter."),
        ("onnx", "exporter."),
        ("onnxruntime", "exporter."),
        ("uvicorn", "exporter."),
        ("pydantic", "agent."),
    ],
)
def test_a_heavy_library_is_imported_in_one_room(library, rooms):
    found = importers(library)
    assert found, "nobody imports it: the check looks for the wrong name"
    also = {"onnxruntime": {"agent.commands.doctor"}, "prometheus_client": {"agent.run", "agent.commands.demo"}}
    assert {name for name in found if not name.startswith(rooms)} <= also.get(library, set())


def test_no_module_has_more_than_500_lines():
    for path in FILES:
        short = path.relative_to(TOP).as_posix()
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 500, f"{short} has {lines} lines"


def test_no_function_has_more_than_80_lines():
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{path.relative_to(TOP).as_posix()} {node.name}"
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= 80, f"{name} has {lines} lines"


def test_every_module_and_package_says_in_its_first_line_what_it_is():
    for path, tree in TREES.items():
        words = ast.get_docstring(tree)
        assert words, f"{path} has no docstring"
        assert words.splitlines()[0][-1] in ".:", f"{path} begins with {words.splitlines()[0]!r}"


def test_every_constant_has_its_reason():
    """A module's constant that is a number carries a docstring, or shares the one of the constants it stands with."""
    bare = []
    for path, tree in TREES.items():
        for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
            if isinstance(node, ast.Assign) and _is_number(node.value):
                told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                if not told:
                    bare.append(f"{path.relative_to(TOP).as_posix()}:{node.lineno}")
    assert bare == []


def _is_number(value: ast.expr) -> bool:
    """Whether an expression is made of numbers alone, like `16 * 2**20`."""
    return all(
        isinstance(node, ast.BinOp | ast.operator | ast.UnaryOp | ast.unaryop)
        or (isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool))
        for node in ast.walk(value)
    )
