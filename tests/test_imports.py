"""Who may import whom, read off the source: the arrows of the design, and what the library must never do."""

import ast
import re
from pathlib import Path

import planted_defects
import pytest

import pydeqsolve

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "pydeqsolve").rglob("*.py"))
ADAPTER = sorted((ROOT / "diffusion").rglob("*.py"))
KERNELS = [p for p in sorted((ROOT / "csrc").rglob("*.*")) if p.name != "bindings.cpp"]


def imports(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """(module, names) of every import in a file, however deep; relative ones start with a dot."""
    found: list[tuple[str, tuple[str, ...]]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(("." * node.level + (node.module or ""), tuple(alias.name for alias in node.names)))
    return found


def module_of(path: Path) -> str:
    """ "loop.step" of pydeqsolve/loop/step.py."""
    return ".".join(path.relative_to(ROOT / "pydeqsolve").with_suffix("").parts)


MODULES = {module_of(path): path for path in LIBRARY if path.stem != "__init__"}


def siblings(name: str) -> set[str]:
    """Modules of pydeqsolve that the module `name` imports, wherever in its source."""
    found, here = set(), name.split(".")[:-1]
    for module, names in imports(MODULES[name]):
        dots = len(module) - len(module.lstrip("."))
        if not dots:
            continue
        base = [*here[: len(here) - dots + 1], *filter(None, module[dots:].split("."))]
        found |= {".".join([*base, n]) for n in names} | {".".join(base)}
    return found & set(MODULES)


def reached(name: str) -> set[str]:
    """Modules that the module `name` imports, and those that they import."""
    found, new = set(), siblings(name)
    while new:
        found |= new
        new = set().union(*map(siblings, new)) - found
    return found


def wings(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names if "." in name}


@pytest.mark.parametrize("path", ADAPTER, ids=lambda p: p.name)
def test_the_adapter_imports_public_names_of_the_library_only(path):
    for module, names in imports(path):
        assert not module.startswith("pydeqsolve."), f"{path.name} imports {module}"
        if module == "pydeqsolve":
            assert set(names) <= {*pydeqsolve.__all__, "__version__"}, f"{path.name} imports {names}"


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.name)
def test_the_library_knows_nothing_of_the_adapter(path):
    assert not [module for module, _ in imports(path) if module.split(".")[0] == "diffusion"]


@pytest.mark.parametrize("path", [p for p in LIBRARY if p.name != "native.py"], ids=lambda p: p.name)
def test_only_step_native_touches_the_native_module(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not (isinstance(node, ast.Name) and node.id == "_native")
        assert not (isinstance(node, ast.Attribute) and node.attr == "_native")
    assert not [names for module, names in imports(path) if "_native" in (*module.split("."), *names)]


def test_no_module_imports_itself_by_way_of_others():
    assert [name for name in MODULES if name in reached(name)] == []


def test_the_arrows_point_from_solve_to_derivative_to_loop_to_step():
    assert not wings(reached("solution")) & {"derivative"}
    assert not any(wings(reached(name)) & {"loop", "derivative"} for name in MODULES if name.startswith("step."))
    assert not any(wings(siblings(name)) & {"derivative"} for name in MODULES if name.startswith("loop."))
    assert {"derivative", "loop"} <= wings(siblings("solve"))
    assert "loop.iterate" in siblings("derivative.adjoint")
    assert {"step"} <= wings(siblings("loop.iterate"))


def test_the_loop_and_the_step_name_no_concrete_solver():
    concrete = {"anderson", "broyden", "picard", "derivative.gmres", "solve", "deq"}
    assert not [name for name in MODULES if name.startswith(("loop.", "step.")) and reached(name) & concrete]


def test_nothing_but_the_test_laws_needs_the_test_laws():
    assert not [name for name in MODULES if {"testing", "comparison"} & siblings(name) and name != "testing"]
    foreign = {module.split(".")[0] for module, _ in imports(ROOT / "pydeqsolve" / "testing.py")}
    assert not foreign & {"pytest", "hypothesis", "numpy", "scipy"}


def test_one_line_of_the_library_calls_the_users_function():
    calls = []
    for path in LIBRARY:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "fn":
                calls.append(path.name)
    assert calls == ["problem.py"]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.name)
def test_the_library_prints_logs_and_sets_nothing_global(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not {module for module, _ in imports(path)} & {"logging", "os"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called != "print"
            assert not re.match(
                r"torch\.(set_|manual_seed|use_deterministic|backends\.)|warnings\.(simple)?filter", called
            )


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_kernels_include_neither_torch_nor_python(path):
    headers = re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text(encoding="utf-8"))
    assert not [h for h in headers if re.match(r"(torch|ATen|c10|pybind11|caffe2)/|Python\.h", h)]


def test_every_public_name_is_there_and_listed_in_order():
    assert len(set(pydeqsolve.__all__)) == len(pydeqsolve.__all__)
    assert all(hasattr(pydeqsolve, name) for name in pydeqsolve.__all__)
    assert all(getattr(pydeqsolve, name).__doc__ for name in pydeqsolve.__all__)


def test_every_planted_defect_still_has_its_place_and_its_test():
    for defect in planted_defects.DEFECTS:
        defect.planted((ROOT / defect.file).read_text(encoding="utf-8"))  # raises where it does not fit
        file, name = defect.test.split("::")
        assert f"def {name.split('[')[0]}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), defect.name


def wings_of_the_adapter(path: Path) -> set[str]:
    """The wings of diffusion that a file of it imports from, wherever in its source."""
    here, found = ["diffusion", *path.relative_to(ROOT / "diffusion").parts[:-1]], set()
    for module, names in imports(path):
        dots = len(module) - len(module.lstrip("."))
        if dots:
            base = [*here[: len(here) - dots + 1], *filter(None, module[dots:].split("."))]
            found |= {".".join([*base, name]).split(".")[1] for name in names}
    return found


@pytest.mark.parametrize("path", ADAPTER, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_nothing_imports_the_program_and_only_the_program_the_training(path):
    wing = path.relative_to(ROOT / "diffusion").parts[0]
    if wing not in ("program", "__main__.py"):
        assert "program" not in wings_of_the_adapter(path)
    if wing not in ("program", "training", "__init__.py"):
        assert "training" not in wings_of_the_adapter(path)
