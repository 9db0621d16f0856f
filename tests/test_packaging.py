"""What is distributed: both archives, an installation without a compiler, and the files around the code."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import pydeqsolve

ROOT = Path(__file__).parents[1]
LEFT_BEHIND = shutil.ignore_patterns(
    ".git",
    ".venv",
    "build",
    "dist",
    "_build",
    "*.so",
    "*.egg-info",
    "__pycache__",
    "*-output",
    ".*_cache",
    ".hypothesis",
)
WITHOUT = """
import warnings
import torch
from pydeqsolve import Anderson, Broyden, build_info, solve
assert not build_info()["native"] and "_native" in build_info()["native_error"]
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for solver in (Anderson(), Broyden()):
        solution = solve(lambda z: torch.cos(z), torch.zeros(3, 2, dtype=torch.float64), solver=solver)
        assert (solution.z - 0.7390851332151607).abs().max() < 1e-5
(warning,) = [w for w in seen if issubclass(w.category, RuntimeWarning)]
print(warning.message)
from diffusion import load_checkpoint
print(load_checkpoint("digits").shape)
from diffusion.program.cli import main
print(main(["--version"]))
"""


def python(*argv, **options):
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """A source archive, and a wheel made from it without a compiler."""
    pytest.importorskip("build")
    place = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT, place / "tree", ignore=LEFT_BEHIND)
    environment = {"PATH": "", "PYDEQSOLVE_NATIVE": "0", "HOME": str(place)}
    python(
        "-m", "build", "--no-isolation", "--skip-dependency-check", "--outdir", place / "dist", place / "tree",
        env=environment, cwd=place,
    )  # fmt: skip
    (source,), (wheel,) = (list((place / "dist").glob(kind)) for kind in ("*.tar.gz", "*.whl"))
    return source, wheel


@pytest.mark.check
def test_the_archives_satisfy_the_index(archives):
    pytest.importorskip("twine")
    assert python("-m", "twine", "check", "--strict", *map(str, archives)).count("PASSED") == 2


@pytest.mark.check
def test_a_wheel_without_the_native_module_is_for_every_platform_and_has_what_it_needs(archives):
    _, wheel = archives
    assert wheel.name == f"pydeqsolve-{pydeqsolve.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {f"{p.relative_to(ROOT)}" for part in ("pydeqsolve", "diffusion") for p in (ROOT / part).rglob("*.py")}
    needed = {
        "pydeqsolve/py.typed", "diffusion/py.typed", "diffusion/program/reproduction/page.html",
        *(f"diffusion/checkpoints/{model}/{file}"
          for model in ("digits", "fashion", "digit-classes", "fashion-classes", "emoji")
          for file in ("config.json", "model.safetensors", "images.safetensors")),
        *(f"diffusion/checkpoints/{model}/features.safetensors" for model in ("digits", "fashion")),
    }  # fmt: skip
    assert modules | needed <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "docs"))]


@pytest.mark.check
def test_the_source_archive_holds_all_that_building_and_testing_need(archives):
    source, _ = archives
    with tarfile.open(source) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    for folder in ("csrc", "pydeqsolve", "diffusion", "tests", "benchmarks", "docs"):
        files = [p for p in (ROOT / folder).rglob("*") if p.is_file()]
        made = re.compile(r"__pycache__|_build|docs/gallery|\.so$")
        kept = {str(p.relative_to(ROOT)) for p in files if not made.search(str(p))}
        assert kept <= names
    assert {"CMakeLists.txt", "Makefile", "constraints.txt", "README.md", "LICENSE", "CITATION.cff"} <= names


@pytest.mark.check
def test_an_installation_without_a_compiler_solves_and_warns_once(archives, tmp_path):
    _, wheel = archives
    zipfile.ZipFile(wheel).extractall(tmp_path)
    # without the site module, which would find the native module of the tree under test
    path = f"{tmp_path}:{sysconfig.get_path('purelib')}"
    out = python("-S", "-c", WITHOUT, cwd=tmp_path, env={"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}).splitlines()
    assert out[0].startswith("pydeqsolve solves without its native module")
    assert out[1:] == ["(1, 8, 8)", f"deq-ddim {pydeqsolve.__version__}", "0"]


def test_the_native_module_brings_no_thread_pool_beside_that_of_torch():
    native = pytest.importorskip("pydeqsolve._native")
    assert b"libgomp" not in Path(native.__file__).read_bytes()


def test_kernels_are_the_same_for_every_python_and_with_cuda_or_without():
    # so that they are compiled once for all wheels: CMakeLists.txt defines it for the bindings alone
    sources = {p.name: p.read_text(encoding="utf-8") for p in (ROOT / "csrc").rglob("*.*")}
    assert [name for name, text in sources.items() if "PYDEQSOLVE_WITH_CUDA" in text] == ["bindings.cpp"]
    foreign = [name for name, text in sources.items() if re.search(r"#include .(Python|pybind11|torch)", text)]
    assert foreign == ["bindings.cpp"]


def test_a_module_removed_since_an_earlier_build_is_not_installed(tmp_path):
    shutil.copytree(ROOT, tmp_path / "tree", ignore=LEFT_BEHIND)
    stale = tmp_path / "tree" / "build" / "lib" / "pydeqsolve" / "removed.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    python("setup.py", "-q", "build", cwd=tmp_path / "tree", env={"PYDEQSOLVE_NATIVE": "0", "PATH": ""})
    assert (stale.parent / "solve.py").is_file()
    assert not stale.exists()


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_two_commands_say_what_they_install_and_nothing_when_it_is_there(target, tmp_path):
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    for file in ("Makefile", "constraints.txt", "pyproject.toml", "setup.py", "CMakeLists.txt"):
        shutil.copy(ROOT / file, tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    first = subprocess.run([make, "-n", target], cwd=tmp_path, capture_output=True, text=True).stdout
    assert "install:" in first
    assert ("[dev" in first) == (target == "test")
    for stamp in ("ready", "installed"):
        (tmp_path / ".venv" / stamp).touch()
    assert "install" not in subprocess.run([make, "-n", target], cwd=tmp_path, capture_output=True, text=True).stdout


def test_the_version_stands_in_one_place():
    found = [
        path.name for path in [*ROOT.glob("*.py"), *ROOT.glob("*.toml"), *ROOT.glob("*.txt"), *ROOT.glob("*.cff"),
                               *(ROOT / "pydeqsolve").glob("*.py"), *(ROOT / "diffusion").glob("*.py")]
        if re.search(rf"version\W+{re.escape(pydeqsolve.__version__)}\b", path.read_text(encoding="utf-8"))
    ]  # fmt: skip
    assert found == ["pyproject.toml"]


def test_the_changelog_begins_with_the_version():
    heading = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert heading.group(1) == pydeqsolve.__version__


def test_the_hooks_before_a_commit_are_the_checks_of_the_pipeline():
    yaml = pytest.importorskip("yaml")
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    pipeline = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert [hook["entry"] for hook in hooks] == ["make lint", "make types", "make test"]
    assert all(re.search(rf"^{hook['entry']}\b", pipeline, re.MULTILINE) for hook in hooks)


def test_the_forms_for_issues_ask_for_what_an_answer_needs():
    yaml = pytest.importorskip("yaml")
    forms = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in (ROOT / ".github").rglob("*.yml")}
    assert set(forms) == {"bug", "wish", "config"}
    for form in (forms["bug"], forms["wish"]):
        assert {"name", "description", "body"} <= form.keys()
        assert all(part["type"] == "textarea" and part["attributes"]["label"] for part in form["body"])
    required = [part["id"] for part in forms["bug"]["body"] if part.get("validations", {}).get("required")]
    assert required == ["code", "got", "doctor"]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md"])
def test_the_files_that_a_page_links_to_are_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    linked = [place for place in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in place]
    assert [place for place in linked if not (ROOT / place).exists()] == []
    assert linked or page != "README.md"


def test_the_citation_has_what_the_format_requires():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["license"] == "MIT"
