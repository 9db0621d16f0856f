"""Says whether what lies in dist/ is a release, and writes its notes and check sums; `make release` runs this.

    python release/check.py [--tag v0.1.0] [--folder dist]

A release has one version: in pyproject.toml, in the first heading of CHANGELOG.md, in the name and metadata of every
archive, and in the tag. That heading has a date, and text below it. There is a source archive, and a wheel per Python
version, each with the native module and tagged with the systems that it runs on. Everything that is missing is printed,
and the exit code is 1. If nothing is, notes.md (the section of the changelog) and SHA256SUMS are written beside them.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADING = re.compile(r"^## \[(?P<version>[^]]+)\] - (?P<date>.+)$", re.MULTILINE)


def version_of(tree: Path) -> str:
    """Return the version, from the one place where it stands."""
    found = re.search(r'^version = "(.+)"$', (tree / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        sys.exit("release: pyproject.toml has no version")
    return found[1]


def notes_of(changelog: str, version: str) -> tuple[str, list[str]]:
    """Return the text under the changelog's first heading, and what is wrong with it."""
    headings = list(HEADING.finditer(changelog))
    if not headings:
        return "", ["CHANGELOG.md has no heading like: ## [0.1.0] - 2026-01-31"]
    first = headings[0]
    end = headings[1].start() if len(headings) > 1 else len(changelog)
    text, faults = changelog[first.end() : end].strip(), []
    if first["version"] != version:
        faults.append(f"CHANGELOG.md begins with {first['version']}, pyproject.toml says {version}")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", first["date"]):
        faults.append(f"CHANGELOG.md: the date of {first['version']} is {first['date']!r}, not like 2026-01-31")
    if "\n- " not in f"\n{text}":
        faults.append(f"CHANGELOG.md says nothing of {first['version']}")
    return text, faults


def faults_of_wheel(wheel: Path, version: str) -> list[str]:
    """Return what is wrong with a wheel."""
    name, faults = wheel.name, []
    if not re.fullmatch(rf"pydeqsolve-{re.escape(version)}-cp3\d+-cp3\d+-manylinux_.+\.whl", name):
        faults.append(f"{name} is not named pydeqsolve-{version}-cp3…-manylinux_….whl: make wheel names it")
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
        metadata = next((archive.read(file).decode() for file in files if file.endswith(".dist-info/METADATA")), "")
    if f"\nVersion: {version}\n" not in metadata:
        faults.append(f"{name}: its metadata say another version than {version}")
    if not any(file.startswith("pydeqsolve/_native") for file in files):
        faults.append(f"{name} holds no native module")
    return faults


def faults_of_archives(folder: Path, version: str) -> list[str]:
    """Return what is missing in a folder of archives, and what does not belong there."""
    wheels, sources = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    faults = [fault for wheel in wheels for fault in faults_of_wheel(wheel, version)]
    if not wheels:
        faults.append(f"{folder} holds no wheel: make wheel ARGS=--all")
    if [source.name for source in sources] != [f"pydeqsolve-{version}.tar.gz"]:
        faults.append(f"{folder} must hold pydeqsolve-{version}.tar.gz and no other source archive")
    pythons = [wheel.name.split("-")[2] for wheel in wheels]
    return faults + [
        f"{folder} holds more than one wheel for {python}" for python in {*pythons} if pythons.count(python) > 1
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tag", help="the tag that the release is made of, v and the version")
    parser.add_argument("--folder", type=Path, default=ROOT / "dist", help="with the archives (default dist)")
    parser.add_argument("--tree", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args()
    version = version_of(args.tree)
    notes, faults = notes_of((args.tree / "CHANGELOG.md").read_text(encoding="utf-8"), version)
    faults += faults_of_archives(args.folder, version)
    if args.tag and args.tag != f"v{version}":
        faults.append(f"the tag is {args.tag}, pyproject.toml says {version}: v{version}")
    if faults:
        print("\n".join(f"release: {fault}" for fault in faults))
        return 1
    archives = sorted([*args.folder.glob("*.whl"), *args.folder.glob("*.tar.gz")])
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in archives]
    (args.folder / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")
    (args.folder / "notes.md").write_text(notes + "\n", encoding="utf-8")
    print(f"release: {version}, {len(archives)} archives, with notes.md and SHA256SUMS in {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
