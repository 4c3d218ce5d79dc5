"""The architecture: order of the folders, no circles, who may know whom, how long a file may be, what never appears.

Source is read as syntax trees, so that a rule covers imports inside functions too, and a new file from its first day.
"""

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence, Set
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dreambooth"
# A folder imports only from folders that stand before it. `errors` is the file errors.py; `commands` are the other
# files at the root of the package and every __main__.py.
ORDER = ("errors", "utils", "config", "runtime", "storage", "models", "optim", "data", "preparation",
         "serialization", "runs", "tracking", "cloud", "container", "kubernetes", "schedulers", "evaluation",
         "inference", "sweeps", "training", "planner", "budgets", "serving", "deployment", "commands")
COMMANDS = {"train", "generate", "plan", "evaluate", "entrypoint", "promote", "compare", "class_images", "stage",
            "workflows", "convert", "serve", "deploy", "prepare"}
HEAVY = {"torch", "diffusers", "transformers", "mlflow", "boto3", "sagemaker", "accelerate", "PIL",
         "numpy"}
BY_NAME = {"import_module", "importlib.import_module", "__import__"}
CODE = ("dreambooth", "hydra_plugins", "tools")
# Modules that `--help`, a laptop that only submits and small processes beside a training run import.
LIGHT = ["config.compose", "config.recipe", "runs.identity", "errors", "train", "generate", "evaluate", "convert",
         "entrypoint", "promote", "compare", "sweeps.hydra_callbacks", "serve", "serving.server", "deploy",
         "prepare"]
# The launcher plug-in runs `python -m dreambooth.plan` in a process of its own; it may import these modules only.
OPEN_TO_PLUGINS = {f"dreambooth.{name}" for name in (
    "errors", "config", "config.compose", "config.launcher", "config.recipe", "config.schema", "config.storage",
    "config.enums", "config.evaluate", "storage", "storage.folders", "storage.run_inputs", "utils",
    "utils.atomic_files", "utils.console", "utils.masking", "utils.plurals", "utils.quoting",
    "runs", "runs.pruning", "sweeps", "sweeps.hydra_callbacks", "sweeps.launched_jobs",
    "sweeps.studies",
    "cloud", "schedulers", "schedulers.slurm_array")} | {
        f"dreambooth.cloud.{path.stem}" for path in (PACKAGE / "cloud").glob("*.py")}
# A rule about a file that does not exist holds for nothing: these must exist.
SUBJECTS = ["errors.py", "cli.py", "run.py", "config/compose.py", "config/recipe.py", "models/loading.py",
            "data/batches.py", "training/loop.py", "training/step.py", "training/loss.py", "training/checkpoint.py",
            "planner/rehearsal.py", "runtime/engine.py", "tracking/tracker.py", "serialization/export.py"]


@cache
def parse(path: Path) -> ast.Module:
    """The syntax tree of a file, to be read only."""
    return ast.parse(path.read_text("utf-8"), str(path))


def sources(*folders: str) -> dict[str, ast.Module]:
    """Path below the root -> syntax tree, of every Python file in the folders."""
    paths = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return {path.relative_to(ROOT).as_posix(): parse(path) for path in paths}


def module_name(path: str) -> str:
    """dreambooth/cloud/job.py -> cloud.job"""
    return path.removeprefix("dreambooth/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def folder_of(module: str) -> str:
    """The member of ORDER to which a module (cloud.job) belongs."""
    first, _, rest = module.partition(".")
    return "commands" if module.endswith("__main__") else first if rest or first in ORDER else "commands"


def files() -> dict[str, Path]:
    """Dotted name -> file, of every module of ours: the package, the plug-in, tools, benchmarks."""
    paths = [path for folder in ("dreambooth", "hydra_plugins", "tools", "benchmarks")
             for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix().removesuffix(".py").removesuffix("/__init__").replace("/", "."): path
            for path in paths}


@cache
def graph() -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports, at any depth of its code."""
    modules = files()
    found = {}
    for name, path in modules.items():
        names = imports(parse(path))
        # `from package import module` counts as the module, not as its package
        wanted = {one for one in names if one in modules and not any(
            other.startswith(f"{one}.") and other in modules for other in names)}
        found[name] = wanted - {name}
    return found


def folder_edges() -> dict[str, set[str]]:
    """Folder of dreambooth/ -> the folders from which it imports; errors.py is left out, since all import it."""
    edges: dict[str, set[str]] = {name: set() for name in ORDER if name != "errors"}
    for module, wanted in graph().items():
        for other in wanted:
            if module.startswith("dreambooth.") and other.startswith("dreambooth."):
                pair = [folder_of(name.removeprefix("dreambooth.")) for name in (module, other)]
                if pair[0] != pair[1] and "errors" not in pair:
                    edges[pair[0]].add(pair[1])
    return edges


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """The sets of modules that import each other in a circle: strongly connected components (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in edges.get(module, ()):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            members = [stack.pop()]
            while members[-1] != module:
                members.append(stack.pop())
            if len(members) > 1:
                found.append(sorted(members))

    for module in edges:
        if module not in index:
            visit(module)
    return found


@cache
def imports(tree: ast.AST, package: str = "dreambooth") -> Set[str]:
    """Every dotted name a tree imports, at any depth; `from a import b` counts as a and as a.b."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module]))
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and dotted(node.func) in BY_NAME:
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return found


def dotted(node: ast.AST) -> str:
    """The dotted name that a node spells, such as torch.load, or ""."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def top(names: Set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def breaches(
    forbidden: set[str], *, but: Set[str] = frozenset(), folders: Sequence[str] = ("dreambooth",)
) -> dict[str, set[str]]:
    """The files, other than the modules `but`, that import a forbidden package, with what they import of it."""
    found = {
        path: {name for name in imports(tree) if name.partition(".")[0] in forbidden}
        for path, tree in sources(*folders).items()
        if module_name(path).partition(".")[0] not in but
    }
    return {path: names for path, names in found.items() if names}


def loaded(module: str) -> set[str]:
    """The top-level packages in sys.modules of a new process that has imported only `module`."""
    code = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def tracked() -> list[Path]:
    """The files that git has or would take."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in result.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_files_that_the_rules_are_about_exist(name: str) -> None:
    assert (PACKAGE / name).is_file()


# -- folders ------------------------------------------------------------------------------------------------------

def test_every_folder_has_a_place_in_the_order_and_says_what_it_holds() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name not in ("assets", "__pycache__")}
    assert folders == set(ORDER) - {"errors", "commands"}
    for path in sorted(PACKAGE.rglob("__init__.py")):
        assert len(ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "") > 40, path


def test_a_folder_imports_only_from_folders_before_it() -> None:
    back = [f"{folder} -> {other}" for folder, others in folder_edges().items() for other in others
            if ORDER.index(other) > ORDER.index(folder)]
    assert back == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles(graph()) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_no_folder_holds_more_than_18_python_files() -> None:
    folders = {path.parent for folder in (*CODE, "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")}
    counts = {path.relative_to(ROOT).as_posix(): len(list(path.glob("*.py"))) for path in folders}
    assert {path: count for path, count in counts.items() if count > 18} == {}


def test_the_picture_in_the_documents_shows_the_real_imports() -> None:
    """docs/architecture.md draws the transitive reduction: an arrow that follows from two others is left out."""
    edges = folder_edges()

    def reachable(start: str, without: tuple[str, str]) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            at = waiting.pop()
            new = {other for other in edges[at] if (at, other) != without} - seen
            seen |= new
            waiting += new
        return seen

    real = {(folder, other) for folder, others in edges.items() for other in others
            if other not in reachable(folder, (folder, other))}
    text = (ROOT / "docs/architecture.md").read_text("utf-8")
    [drawn] = re.findall(r"```mermaid\n(.*?)```", text, re.DOTALL)
    assert set(re.findall(r"(\w+) --> (\w+)", drawn)) == real


# -- who may know whom --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", LIGHT)
def test_rule_1_configuration_and_commands_import_nothing_heavy(name: str) -> None:
    assert not loaded(f"dreambooth.{name}") & HEAVY


def test_rule_1_holds_for_every_command() -> None:
    for name in sorted(COMMANDS - set(LIGHT)):
        assert not loaded(f"dreambooth.{name}") & HEAVY, name


def test_rule_2_below_the_commands_only_configuration_knows_hydra() -> None:
    knowing = {module_name(path) for path in breaches({"hydra", "omegaconf"})}
    assert knowing <= COMMANDS | {
        "cli", "config.compose", "config.launcher", "config.overrides", "runs.identity", "sweeps.hydra_callbacks"}


def test_rule_3_the_loop_receives_objects_and_callables() -> None:
    names = imports(sources("dreambooth")["dreambooth/training/loop.py"])
    assert {name for name in names if name.startswith("dreambooth.")} <= {
        "dreambooth.training.step", "dreambooth.training.step.StepInfo", "dreambooth.training.step.TrainState"}


def test_rule_4_there_is_one_step() -> None:
    trees = sources("dreambooth")
    walking = {
        path for path, tree in trees.items() for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "backward"
    }
    assert walking <= {"dreambooth/training/step.py", "dreambooth/runtime/engine.py"}
    assert "dreambooth.training.step" in imports(trees["dreambooth/planner/rehearsal.py"])


def test_rule_5_the_package_knows_no_plug_in() -> None:
    assert breaches({"hydra_plugins"}) == {}


def test_rule_5_plug_ins_know_no_torch_and_no_training_module() -> None:
    assert breaches(HEAVY, folders=("hydra_plugins",)) == {}
    modules = {f"dreambooth.{module_name(path)}" for path in sources("dreambooth")} - {"dreambooth.__init__"}
    for path, tree in sources("hydra_plugins").items():
        assert not imports(tree, "hydra_plugins") & (modules - OPEN_TO_PLUGINS), path


def test_rule_5_what_plug_ins_may_import_loads_nothing_heavy() -> None:
    names = sorted(name for name in OPEN_TO_PLUGINS if not name.endswith("__init__"))
    assert not loaded(", ".join(names)) & HEAVY


def test_rule_5_a_plug_in_loads_nothing_heavy() -> None:
    plugins = [path for path in (ROOT / "hydra_plugins").iterdir() if (path / "__init__.py").is_file()]
    assert plugins
    for plugin in plugins:
        assert not loaded(f"hydra_plugins.{plugin.name}") & HEAVY


def test_rule_6_few_know_mlflow() -> None:
    assert breaches({"mlflow"}, but={"tracking"}) == {}


def test_rule_6_only_cloud_and_storage_know_aws() -> None:
    assert breaches({"boto3", "botocore", "s3transfer", "sagemaker"}, but={"cloud", "storage"}) == {}


def test_rule_6_few_know_diffusers_pipelines() -> None:
    knowing = set()
    for path, tree in sources("dreambooth").items():
        names = {name for name in imports(tree) if name.partition(".")[0] == "diffusers"}
        if "diffusers" in names:  # then diffusers.SomePipeline is at hand without an import of its own
            names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        if any(name.endswith("Pipeline") or ".pipelines" in name for name in names):
            knowing.add(module_name(path))
    assert {name.partition(".")[0] for name in knowing} <= {"models", "serialization"}


# -- files --------------------------------------------------------------------------------------------------------

def test_files_are_short() -> None:
    paths = [path for folder in (*CODE, "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text("utf-8").splitlines()) for path in paths}
    assert {path: length for path, length in lengths.items() if length > 400} == {}
    assert statistics.median(length for path, length in lengths.items() if not path.endswith("__init__.py")) < 200


def test_the_composition_root_is_a_page() -> None:
    assert len((PACKAGE / "run.py").read_text("utf-8").splitlines()) <= 120


def test_no_pickle() -> None:
    assert breaches({"pickle", "dill", "cloudpickle", "joblib", "shelve"}, folders=CODE) == {}


def calls(tree: ast.AST, *functions: str) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and dotted(node.func) in functions]


def says(call: ast.Call, keyword: str, value: bool) -> bool:
    """Whether the call has keyword=value, written out."""
    return any(k.arg == keyword and isinstance(k.value, ast.Constant) and k.value.value is value for k in call.keywords)


def test_no_torch_save_and_torch_load_reads_weights_only() -> None:
    wrong = []
    for path, tree in sources(*CODE).items():
        safe = {call.func for call in calls(tree, "torch.load") if says(call, "weights_only", True)}
        used = {node for node in ast.walk(tree) if dotted(node) in {"torch.load", "torch.save"}}
        wrong += [f"{path}:{node.lineno}" for node in used - safe if isinstance(node, ast.Attribute)]
        wrong += [path] if imports(tree) & {"torch.save", "torch.load", "torch.serialization"} else []
    assert wrong == []


def test_no_shell() -> None:
    wrong = []
    for path, tree in sources(*CODE).items():
        every = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        given = [call for call in every if any(k.arg == "shell" for k in call.keywords)]
        bad = [call for call in given if not says(call, "shell", False)] + calls(tree, "os.system", "os.popen")
        wrong += [f"{path}:{call.lineno}" for call in bad]
    assert wrong == []


def test_no_file_names_a_private_host_a_machines_path_or_a_key() -> None:
    # Written in halves: this file is scanned as well.
    private = re.compile("|".join([
        r"(?<![\w.])/wor" + r"k/",  # not a part of a longer path
        r"file:///" + r"opt",
        r"(?<![\w.])/(?:root|home/\w+|Users/\w+)" + r"/",
        r"//(?:[^/\s@]+@)?(?:10\.\d+\.|192\.168\.|172\.(?:1[6-9]|2\d|3[01])\.)",
        r"//[\w.-]+\.(?:internal|corp|lan|intranet)\b",
        r"\b(?:AKIA|ASIA)(?!IOSFODNN7EXAMPLE)[0-9A-Z]{16}\b",
        r"-----BEGIN [A-Z ]*PRIVATE " + r"KEY-----",
    ]))  # fmt: skip
    found = []
    for path in tracked():
        raw = path.read_bytes()
        if b"\0" in raw[:8192]:
            continue
        for number, line in enumerate(raw.decode("utf-8", "replace").splitlines(), 1):
            found += [f"{path.relative_to(ROOT)}:{number}: {hit[0]}" for hit in private.finditer(line)]
    assert found == []


def test_the_folder_mlflow_holds_no_module() -> None:
    """Without MLflow installed it would import as an empty namespace package."""
    assert list((ROOT / "mlflow").rglob("*.py")) == []


def test_hydra_plugins_is_a_namespace() -> None:
    """An __init__.py in it would hide every other distribution's plug-ins."""
    assert not (ROOT / "hydra_plugins" / "__init__.py").exists()
