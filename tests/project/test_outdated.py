"""`make outdated`: which releases are newer than the pins, which resolve, and what holds them back."""

from packaging.requirements import Requirement
from packaging.version import Version

from tools import outdated

PINS = outdated.read_pins("# comment\nprotobuf==6.33.6\nmlflow==3.17.2  # why\nrich==14.3.4\nPillow==13.0.0\n"
                          "torch==2.13.0\n")
RELEASES = {"protobuf": ["6.33.6", "7.1.0", "6.40.0"], "mlflow": ["3.18.0", "3.17.2", "3.17.3"], "rich": ["15.0.0"],
            "pillow": ["13.0.0", "12.0.0"], "torch": ["2.14.0"]}
REQUIREMENTS = {"protobuf": [("sagemaker-core", Requirement("protobuf<7,>=3"))],
                "mlflow": [("pyproject.toml", Requirement("mlflow>=3.17,<3.18"))],
                "rich": [("sagemaker-core", Requirement("rich<15"))]}


def findings() -> dict[str, tuple[str, ...]]:
    def resolve(name: str, version: Version) -> str:
        return "there is no mlflow-skinny==3.18.0 for it" if str(version) == "3.18.0" else ""

    return {found.name: found.row[1:] for found in outdated.find_outdated(
        PINS, REQUIREMENTS, lambda name: [Version(text) for text in RELEASES[name]], resolve)}


def test_each_newer_release_is_shown_with_what_resolves_and_what_holds_it_back() -> None:
    assert findings() == {
        "protobuf": ("6.33.6", "7.1.0", "6.40.0", "sagemaker-core (<7,>=3)"),
        "mlflow": ("3.17.2", "3.18.0", "3.17.3",
                   "pyproject.toml (<3.18,>=3.17), mlflow 3.18.0: there is no mlflow-skinny==3.18.0 for it"),
        "rich": ("14.3.4", "15.0.0", "14.3.4", "sagemaker-core (<15)"),
        "torch": ("2.13.0", "2.14.0", "2.14.0", "-")}


def test_the_requirements_of_this_environment_are_read() -> None:
    found = outdated.read_requirements()
    assert "pyproject.toml" in [who for who, _ in found["mlflow"]]
    assert outdated.tied_packages("mlflow", found) == {"mlflow", "mlflow-skinny", "mlflow-tracing"}


def test_pips_message_becomes_one_reason() -> None:
    assert outdated.explain("ERROR: Could not find a version\nERROR: No matching distribution found for a==1\n") == (
        "there is no a==1 for it")
    assert outdated.explain("The conflict is caused by:\n    b 2 depends on c<1\n    The user requested c\n") == (
        "b 2 depends on c<1")
