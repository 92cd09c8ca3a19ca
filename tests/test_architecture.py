"""The shape of the package, held by its syntax trees: layers, cycles, sizes, names, tests."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "retain"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400

# A module imports only from layers below its own; the packages of SIBLINGS also from themselves.
LAYERS = {
    "errors": 0,
    **dict.fromkeys(["types", "distributed", "parameters"], 1),
    **dict.fromkeys(["data", "kernels", "storage", "demo_tasks"], 2),
    "models": 3,
    **dict.fromkeys(["methods", "strategies"], 4),
    **dict.fromkeys(["evaluation", "checkpoint", "task_view", "train_config", "trainer_task"], 5),
    **dict.fromkeys(["trainer", "lineage", "budget", "provenance"], 6),
    "report": 7,
    "config": 8,
    "memory": 9,
    **dict.fromkeys(["experiment", "inference"], 10),
    **dict.fromkeys(["run", "export", "protection"], 11),
    "demo": 12,
    "cli": 13,
    **dict.fromkeys(["__init__", "__main__"], 14),
}
SIBLINGS = {"data", "kernels", "storage", "models", "evaluation", "report", "config", "cli"}
PROTOCOLS = {
    "methods": {"methods.method", "methods.soft_prompt", "methods.tuner"},
    "strategies": {"strategies.strategy"},
}
REPORT_READS = {"errors", "types", "report", "evaluation.changes", "evaluation.statistics", "evaluation.forgetting"}
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "misc", "base", "common", "core"}


def module_name(path: Path) -> str:
    """`data/readers.py` is `data.readers`, `data/__init__.py` is `data`, and the top one is `__init__`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


TREES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
PATHS = {module_name(path): path for path in SOURCES}


def imported(tree: ast.Module) -> set[str]:
    """Every dotted name that the module imports, wherever the import stands."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(tree: ast.Module) -> set[str]:
    """The modules of this package that it imports: `retain.data.readers.read_rows` means `data.readers`."""
    found: set[str] = set()
    for name in imported(tree):
        if name.split(".")[0] == "retain":
            parts = name.split(".")[1:]
            known = [".".join(parts[:end]) for end in range(len(parts), 0, -1) if ".".join(parts[:end]) in TREES]
            found.add(known[0] if known else parts[0] if parts and parts[0] in LAYERS else "__init__")
    return found


def part(module: str) -> str:
    return module.split(".")[0]


def children(module: str) -> list[str]:
    """The modules of a package, by their names in it."""
    return [name.removeprefix(f"{module}.") for name in TREES if name.startswith(f"{module}.")]


def layer(module: str) -> int:
    return LAYERS[part(module)]


def has_logic(tree: ast.Module) -> bool:
    """Does any function do more than state its docstring or a constant?"""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    statements = [statement for function in functions for statement in function.body]
    return any(not isinstance(getattr(statement, "value", None), ast.Constant) for statement in statements)


@pytest.fixture(params=sorted(TREES))
def module(request: pytest.FixtureRequest) -> str:
    return request.param


def test_layers(module: str):
    assert part(module) in LAYERS, "a new part: give it a layer here and in the design"
    is_package = PATHS[module].name == "__init__.py"
    for other in own_imports(TREES[module]) - {module}:
        if part(other) == part(module):
            allowed = part(module) in SIBLINGS or is_package or other in PROTOCOLS.get(part(module), ())
            assert allowed, f"imports its sibling {other}"
        else:
            assert layer(other) < layer(module), f"layer {layer(module)} imports {other} of layer {layer(other)}"


def test_a_strategy_needs_only_torch(module: str):
    if part(module) == "strategies":
        for other in own_imports(TREES[module]):
            assert layer(other) <= 2 or part(other) == "strategies", f"imports {other}"
        standard = {"torch", "retain", *sys.stdlib_module_names}
        assert {name.split(".")[0] for name in imported(TREES[module])} <= standard


def test_the_report_reads_only_scores(module: str):
    if part(module) == "report":
        for other in own_imports(TREES[module]):
            assert other in REPORT_READS or part(other) in REPORT_READS, f"imports {other}"


def test_no_import_cycles():
    graph = {module: own_imports(tree) - {module} for module, tree in TREES.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_size(module: str):
    assert len(PATHS[module].read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_name_says_the_idea(module: str):
    assert PATHS[module].stem not in VAGUE_NAMES
    assert (PATHS[module].parent / "__init__.py").exists(), "a folder of modules is a package"


def test_has_a_test_file(module: str):
    path = PATHS[module]
    if path.name != "__main__.py" and has_logic(TREES[module]):
        mirror = ROOT / "tests" / path.relative_to(PACKAGE).with_name(f"test_{path.stem.strip('_')}.py")
        assert mirror.exists(), f"write {mirror.relative_to(ROOT)}"


def test_all_is_complete_and_sorted(module: str):
    """`__all__` lists what other modules import; every name in it exists."""
    listed: list[str] | None = None
    made: set[str] = set()
    body = TREES[module].body
    lazy = [node for branch in body if isinstance(branch, ast.If) for node in branch.body]  # `if TYPE_CHECKING:`
    for node in body + lazy:
        match node:
            case ast.Assign(targets=[ast.Name("__all__")], value=value):
                listed = ast.literal_eval(value)
            case ast.AnnAssign(target=ast.Name("__all__"), value=ast.expr() as value):
                listed = ast.literal_eval(value)
            case ast.Assign(targets=targets):
                made |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
            case ast.AnnAssign(target=ast.Name(name)) | ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                made.add(name)
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                made |= {alias.asname or alias.name for alias in names}
    if PATHS[module].name == "__main__.py":
        return
    assert listed is not None, "say what is public in `__all__`"
    used = {name for tree in TREES.values() for name in imported(tree) if name.rpartition(".")[0] == f"retain.{module}"}
    missing = {name.rpartition(".")[2] for name in used} - set(listed) - {part(other) for other in children(module)}
    assert missing == set(), "imported elsewhere, so list it in `__all__`"
    assert set(listed) <= made, f"in `__all__` but not made here: {sorted(set(listed) - made)}"
    # CONSTANTS, then Classes, then functions.
    assert listed == sorted(listed, key=lambda name: (not name.isupper(), not name[0].isupper(), name.lower()))


def test_nothing_unpickles(module: str):
    unsafe = {"pickle", "dill", "cloudpickle", "joblib", "shelve"}
    assert not unsafe & {name.split(".")[0] for name in imported(TREES[module])}
    attributes = {ast.unparse(node) for node in ast.walk(TREES[module]) if isinstance(node, ast.Attribute)}
    assert "torch.load" not in attributes | imported(TREES[module])


def test_one_module_speaks_to_other_processes(module: str):
    names = {name for name in imported(TREES[module]) if name.startswith("torch.distributed")}
    if module == "parameters":
        names.discard("torch.distributed.tensor.DTensor")
    assert module == "distributed" or not names


def test_every_import_is_declared():
    """What `pip install` brings is what the source imports: nothing is there by another package's grace."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "dev" for line in lines]
    lines = [*project["dependencies"], *extras]
    declared = {re.split(r"[<>=\[; ]", line)[0].lower().replace("-", "_") for line in lines}
    names = {part(name) for tree in TREES.values() for name in imported(tree)} - sys.stdlib_module_names - {"retain"}
    owners = packages_distributions()
    undeclared = {
        name for name in names if not {owner.lower().replace("-", "_") for owner in owners.get(name, [name])} & declared
    }
    assert undeclared == set()


def test_papers_name_files_that_exist():
    named = re.findall(r"`([\w/]+\.py)`", (ROOT / "docs" / "papers.md").read_text(encoding="utf-8"))
    assert named
    assert [name for name in named if not (PACKAGE / name).exists()] == []
