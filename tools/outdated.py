"""Print which pinned packages have newer releases, which of these resolve, and what holds them back: `make outdated`.

    python -m tools.outdated            # every package of constraints.txt
    python -m tools.outdated mlflow     # some packages

For each package, pip's index names the newest release. A package of this environment, or pyproject.toml, holds it back
if its requirement excludes this release. The newest release that no other package excludes is then resolved by pip,
with all other packages at their pins, except those of which it needs one exact version. Nothing is installed.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
OWN = "pyproject.toml"
TRIED = 3  # releases of a package that are resolved, the newest first
Requirements = Mapping[str, Sequence[tuple[str, Requirement]]]  # package -> (who requires it, requirement)


@dataclass(frozen=True)
class Finding:
    """A pinned package that has a newer release."""

    name: str
    pinned: Version
    newest: Version
    resolves: Version  # the newest release that resolves with all other packages at their pinned versions
    holders: tuple[str, ...]  # what excludes the newest release, such as "sagemaker-core (<7.0)"

    @property
    def row(self) -> tuple[str, ...]:
        return self.name, str(self.pinned), str(self.newest), str(self.resolves), ", ".join(self.holders) or "-"


def read_pins(text: str) -> dict[str, Version]:
    """Return the pinned version of each package in a constraints file."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    pairs = (line.split("==") for line in lines if "==" in line)
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def read_requirements() -> dict[str, list[tuple[str, Requirement]]]:
    """Return what pyproject.toml and the packages of this environment require, without the extras of the packages."""
    project = tomllib.loads((ROOT / OWN).read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    texts = [(OWN, text) for items in lists for text in items]
    texts += [(dist.metadata["Name"], text) for dist in metadata.distributions() for text in dist.requires or ()
              if canonicalize_name(dist.metadata["Name"]) != canonicalize_name(project["name"])]
    found: dict[str, list[tuple[str, Requirement]]] = {}
    for who, text in texts:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found.setdefault(canonicalize_name(requirement.name), []).append((who, requirement))
    return found


def find_outdated(pins: Mapping[str, Version], requirements: Requirements,
                  releases: Callable[[str], Sequence[Version]],
                  resolve: Callable[[str, Version], str]) -> Iterator[Finding]:
    """Yield one finding per package that has a release newer than its pin.

    Args:
        releases: returns the releases of a package, in any order.
        resolve: returns why a release does not resolve; "" if it does.
    """
    for name, pinned in pins.items():
        newer = sorted((version for version in releases(name) if version > pinned), reverse=True)
        if not newer:
            continue
        holders = [f"{who} ({requirement.specifier})" for who, requirement in requirements.get(name, ())
                   if newer[0] not in requirement.specifier]
        allowed = [version for version in newer if all(
            version in requirement.specifier for who, requirement in requirements.get(name, ()) if who != OWN)]
        resolves = pinned
        for version in allowed[:TRIED]:
            if not (problem := resolve(name, version)):
                resolves = version
                break
            holders.append(f"{name} {version}: {problem}")
        yield Finding(name, pinned, newer[0], resolves, tuple(dict.fromkeys(holders)))


def list_releases(name: str) -> list[Version]:
    """Return the releases of a package that pip's index offers for this Python; empty if the index has none."""
    done = _pip("index", "versions", name)
    found = re.search(r"Available versions: (.*)", done.stdout)
    return [Version(text.strip()) for text in found[1].split(",")] if found else []


def tied_packages(name: str, requirements: Requirements) -> set[str]:
    """Return a package, and those of which it needs one exact version: they are released together."""
    return {name} | {other for other, items in requirements.items() for who, requirement in items
                     if canonicalize_name(who) == name and "==" in {item.operator for item in requirement.specifier}}


def resolve_alone(name: str, version: Version, requirements: Requirements) -> str:
    """Let pip resolve one release with all other packages at their pinned versions. Return the reason if it cannot."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    free = tied_packages(name, requirements)
    others = [line for line in pins if canonicalize_name(line.partition("==")[0]) not in free]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(others), encoding="utf-8")
        done = _pip("install", "--dry-run", "--no-input", "-c", str(constraints), f"{name}=={version}")
    return "" if done.returncode == 0 else explain(done.stdout + done.stderr)


def explain(output: str) -> str:
    """Return the requirement in pip's output that cannot be met."""
    if found := re.search(r"No matching distribution found for (\S+)", output):
        return f"there is no {found[1]} for it"
    if conflict := re.search(r"The conflict is caused by:\n((?: +.*\n)+)", output):
        causes = [line.strip() for line in conflict[1].splitlines()]
        return "; ".join(line for line in causes if not re.match(r"The user requested [^(]", line))
    lines = [line.removeprefix("ERROR: ") for line in output.splitlines() if line.startswith("ERROR: ")]
    return lines[-1][:200] if lines else "pip cannot resolve it"


def format_table(findings: Sequence[Finding]) -> str:
    """Return the findings as a table with one row per package."""
    if not findings:
        return "every pinned package is at its newest release"
    rows = [("package", "pinned", "newest", "resolves", "held back by"), *(finding.row for finding in findings)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in rows)


def _pip(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def main() -> None:
    pins = read_pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    names = [canonicalize_name(word) for word in sys.argv[1:]] or list(pins)
    if unknown := [name for name in names if name not in pins]:
        sys.exit(f"{unknown[0]} is not in constraints.txt: type another name")
    if not list_releases("pip"):
        sys.exit("pip's index does not answer: check the network, or set PIP_INDEX_URL")
    requirements = read_requirements()
    findings = list(find_outdated({name: pins[name] for name in names}, requirements, list_releases,
                                  partial(resolve_alone, requirements=requirements)))
    print(format_table(findings))


if __name__ == "__main__":
    main()
