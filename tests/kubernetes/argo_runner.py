"""Checks of a WorkflowTemplate against those of Argo's rules that its schema does not contain; and a small runner.

The runner is NOT Argo. It maps each template to `docker run` of the image in dependency order, and handles parameters,
artifacts, fan-out, retries, the volume and the exit handler as Argo does, so that the commands in a rendered file
really run. It does not schedule, set up pods or collect garbage, nor anything else that a cluster does.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.kubernetes.argo_expressions import evaluate

PLACEHOLDER = re.compile(r"\{\{([^{}]+)\}\}")
GLOBALS = {"workflow.name", "workflow.status", "workflow.failures", "workflow.uid", "workflow.namespace", "item"}
Json = dict[str, Any]


def by_name(items: list[Json] | None) -> dict[str, Json]:
    return {item["name"]: item for item in items or ()}


def parameters(part: Json, kind: str = "inputs") -> dict[str, Json]:
    return by_name(part.get(kind, {}).get("parameters"))


def placeholders(part: Any) -> set[str]:
    """Every {{name}} in a part of a template."""
    return {match.strip() for match in PLACEHOLDER.findall(json.dumps(part))}


# -- rules ---------------------------------------------------------------------------------------------------------

def problems(template: Json) -> Iterator[str]:
    """Find dangling references, undeclared and missing parameters, and cycles."""
    spec = template["spec"]
    templates = by_name(spec["templates"])
    declared = {f"workflow.parameters.{name}" for name in parameters(spec, "arguments")} | GLOBALS - {"item"}
    for entry in ("entrypoint", "onExit"):
        if spec.get(entry) not in templates:
            yield f"{entry} names {spec.get(entry)}, which is not a template"
    if len(templates) != len(spec["templates"]):
        yield "two templates have the same name"
    for name, part in templates.items():
        available = declared | {f"inputs.parameters.{key}" for key in parameters(part)}
        if "dag" in part:
            yield from _dag(name, part["dag"]["tasks"], templates, available)
        else:
            yield from (f"{name}: {{{{{key}}}}} is not declared" for key in placeholders(part) - available)
    if cycle := _cycle({name: [task["template"] for task in part.get("dag", {}).get("tasks", ())]
                        for name, part in templates.items()}):
        yield f"templates call each other in a cycle: {cycle}"
    reached = {spec["entrypoint"], spec["onExit"]} | {
        task["template"] for part in templates.values() for task in part.get("dag", {}).get("tasks", ())}
    yield from (f"no task calls the template {name}" for name in templates.keys() - reached)


def _dag(name: str, tasks: list[Json], templates: Mapping[str, Json], available: set[str]) -> Iterator[str]:
    depends = {task["name"]: dependencies(task) for task in tasks}
    if len(depends) != len(tasks):
        yield f"{name}: two tasks have the same name"
    for task in tasks:
        label = f"{name}.{task['name']}"
        yield from (f"{label} depends on {other}, which is not a task"
                    for other in depends[task["name"]] - depends.keys())
        target = templates.get(task["template"])
        if target is None:
            yield f"{label} calls {task['template']}, which is not a template"
            continue
        arguments, inputs = parameters(task, "arguments"), parameters(target)
        yield from (f"{label} passes {key}, which is not an input of {target['name']}"
                    for key in arguments.keys() - inputs.keys())
        yield from (f"{label} does not pass {key}" for key, one in inputs.items()
                    if key not in arguments and "value" not in one and "default" not in one)
        fans_out = "withParam" in task or "withItems" in task
        earlier = _transitive(task["name"], depends)
        for key in placeholders(task) - available - ({"item"} if fans_out else set()):
            match = re.fullmatch(r"tasks\.([\w-]+)\.outputs\.parameters\.([\w-]+)", key)
            source = next((one for one in tasks if match and one["name"] == match[1]), None)
            if source is None:
                yield f"{label}: {{{{{key}}}}} is not declared"
            elif match and match[1] not in earlier:
                yield f"{label} reads {key} and does not depend on {match[1]}"
            elif match and match[2] not in parameters(templates[source["template"]], "outputs"):
                yield f"{label}: {source['template']} has no output {match[2]}"
    if cycle := _cycle({key: sorted(others) for key, others in depends.items()}):
        yield f"{name}: tasks depend on each other in a cycle: {cycle}"


def dependencies(task: Json) -> set[str]:
    """Names of the tasks in the `depends` of a task."""
    return set(re.findall(r"([\w-]+)(?:\.\w+)?", task.get("depends", ""))) - {"", "&&", "||"}


def _transitive(task: str, depends: Mapping[str, set[str]]) -> set[str]:
    """Names of all tasks that must end before a task starts."""
    earlier: set[str] = set()
    new = set(depends[task])
    while new:
        earlier |= new
        new = set().union(*(depends.get(name, set()) for name in new)) - earlier
    return earlier


def _cycle(edges: Mapping[str, list[str]]) -> str | None:
    """A cycle of a graph as a text; None if there is none."""
    def walk(name: str, path: tuple[str, ...]) -> str | None:
        if name in path:
            return " -> ".join((*path, name))
        return next(filter(None, (walk(other, (*path, name)) for other in edges.get(name, ()))), None)

    return next(filter(None, (walk(name, ()) for name in edges)), None)


# -- the runner, which is not Argo ---------------------------------------------------------------------------------

@dataclass
class Node:
    """Result of a task."""

    status: str = "Succeeded"
    outputs: dict[str, str] = field(default_factory=dict)
    items: tuple["Node", ...] = ()

    def satisfies(self, condition: str) -> bool:
        if condition == "AnySucceeded":
            return any(item.status == "Succeeded" for item in self.items)
        return self.status == condition


# Runs a container: command, container, host folder of its output folder -> exit code.
RunContainer = Callable[[list[str], Json, Path], int]


@dataclass
class Runner:
    """Runs a WorkflowTemplate. `run` starts each container with a host folder mounted at /tmp/stage."""

    template: Json
    run: RunContainer
    folder: Path
    name: str = "dreambooth-test"
    arguments: dict[str, str] = field(default_factory=dict)
    # Template, command and exit code of each container.
    executed: list[tuple[str, list[str], int]] = field(default_factory=list)
    failed: list[Json] = field(default_factory=list)

    def __call__(self) -> str:
        """Run the workflow and its exit handler; return the workflow's status."""
        spec = self.template["spec"]
        values = {f"workflow.parameters.{key}": one["value"] for key, one in parameters(spec, "arguments").items()}
        values |= {f"workflow.parameters.{key}": value for key, value in self.arguments.items()}
        values["workflow.name"] = self.name
        node = self._template(spec["entrypoint"], values, {}, self.name)
        values |= {"workflow.status": node.status, "workflow.failures": json.dumps(self.failed)}
        self._template(spec["onExit"], values, {}, f"{self.name}.onExit")
        return node.status

    def _template(self, name: str, values: Mapping[str, str], inputs: Mapping[str, str], label: str) -> Node:
        part = by_name(self.template["spec"]["templates"])[name]
        scope = {key: value for key, value in values.items() if key.startswith("workflow.")} | {
            f"inputs.parameters.{key}": value for key, value in inputs.items()}
        return self._dag(part["dag"]["tasks"], scope, label) if "dag" in part else self._container(part, scope, label)

    def _dag(self, tasks: list[Json], values: dict[str, str], label: str) -> Node:
        nodes: dict[str, Node] = {}
        waiting = list(tasks)
        while waiting:
            task = next(one for one in waiting if dependencies(one) <= nodes.keys())
            waiting.remove(task)
            if not self._is_due(task, nodes):
                nodes[task["name"]] = Node("Omitted")
                continue
            if not evaluate_when(fill(task.get("when", "true"), values)):
                nodes[task["name"]] = Node("Skipped")
                continue
            scope = values | {f"tasks.{name}.outputs.parameters.{key}": value
                              for name, node in nodes.items() for key, value in node.outputs.items()}
            if "withParam" in task:
                items = tuple(self._call(task, scope | {"item": item}, f"{label}.{task['name']}({number})")
                              for number, item in enumerate(json.loads(fill(task["withParam"], scope))))
                succeeded = all(item.status == "Succeeded" for item in items)
                nodes[task["name"]] = Node("Succeeded" if succeeded else "Failed", items=items)
            else:
                nodes[task["name"]] = self._call(task, scope, f"{label}.{task['name']}")
        leaves = {task["name"] for task in tasks} - {name for task in tasks for name in dependencies(task)}
        succeeded = all(nodes[name].status in ("Succeeded", "Skipped") for name in leaves)
        return Node("Succeeded" if succeeded else "Failed")

    @staticmethod
    def _is_due(task: Json, nodes: Mapping[str, Node]) -> bool:
        conditions = re.findall(r"([\w-]+)\.(\w+)", task.get("depends", ""))
        return all(nodes[name].satisfies(condition) for name, condition in conditions)

    def _call(self, task: Json, values: Mapping[str, str], label: str) -> Node:
        arguments = {key: fill(one["value"], values) for key, one in parameters(task, "arguments").items()}
        return self._template(task["template"], values, arguments, label)

    def _container(self, part: Json, values: Mapping[str, str], label: str) -> Node:
        container, attempt = part["container"], 0
        command = [fill(arg, values) for arg in (*container["command"], *container["args"])]
        container = container | {"image": fill(container["image"], values)}
        while True:
            out = self.folder / "out" / f"{label}-{attempt}"
            out.mkdir(parents=True)
            out.chmod(0o777)
            code = self.run(command, container, out)
            self.executed.append((part["name"], command, code))
            if code == 0 or not should_retry(part, code, attempt):
                break
            attempt += 1
        if code:
            self.failed.append({"displayName": label, "templateName": part["name"],
                                "message": f"Error (exit code {code})"})
            return Node("Failed")
        outputs = {}
        for key, one in parameters(part, "outputs").items():
            outputs[key] = (out / Path(one["valueFrom"]["path"]).name).read_text("utf-8")
        for one in part.get("outputs", {}).get("artifacts", ()):
            source = out / Path(one["path"]).name
            assert source.is_file() or one.get("optional"), f"{label} wrote no {one['name']}"
            if source.is_file():
                target = self.folder / "artifacts" / label
                target.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target / source.name)
        return Node("Succeeded", outputs)


def evaluate_when(condition: str) -> bool:
    """The value of a condition `when`: true, or a comparison of a text with the empty text."""
    if condition == "true":
        return True
    found = re.fullmatch(r'"(.*)" != ""', condition)
    assert found, condition
    return bool(found[1])


def fill(text: str, values: Mapping[str, str]) -> str:
    """Replace the placeholders in a text."""
    return PLACEHOLDER.sub(lambda match: str(values[match[1].strip()]), text)


def should_retry(part: Json, code: int, retries: int, status: str = "Failed", after: float = 0.0,
                 message: str | None = None) -> bool:
    """Whether a template's retryStrategy retries a container, by its own expression.

    Args:
        code: exit code of the container; -1 if it has none.
        retries: how many there were already.
        after: seconds since the first attempt began, which Argo compares with maxDuration.
        message: Argo's message of the pod; None: that of a container that ended by itself.
    """
    strategy = part.get("retryStrategy")
    if strategy is None or retries >= int(strategy["limit"]):
        return False
    limit = re.fullmatch(r"(\d+)([smhd]?)", strategy["backoff"].get("maxDuration", ""))
    if limit and after > int(limit[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[limit[2]]:
        return False
    return evaluate(strategy["expression"], {
        "status": status, "exitCode": str(code), "duration": str(after),
        "message": f"main: Error (exit code {code})" if message is None else message})
