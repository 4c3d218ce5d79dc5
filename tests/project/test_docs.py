"""What the documents say is so: commands are real, keys exist, links lead to files, tables match the code."""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

# The doors register the schemas of conf/<door>.yaml.
from dreambooth import compare, convert, deploy, errors, evaluate, generate, plan, prepare, promote, serve, workflows
from dreambooth.config.compose import conf_dir, load, to_aliased_dataclass
from dreambooth.config.dataset import Subject
from dreambooth.config.enums import Device
from dreambooth.config.overrides import setting_keys
from dreambooth.config.recipe import resolve
from dreambooth.config.schema import Config
from dreambooth.inference.picture_request import Limits, parse
from dreambooth.preparation.options import CaptionOptions, FaceOptions, MaskOptions
from dreambooth.serving.app import create_app
from dreambooth.serving.service import Service
from dreambooth.storage import __main__ as storage_command
from dreambooth.utils.hardware import Machine
from hydra_plugins.dreambooth_optuna.sweeper import OptunaSweeperConf
from hydra_plugins.dreambooth_sagemaker.launcher import SageMakerLauncherConf
from hydra_plugins.dreambooth_slurm.launcher import SlurmLauncherConf

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("examples/**/*.md"))]
TRAIN, GENERATE, EVALUATE, PLAN, PROMOTE, COMPARE, CONVERT, DEPLOY, SERVE, PREPARE = (
    ["python", "-m", f"dreambooth.{door}"]
    for door in ("train", "generate", "evaluate", "plan", "promote", "compare", "convert", "deploy", "serve",
                 "prepare"))
# What doors that compose no run read.
ASKED = {"generate": generate.Generate, "evaluate": evaluate.EvaluateOptions, "promote": promote.Promote,
         "compare": compare.Compare, "convert": convert.Convert, "deploy": deploy.Deploy, "serve": serve.Serve,
         "prepare": prepare.Prepare}
OTHER = {". .venv/bin/activate", "nvidia-smi", "umask 002", "tensorboard --logdir runs", "export WANDB_MODE=offline",
         "mkdir runs && chgrp artists runs && chmod 2775 runs",
         "export MLFLOW_TRACKING_URI=ADDRESS",
         "mlflow models serve -m models:/demo-tiny-full@champion --env-manager local --port 5000",
         'curl localhost:5000/invocations -H "Content-Type: application/json" '
         """-d '{"inputs": [{"prompt": "a photo of a zwx toy", "seed": 5, "num_images": 2}]}'"""}  # run by a person
INSTALL = re.compile(r"pip install -c constraints\.txt -e '\.\[(\w+)\]'")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
TORCHRUN = re.compile(r"(python -m dreambooth\.container\.)?torchrun( --[a-z-]+(=\S+)?)+ -m dreambooth\.train")
FLAGS = {"--help": 1, "--cfg": 2, "--info": 2, "-m": 1}  # of Hydra, with the words that each takes
CARD = Machine("a card", 24.0, 8.6)  # what `hardware=local` finds where a document says "with a CUDA card"
NO_KEYS = {"PYTHON", "VENV", "PORT", "CUDA", "HF_HOME", "MLFLOW_TRACKING_URI", "WANDB_MODE"}  # of make, images ...
SHORT = ["train.max_train_steps=2", "prior.num_class_images=2", "sample.num_inference_steps=2",
         "prior.num_inference_steps=2", "hardware=cpu"]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def commands(page: Path) -> list[str]:
    """The commands in the ```sh blocks of a page; a line that ends with a backslash goes on in the next."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    return [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines() if line.strip()]


COMMANDS = [pytest.param(line, id=f"{name(page)}: {line}") for page in PAGES for line in commands(page)]


def overrides(words: list[str]) -> Iterator[list[str]]:
    """The override lists of a command without Hydra's flags: one, or each combination of a sweep."""
    words = words[:]
    sweep = "-m" in words
    while flags := [number for number, word in enumerate(words) if word in FLAGS]:
        del words[flags[0]:flags[0] + FLAGS[words[flags[0]]]]
    assert not [word for word in words if word.startswith("-")], "a flag that this test does not know"
    parsed = OverridesParser.create().parse_overrides(words)
    swept = any(item.is_sweep_override() or item.key_or_group == "sweep" for item in parsed)
    assert sweep == swept, "-m and comma-separated values go together"
    yield from map(list, itertools.product(*(
        [f"{item.get_key_element()}={value}" for value in item.sweep_string_iterator()]
        if item.is_sweep_override() else [str(item.input_line)] for item in parsed)))


def composed(config: str, asked: list[str]) -> DictConfig:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose(config, asked)


def argo_command(words: list[str]) -> None:
    """It names a template that is there, parameters of it, and overrides that compose."""
    [template] = [word.partition("/")[2] for word in words if word.startswith("workflowtemplate/")]
    spec = OmegaConf.load(ROOT / f"workflows/argo/{template}.yaml").spec
    given = dict(word.split("=", 1) for flag, word in itertools.pairwise(words) if flag == "-p")
    assert given.keys() <= {one.name for one in spec.arguments.parameters}
    load(composed("config", shlex.split(given.get("overrides", ""))))


def curl_command(words: list[str]) -> None:
    """It asks a route of the server that is there, with fields that are known."""
    routes = create_app(Service(serve.Serve(base="package:tiny-sd"))).paths
    [address] = [word for word in words if word.startswith("http://")]
    assert urlsplit(address).path in routes
    parse(json.loads(words[words.index("-d") + 1]), Limits())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_real(command: str) -> None:
    words = shlex.split(TORCHRUN.sub("python -m dreambooth.train", command))
    if command in OTHER:
        return
    if extra := INSTALL.fullmatch(command):
        assert extra[1] in EXTRAS
        return
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{words[1]}:", makefile, re.M), "no such target"
        assert all(re.search(rf"^{word.partition('=')[0]} +\?=", makefile, re.M) for word in words[2:])
        return
    if words[0] in ("cp", "kubectl") or words[:2] in (["docker", "compose"], ["docker", "build"]):
        places = [word.removeprefix("build/") for word in words
                  if word.startswith(("mlflow", "workflows/", "build/workflows/"))]
        served = yaml.safe_load_all((ROOT / "workflows/serving/deployment.yaml").read_text(encoding="utf-8"))
        objects = {f"{one['kind'].lower()}/{one['metadata']['name']}" for one in served}
        assert places or objects & {*words}
        assert all((ROOT / place).exists() for place in places if not place.endswith("/server.env"))
        return
    if words[0] == "sbatch" or words[:3] == ["sky", "jobs", "launch"]:
        scripts = [word for word in words if word.endswith(".yaml" if words[0] == "sky" else ".sbatch")]
        assert scripts and all((ROOT / script.removeprefix("build/")).is_file() for script in scripts)
        return
    if words[0].startswith("containers/"):
        assert os.access(ROOT / words[0], os.X_OK), "no such script"
        return
    if words[:2] == ["docker", "run"]:
        [image] = [number for number, word in enumerate(words) if word.startswith("dreambooth:")]
        assert words[image + 1:image + 2] in ([], ["train"], ["serve"])
        if words[image + 1:image + 2] == ["serve"]:
            assert isinstance(OmegaConf.to_object(composed("serve", words[image + 2:])), serve.Serve)
            return
        load(composed("config", words[image + 2:]))
        return
    if words[0] == "curl":
        curl_command(words)
        return
    if words[0] == "python" and words[1].startswith("examples/"):
        assert (ROOT / words[1]).is_file()
        return
    if words[0] == "argo":
        argo_command(words)
        return
    if words[:3] == ["python", "-m", "dreambooth.workflows"]:
        options, typed = workflows.parser().parse_known_args(words[3:])
        workflows.build_spec(typed or workflows.DEFAULT_OVERRIDES, options.space, options.image)
        return
    if words[:3] == ["python", "-m", "dreambooth.storage"]:
        assert storage_command.parser().parse_args(words[3:]).uri.startswith("s3://")
        return
    doors = TRAIN, GENERATE, EVALUATE, PLAN, PROMOTE, COMPARE, CONVERT, DEPLOY, SERVE, PREPARE
    assert words[:3] in doors, "neither make nor a door, and not on the list of others"
    if words[:3] in (PROMOTE, COMPARE):  # the doors take these words before Hydra
        words = [word for word in words if not word.startswith(("sweep=", "rule="))]
    for asked in overrides(words[3:]):
        if words[:3] == CONVERT:
            assert convert.parse_options(composed("convert", asked)).source
            continue
        if words[:3] == PREPARE:
            assert to_aliased_dataclass(composed("prepare", asked), prepare.Prepare).out
            continue
        if words[:3] in (GENERATE, EVALUATE, PROMOTE, COMPARE, DEPLOY, SERVE):
            door = words[2].removeprefix("dreambooth.")
            assert isinstance(OmegaConf.to_object(composed(door, asked)), ASKED[door])
            continue
        config = load(composed("config", asked))
        if words[:3] == PLAN:  # needs no photos
            config.dataset.allow_drawings = True
            for key, value in plan.PLACEHOLDERS.items():
                setattr(config.dataset, key, getattr(config.dataset, key) or value)
        if "--cfg" in words or "--info" in words:  # shown, not run: what is missing may be missing
            continue
        resolve(config, Path("runs/x"), CARD if config.hardware.device is Device.local else None)


# -- keys -----------------------------------------------------------------------------------------------------------

def keys() -> set[str]:
    """Every key of a training run, such as train.seed, and of a group or section, such as train."""
    parts = [key.split(".") for key in setting_keys(Config)]
    return {".".join(key[:length]) for key in parts for length in range(1, len(key) + 1)}


def in_code(page: Path) -> str:
    """Inline code and code blocks of a page, a piece a line."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    return "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_key_in_a_document_exists(page: Path) -> None:
    known = keys().union(*(vars(ask()) for ask in ASKED.values())) | NO_KEYS | {"experiment", "group", "section.key"}
    known |= {"in"}  # of convert and prepare
    known |= {f"{section}.{key}" for section, kind in (
        ("captions", CaptionOptions), ("masks", MaskOptions), ("faces", FaceOptions)) for key in vars(kind())}
    known |= {"environment.DREAMBOOTH_SERVE_MAX_STEPS", "environment.RELEASE"}  # of deploy
    known |= {f"hydra.launcher.{key}" for key in vars(SageMakerLauncherConf()) | vars(SlurmLauncherConf())}
    known |= {"IMAGE", "RUN_ROOT"}  # of the batch scripts for Slurm
    known |= {"hydra.verbose"}
    known |= {f"hydra.sweeper.{key}" for key in vars(OptunaSweeperConf())}
    known |= {"image", "overrides", "deploy", "MODEL"}  # of Argo, and of the Deployment that serves
    known |= {"hydra.launcher.KEY", "wait", "SAGEMAKER_VALIDATE_ROLE"}  # a placeholder; of the SageMaker SDK
    known |= {f"dataset.concepts.{number}.{key}" for number in (0, 1) for key in vars(Subject())}
    said = set(re.findall(r"(?<![\w./-])([A-Za-z_]\w*(?:\.\w+)*)=", in_code(page)))
    sections = "|".join(key for key in keys() if "." not in key)
    dotted = set(re.findall(rf"(?m)^((?:{sections})\.[a-z]\w*)$", in_code(page)))
    files = {f"{path.stem}.py" for path in (ROOT / "dreambooth").glob("*.py")}
    assert (said | dotted) - known - files == set()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_an_option_in_a_document_exists(page: Path) -> None:
    groups = [path.name for path in conf_dir().iterdir() if path.is_dir() and path.name != "hydra"]
    text = re.sub(r"dreambooth\.(promote|compare)[^\n]*", "", in_code(page))  # their sweep= is no group
    for group, option in re.findall(rf"(?<![\w./-])({'|'.join(groups)})=(\w+)", text):
        assert option == "option" or (conf_dir() / group / f"{option}.yaml").is_file(), f"{group}={option}"


def test_every_key_is_in_the_configuration_page() -> None:
    text = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    told = set(re.findall(r"`([a-z0-9_.]+)(?:=[^`]*)?`", text))
    named = {f"{section}.{key}" for section in vars(Config()) for key in ("name", "kind")}  # set by choosing a file
    parts = {key for key in keys() if "." in key} - {"precision.dtype"}
    assert parts - named - told == set()


def test_the_readme_lists_every_group_and_option() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\w, ]+) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    told = {group: set(options.split(", ")) for group, options in rows}
    there = {path.name: {file.stem for file in path.glob("*.yaml")}
             for path in conf_dir().iterdir() if path.is_dir() and path.name != "hydra"}
    assert told == there


# -- everything else ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if link.startswith("https://"):
            continue
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
            assert heading in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, link


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_exit_codes_are_those_of_the_code(page: str) -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    told = re.findall(r"^\| (\d) \|", (ROOT / page).read_text(encoding="utf-8"), re.M)
    assert sorted(map(int, told)) == sorted({0} | {kind.exit_code for kind in kinds})


def test_files_that_the_architecture_page_names_exist() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:\w+/)*\w+\.py)`", text)) - {"__init__.py"}
    assert len(named) > 12
    assert [name for name in sorted(named) if not (ROOT / "dreambooth" / name).is_file()] == []


def test_the_readme_is_a_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.slow
def test_the_readmes_own_commands_run(tmp_path: Path) -> None:
    """The bare training command, which `make demo` is, and the one that draws with its result, both shortened."""
    lines = commands(ROOT / "README.md")
    main = next(shlex.split(line) for line in lines if shlex.split(line)[:3] == TRAIN)
    drawing = next(shlex.split(line) for line in lines if shlex.split(line)[:3] == GENERATE)
    assert main == TRAIN
    assert re.search(r"^demo:.*\n.*/python -m dreambooth\.train$", (ROOT / "Makefile").read_text("utf-8"), re.M)

    def call(words: list[str], *more: str) -> str:
        command = [sys.executable, *words[1:], *more]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    runs = tmp_path / "runs"
    told = call(main, *SHORT, f"run_root={runs}")
    [run] = runs.glob("demo-tiny-full-*")
    assert f"run={run}" in re.sub(r"\s+", "", told)
    named = [f"run={run}" if word.startswith("run=") else word for word in drawing if not word.startswith("num_images")]
    call(named, "num_images=1", "num_inference_steps=2")
    assert list((run / "generated").glob("*-grid.png"))

    tree = re.search(r"```\n(contact_sheet.*?)```", (ROOT / "docs/results.md").read_text("utf-8"), re.S)
    assert tree
    entries = [word for line in tree[1].splitlines() for word in re.split(r"\s+", line.split("   ")[0]) if word]
    sometimes = {"earlier-TIME/", "train.log", "best/", "remote.json", "budget.json"}
    assert [entry for entry in entries if entry not in sometimes and not (run / entry).exists()] == []
    unnamed = {entry.name for entry in run.iterdir()} - {entry.rstrip("/") for entry in entries}
    assert unnamed == set()
    for entry in ("class_images", "mlflow.db", "mlartifacts"):
        assert (runs / entry).exists(), entry
