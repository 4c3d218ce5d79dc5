"""Argo's rules over a rendered WorkflowTemplate, as far as its schema does not hold them; and a small runner.

The runner is NOT Argo. It maps each template to `docker run` of the image in dependency order, with parameters,
artifacts, fan-out, retries, the volume and the exit handler handed on as Argo would, so that the words in a rendered
file really run. Scheduling, pod settings, garbage collection and everything else that a cluster does are not in it.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PLACEHOLDER = re.compile(r"\{\{([^{}]+)\}\}")
GLOBAL = {"workflow.name", "workflow.status", "workflow.failures", "workflow.uid", "workflow.namespace", "item"}
Json = dict[str, Any]


def named(items: list[Json] | None) -> dict[str, Json]:
    return {item["name"]: item for item in items or ()}


def parameters(part: Json, kind: str = "inputs") -> dict[str, Json]:
    return named(part.get(kind, {}).get("parameters"))


def placeholders(part: Any) -> set[str]:
    """Every {{name}} in a part, without the tasks of a DAG: they are looked at one by one."""
    return {match.strip() for match in PLACEHOLDER.findall(json.dumps(part))}


# -- rules ---------------------------------------------------------------------------------------------------------

def problems(template: Json) -> Iterator[str]:
    """Dangling references, undeclared and missing parameters, cycles."""
    spec = template["spec"]
    templates = named(spec["templates"])
    declared = {f"workflow.parameters.{name}" for name in parameters(spec, "arguments")} | GLOBAL - {"item"}
    for entry in ("entrypoint", "onExit"):
        if spec.get(entry) not in templates:
            yield f"{entry} names {spec.get(entry)}, which is no template"
    if len(templates) != len(spec["templates"]):
        yield "two templates have one name"
    for name, part in templates.items():
        known = declared | {f"inputs.parameters.{key}" for key in parameters(part)}
        if "dag" in part:
            yield from _dag(name, part["dag"]["tasks"], templates, known)
        else:
            yield from (f"{name}: {{{{{key}}}}} is declared nowhere" for key in placeholders(part) - known)
    if cycle := _cycle({name: [task["template"] for task in part.get("dag", {}).get("tasks", ())]
                        for name, part in templates.items()}):
        yield f"templates call each other in a circle: {cycle}"
    reached = {spec["entrypoint"], spec["onExit"]} | {
        task["template"] for part in templates.values() for task in part.get("dag", {}).get("tasks", ())}
    yield from (f"nobody calls the template {name}" for name in templates.keys() - reached)


def _dag(name: str, tasks: list[Json], templates: Mapping[str, Json], known: set[str]) -> Iterator[str]:
    after = {task["name"]: needed(task) for task in tasks}
    if len(after) != len(tasks):
        yield f"{name}: two tasks have one name"
    for task in tasks:
        here = f"{name}.{task['name']}"
        yield from (f"{here} waits for {other}, which is no task" for other in after[task["name"]] - after.keys())
        target = templates.get(task["template"])
        if target is None:
            yield f"{here} calls {task['template']}, which is no template"
            continue
        given, asked = parameters(task, "arguments"), parameters(target)
        yield from (f"{here} gives {key}, which {target['name']} does not take" for key in given.keys() - asked.keys())
        yield from (f"{here} does not give {key}" for key, one in asked.items()
                    if key not in given and "value" not in one and "default" not in one)
        fans = "withParam" in task or "withItems" in task
        earlier = _earlier(task["name"], after)
        for key in placeholders(task) - known - ({"item"} if fans else set()):
            match = re.fullmatch(r"tasks\.([\w-]+)\.outputs\.parameters\.([\w-]+)", key)
            source = next((one for one in tasks if match and one["name"] == match[1]), None)
            if source is None:
                yield f"{here}: {{{{{key}}}}} is declared nowhere"
            elif match and match[1] not in earlier:
                yield f"{here} reads {key} and does not wait for {match[1]}"
            elif match and match[2] not in parameters(templates[source["template"]], "outputs"):
                yield f"{here}: {source['template']} has no output {match[2]}"
    if cycle := _cycle({key: sorted(others) for key, others in after.items()}):
        yield f"{name}: tasks wait for each other in a circle: {cycle}"


def needed(task: Json) -> set[str]:
    return set(re.findall(r"([\w-]+)(?:\.\w+)?", task.get("depends", ""))) - {"", "&&", "||"}


def _earlier(task: str, after: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    new = set(after[task])
    while new:
        found |= new
        new = set().union(*(after.get(name, set()) for name in new)) - found
    return found


def _cycle(after: Mapping[str, list[str]]) -> str | None:
    def walk(name: str, path: tuple[str, ...]) -> str | None:
        if name in path:
            return " -> ".join((*path, name))
        return next(filter(None, (walk(other, (*path, name)) for other in after.get(name, ()))), None)

    return next(filter(None, (walk(name, ()) for name in after)), None)


# -- the runner, which is not Argo ---------------------------------------------------------------------------------

@dataclass
class Node:
    """How a task ended."""

    status: str = "Succeeded"
    outputs: dict[str, str] = field(default_factory=dict)
    items: tuple["Node", ...] = ()

    def holds(self, condition: str) -> bool:
        if condition == "AnySucceeded":
            return any(item.status == "Succeeded" for item in self.items)
        return self.status == condition


Run = Callable[[list[str], Json, Path], int]  # words, container, the folder behind OUT -> exit code


@dataclass
class Runner:
    """Runs a WorkflowTemplate: `run` starts a container, and is given the folder that stands for /tmp/stage."""

    template: Json
    run: Run
    folder: Path
    name: str = "dreambooth-test"
    given: dict[str, str] = field(default_factory=dict)
    ran: list[tuple[str, list[str], int]] = field(default_factory=list)  # template, words, exit code of each container
    failed: list[Json] = field(default_factory=list)

    def __call__(self) -> str:
        """To the end, exit handler included; the workflow's status."""
        spec = self.template["spec"]
        values = {f"workflow.parameters.{key}": one["value"] for key, one in parameters(spec, "arguments").items()}
        values |= {f"workflow.parameters.{key}": value for key, value in self.given.items()}
        values["workflow.name"] = self.name
        node = self._template(spec["entrypoint"], values, {}, self.name)
        values |= {"workflow.status": node.status, "workflow.failures": json.dumps(self.failed)}
        self._template(spec["onExit"], values, {}, f"{self.name}.onExit")
        return node.status

    def _template(self, name: str, values: Mapping[str, str], inputs: Mapping[str, str], label: str) -> Node:
        part = named(self.template["spec"]["templates"])[name]
        known = {key: value for key, value in values.items() if key.startswith("workflow.")} | {
            f"inputs.parameters.{key}": value for key, value in inputs.items()}
        return self._dag(part["dag"]["tasks"], known, label) if "dag" in part else self._container(part, known, label)

    def _dag(self, tasks: list[Json], values: dict[str, str], label: str) -> Node:
        nodes: dict[str, Node] = {}
        waiting = list(tasks)
        while waiting:
            task = next(one for one in waiting if needed(one) <= nodes.keys())
            waiting.remove(task)
            if not self._due(task, nodes):
                nodes[task["name"]] = Node("Omitted")
                continue
            known = values | {f"tasks.{name}.outputs.parameters.{key}": value
                              for name, node in nodes.items() for key, value in node.outputs.items()}
            if "withParam" in task:
                items = tuple(self._call(task, known | {"item": item}, f"{label}.{task['name']}({number})")
                              for number, item in enumerate(json.loads(filled(task["withParam"], known))))
                good = all(item.status == "Succeeded" for item in items)
                nodes[task["name"]] = Node("Succeeded" if good else "Failed", items=items)
            else:
                nodes[task["name"]] = self._call(task, known, f"{label}.{task['name']}")
        last = {task["name"] for task in tasks} - {name for task in tasks for name in needed(task)}
        good = all(nodes[name].status == "Succeeded" for name in last)
        return Node("Succeeded" if good else "Failed")

    @staticmethod
    def _due(task: Json, nodes: Mapping[str, Node]) -> bool:
        conditions = re.findall(r"([\w-]+)\.(\w+)", task.get("depends", ""))
        return all(nodes[name].holds(condition) for name, condition in conditions)

    def _call(self, task: Json, values: Mapping[str, str], label: str) -> Node:
        given = {key: filled(one["value"], values) for key, one in parameters(task, "arguments").items()}
        return self._template(task["template"], values, given, label)

    def _container(self, part: Json, values: Mapping[str, str], label: str) -> Node:
        container, tries = part["container"], 0
        words = [filled(word, values) for word in (*container["command"], *container["args"])]
        made = container | {"image": filled(container["image"], values)}
        while True:
            out = self.folder / "out" / f"{label}-{tries}"
            out.mkdir(parents=True)
            out.chmod(0o777)
            code = self.run(words, made, out)
            self.ran.append((part["name"], words, code))
            if code == 0 or not again(part, code, tries):
                break
            tries += 1
        if code:
            self.failed.append({"displayName": label, "templateName": part["name"],
                                "message": f"Error (exit code {code})"})
            return Node("Failed")
        outputs = {}
        for key, one in parameters(part, "outputs").items():
            outputs[key] = (out / Path(one["valueFrom"]["path"]).name).read_text("utf-8")
        for one in part.get("outputs", {}).get("artifacts", ()):
            source = out / Path(one["path"]).name
            assert source.is_file() or one.get("optional"), f"{label} made no {one['name']}"
            if source.is_file():
                kept = self.folder / "artifacts" / label
                kept.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, kept / source.name)
        return Node("Succeeded", outputs)


def filled(text: str, values: Mapping[str, str]) -> str:
    return PLACEHOLDER.sub(lambda match: str(values[match[1].strip()]), text)


def again(part: Json, code: int, tries: int, status: str = "Failed", after: float = 0.0) -> bool:
    """What a retryStrategy says of a container that ended so, by its own expression.

    Args:
        after: seconds since the first try began, which is what Argo holds against maxDuration.
    """
    strategy = part.get("retryStrategy")
    if strategy is None or tries >= int(strategy["limit"]):
        return False
    limit = re.fullmatch(r"(\d+)([smhd]?)", strategy["backoff"].get("maxDuration", ""))
    if limit and after > int(limit[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[limit[2]]:
        return False
    text = strategy["expression"].replace("||", " or ").replace("lastRetry.status", repr(status))
    return bool(eval(text.replace("asInt(lastRetry.exitCode)", str(code)), {"__builtins__": {}}))
