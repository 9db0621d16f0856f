"""A release: one version everywhere, dated notes, a wheel per Python with the native module."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHANGELOG = "# Changelog\n\n## [1.2.0] - 2026-03-04\n\n### Added\n- A thing.\n\n## [1.1.0] - 2026-01-01\n- Older.\n"


def wheel(folder, tag="cp311-cp311-manylinux_2_28_x86_64", version="1.2.0", native="pydeqsolve/_native.so"):
    with zipfile.ZipFile(folder / f"pydeqsolve-{version}-{tag}.whl", "w") as archive:
        archive.writestr(native, "")
        archive.writestr(
            f"pydeqsolve-{version}.dist-info/METADATA", f"Metadata-Version: 2.4\nVersion: {version}\n\nText"
        )


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "pydeqsolve-1.2.0.tar.gz").write_bytes(b"source")
    wheel(tmp_path / "dist")
    return tmp_path


def check(tree, *options):
    argv = [sys.executable, ROOT / "release" / "check.py", "--tree", tree, "--folder", tree / "dist", *options]
    done = subprocess.run(argv, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_release_gets_the_notes_of_its_version_and_check_sums(tree):
    code, said = check(tree, "--tag", "v1.2.0")
    assert (code, said.count("\n")) == (0, 1), said
    assert (tree / "dist" / "notes.md").read_text() == "### Added\n- A thing.\n"
    sums = (tree / "dist" / "SHA256SUMS").read_text()
    assert re.findall(r"^[0-9a-f]{64}  (\S+)$", sums, re.MULTILINE) == [
        "pydeqsolve-1.2.0-cp311-cp311-manylinux_2_28_x86_64.whl",
        "pydeqsolve-1.2.0.tar.gz",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (CHANGELOG.replace("2026-03-04", "unreleased"), "the date of 1.2.0 is 'unreleased'"),
        (CHANGELOG.replace("[1.2.0]", "[1.3.0]"), "begins with 1.3.0"),
        (CHANGELOG.replace("- A thing.\n", ""), "says nothing of 1.2.0"),
        ("# Changelog\n", "no heading"),
    ],
)
def test_a_changelog_that_does_not_tell_of_the_version_is_no_release(tree, text, said):
    (tree / "CHANGELOG.md").write_text(text)
    assert check(tree)[0] == 1
    assert said in check(tree)[1]
    assert not (tree / "dist" / "notes.md").exists()


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"tag": "cp312-cp312-linux_x86_64"}, "is not named"),
        ({"tag": "cp312-cp312-manylinux_2_28_x86_64", "version": "1.1.0"}, "another version"),
        ({"tag": "cp312-cp312-manylinux_2_28_x86_64", "native": "pydeqsolve/solve.py"}, "no native module"),
        ({"tag": "cp311-cp311-manylinux_2_35_x86_64"}, "more than one wheel for cp311"),
    ],
)
def test_a_wheel_that_is_not_of_the_release_is_named(tree, made, said):
    wheel(tree / "dist", **made)
    code, printed = check(tree)
    assert code == 1
    assert said in printed


def test_missing_archives_and_another_tag_are_all_said(tree):
    for archive in (tree / "dist").iterdir():
        archive.unlink()
    code, said = check(tree, "--tag", "v1.2")
    assert code == 1
    for part in ("no wheel", "must hold pydeqsolve-1.2.0.tar.gz", "the tag is v1.2"):
        assert part in said
