"""The files in mlflow/: valid manifests and Compose file, matching pins, an entrypoint that leaks no secret."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.tools import tool

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "mlflow"
MANIFESTS = sorted(path for path in (FOLDER / "kubernetes").glob("*.yaml") if path.name != "kustomization.yaml")
KUBERNETES = "1.33"


def objects() -> list[dict[str, Any]]:
    return [item for path in MANIFESTS for item in yaml.safe_load_all(path.read_text("utf-8"))]


def named(kind: str, name: str) -> dict[str, Any]:
    [match] = [item for item in objects() if (item["kind"], item["metadata"]["name"]) == (kind, name)]
    return match


def is_invalid(item: dict[str, Any]) -> bool:
    import kubernetes_validate

    try:
        kubernetes_validate.validate(item, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError:
        return True
    return False


def test_every_object_is_valid() -> None:
    assert [item["metadata"]["name"] for item in objects() if is_invalid(item)] == []


def test_a_misspelt_key_is_found() -> None:
    deployment = named("Deployment", "mlflow")
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    assert is_invalid(deployment)


def test_the_kustomization_names_every_manifest() -> None:
    kustomization = yaml.safe_load((FOLDER / "kubernetes/kustomization.yaml").read_text("utf-8"))
    assert sorted(kustomization["resources"]) == [path.name for path in MANIFESTS]
    assert kustomization["secretGenerator"] == [{"name": "mlflow", "envs": ["server.env"]}]


@pytest.mark.parametrize("kind, name", [("Deployment", "mlflow"), ("StatefulSet", "database")])
def test_pods_satisfy_the_restricted_standard(kind: str, name: str) -> None:
    pod = named(kind, name)["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    assert pod["automountServiceAccountToken"] is False
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
        assert container["readinessProbe"] and container["livenessProbe"] and container["resources"]["limits"]


def test_selectors_and_references_match_an_object() -> None:
    for item in objects():
        spec = item.get("spec", {})
        if item["kind"] in ("Deployment", "StatefulSet"):
            assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
            pod = spec["template"]["spec"]
            volumes = {volume["name"] for volume in pod["volumes"]} | {
                claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", ())}
            assert {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]} == volumes
    templates = [item["spec"]["template"] for item in objects() if "template" in item.get("spec", {})]
    labels = [template["metadata"]["labels"] for template in templates]
    assert all(item["spec"]["selector"] in labels for item in objects() if item["kind"] == "Service")
    assert named("NetworkPolicy", "database")["spec"]["podSelector"]["matchLabels"] in labels
    example = (FOLDER / "server.env.example").read_text("utf-8")
    keys = re.findall(r"key: (\w+)", (FOLDER / "kubernetes/database.yaml").read_text("utf-8"))
    assert keys and all(f"\n{key}=" in example for key in keys)


def test_the_compose_file_is_valid(tmp_path: Path) -> None:
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text("utf-8"))
    server = compose["services"]["mlflow"]
    assert server["read_only"] and server["cap_drop"] == ["ALL"] and "healthcheck" in server
    assert server["ports"] == ["127.0.0.1:5000:5000"]
    if not (docker_compose := shutil.which("docker-compose")):
        pytest.skip("docker-compose is not installed")
    shutil.copytree(FOLDER, tmp_path / "mlflow")
    (tmp_path / "mlflow/server.env").write_text("PGPASSWORD=x\n")
    words = [docker_compose, "--env-file", "server.env", "config", "--quiet"]
    result = subprocess.run(words, cwd=tmp_path / "mlflow", capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (tmp_path / "mlflow/server.env").write_text("PGPASSWORD=\n")
    result = subprocess.run(words, cwd=tmp_path / "mlflow", capture_output=True, text=True, check=False)
    assert result.returncode != 0 and "fill in server.env" in result.stderr


def test_pins_are_those_of_the_project() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if "==" in line)
    server_pins = dict(line.split("==") for line in (FOLDER / "requirements.txt").read_text("utf-8").splitlines()
                       if "==" in line)
    assert server_pins == {name: pins[name] for name in ("boto3", "flask-wtf", "mlflow", "psycopg2-binary")}
    kustomization = yaml.safe_load((FOLDER / "kubernetes/kustomization.yaml").read_text("utf-8"))
    assert kustomization["images"][0]["newTag"] == pins["mlflow"]
    assert f"dreambooth-mlflow:{pins['mlflow']}" in (FOLDER / "compose.yaml").read_text("utf-8")
    tags = set(re.findall(r"image: (postgres:\S+)", "\n".join(
        path.read_text("utf-8") for path in (FOLDER / "compose.yaml", FOLDER / "kubernetes/database.yaml"))))
    assert len(tags) == 1


@pytest.mark.parametrize("words", [["hadolint", "mlflow/Dockerfile"], ["shellcheck", "mlflow/entrypoint"]])
def test_dockerfile_and_entrypoint_pass_lint(words: list[str]) -> None:
    result = subprocess.run([tool(words[0]), *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_the_image_does_not_run_as_root_and_has_a_health_check() -> None:
    text = (FOLDER / "Dockerfile").read_text("utf-8")
    assert re.search(r"^USER 10001:10001$", text, re.M) and "HEALTHCHECK" in text


ENVIRONMENT = {"PGHOST": "db", "PGPASSWORD": "the-password", "MLFLOW_FLASK_SERVER_SECRET_KEY": "s",
               "MLFLOW_AUTH_ADMIN_PASSWORD": "a", "MLFLOW_ARTIFACTS": "s3://b/f"}


def entrypoint(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the entrypoint with a fake `mlflow` that prints its arguments, its configuration and that file's mode."""
    fake = folder / "mlflow"
    fake.write_text('#!/bin/sh\necho "$@"\ncat "$MLFLOW_AUTH_CONFIG_PATH"\nstat -c %a "$MLFLOW_AUTH_CONFIG_PATH"\n')
    fake.chmod(0o755)
    return subprocess.run([FOLDER / "entrypoint"], capture_output=True, text=True, check=False,
                          env=environment | {"PATH": f"{folder}:{os.environ['PATH']}", "TMPDIR": str(folder)})


def test_the_entrypoint_turns_basic_auth_on_and_writes_no_password(tmp_path: Path) -> None:
    output = entrypoint(tmp_path, **ENVIRONMENT).stdout
    assert "server --app-name basic-auth --backend-store-uri postgresql+psycopg2:// " in output
    assert "--artifacts-destination s3://b/f" in output and "the-password" not in output
    assert output.endswith("\n600\n")
    assert "default_permission = EDIT" in output, "a second user must be able to add runs to the first one's experiment"
    assert "\nMLFLOW_DEFAULT_PERMISSION=EDIT\n" in (FOLDER / "server.env.example").read_text("utf-8")
    direct = entrypoint(tmp_path, **ENVIRONMENT, MLFLOW_ARTIFACT_ACCESS="direct").stdout
    assert "--no-serve-artifacts --default-artifact-root s3://b/f" in direct


def test_the_variables_of_its_own_service_do_not_reach_the_server(tmp_path: Path) -> None:
    """Kubernetes sets NAME_PORT=tcp://ADDRESS:PORT for every service in each pod; here a service is called mlflow."""
    assert named("Service", "mlflow")
    assert named("Deployment", "mlflow")["spec"]["template"]["spec"]["enableServiceLinks"] is False
    linked = entrypoint(tmp_path, **ENVIRONMENT, MLFLOW_PORT="tcp://203.0.113.7:5000").stdout
    assert " --port 5000 " in linked and "tcp:" not in linked
    assert " --port 5001 " in entrypoint(tmp_path, **ENVIRONMENT, MLFLOW_LISTEN_PORT="5001").stdout


@pytest.mark.parametrize("missing", sorted(ENVIRONMENT))
def test_the_entrypoint_says_what_is_missing(tmp_path: Path, missing: str) -> None:
    result = entrypoint(tmp_path, **{name: value for name, value in ENVIRONMENT.items() if name != missing})
    assert result.returncode == 1 and result.stderr.startswith(f"mlflow-entrypoint: {missing} is not set: ")
