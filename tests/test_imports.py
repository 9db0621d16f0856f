"""Who may import whom, read off the source: the arrows of the design, and what the library must never do."""

import ast
import re
from pathlib import Path

import planted_defects
import pytest

import pydeqsolve

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "pydeqsolve").glob("*.py"))
ADAPTER = sorted((ROOT / "diffusion").rglob("*.py"))
KERNELS = [p for p in sorted((ROOT / "csrc").iterdir()) if p.name != "bindings.cpp"]


def imports(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """(module, names) of every import in a file, however deep; relative ones start with a dot."""
    found: list[tuple[str, tuple[str, ...]]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(("." * node.level + (node.module or ""), tuple(alias.name for alias in node.names)))
    return found


def siblings(name: str) -> set[str]:
    """Modules of pydeqsolve that pydeqsolve/<name>.py imports."""
    found = set()
    for module, names in imports(ROOT / "pydeqsolve" / f"{name}.py"):
        if module == ".":
            found |= set(names)
        elif module.startswith((".", "pydeqsolve.")):
            found.add(module.removeprefix("pydeqsolve").lstrip("."))
    return found


@pytest.mark.parametrize("path", ADAPTER, ids=lambda p: p.name)
def test_the_adapter_imports_public_names_of_the_library_only(path):
    for module, names in imports(path):
        assert not module.startswith("pydeqsolve."), f"{path.name} imports {module}"
        if module == "pydeqsolve":
            assert set(names) <= {*pydeqsolve.__all__, "__version__"}, f"{path.name} imports {names}"


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.name)
def test_the_library_knows_nothing_of_the_adapter(path):
    assert not [module for module, _ in imports(path) if module.split(".")[0] == "diffusion"]


@pytest.mark.parametrize("path", [p for p in LIBRARY if p.name != "ops.py"], ids=lambda p: p.name)
def test_only_ops_touches_the_native_module(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not (isinstance(node, ast.Name) and node.id == "_native")
        assert not (isinstance(node, ast.Attribute) and node.attr == "_native")
    assert not [names for module, names in imports(path) if "_native" in (module.strip("."), *names)]


def test_the_arrows_point_from_solve_to_gradient_to_iterate_to_solution():
    order = ["solution", "iterate", "gradient", "solve"]
    for i, name in enumerate(order):
        assert not siblings(name) & set(order[i:]), f"{name} imports what comes after it"
    assert {"gradient", "iterate"} <= siblings("solve")
    assert "iterate" in siblings("gradient")
    assert "solution" in siblings("iterate")


def test_the_loop_names_no_concrete_solver():
    assert not siblings("iterate") & {"anderson", "broyden", "picard", "gmres"}
    assert not siblings("monitor") & {"anderson", "broyden", "picard", "gmres", "iterate"}


def test_nothing_but_the_test_laws_needs_the_test_laws():
    assert not [p.name for p in LIBRARY if p.name != "testing.py" and "testing" in siblings(p.stem)]
    foreign = {module.split(".")[0] for module, _ in imports(ROOT / "pydeqsolve" / "testing.py")}
    assert not foreign & {"pytest", "hypothesis", "numpy", "scipy"}


def test_one_line_of_the_library_calls_the_users_function():
    calls = []
    for path in LIBRARY:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "fn":
                calls.append(path.name)
    assert calls == ["iterate.py"]


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


def test_the_library_knows_nothing_of_the_program():
    outside = [path for path in (ROOT / "diffusion").glob("*.py") if path.stem not in ("cli", "__main__")]
    assert not [
        path.name for path in outside for module, names in imports(path) if "program" in (module.strip("."), *names)
    ]
    assert not [path.name for path in outside for module, _ in imports(path) if module.startswith(".program")]
