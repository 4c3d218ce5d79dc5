"""Credentials that a job takes from AWS Secrets Manager: its request, which many may read, holds only the name."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from dreambooth.errors import UserError
from dreambooth.storage import folders
from dreambooth.storage.s3_bucket import calling

NAME = "DREAMBOOTH_SECRET"
FIELDS = {"username": "MLFLOW_TRACKING_USERNAME", "password": "MLFLOW_TRACKING_PASSWORD",
          "token": "MLFLOW_TRACKING_TOKEN"}
KEYS = re.compile(r"(?i)password|passwd|secret|token(?!i[sz])|(api|access|private|auth)_?key|credential")
VALUES = re.compile(  # a login in an address, a word of its query, tokens that are known by how they begin
    r"://[^/\s:@]*:[^/\s]+@|https?://[^/\s]+@|(?i:password|passwd|secret|token|api_?key|signature)=."
    r"|\bA[KS]IA[0-9A-Z]{16}|\bhf_\w{20}|\bgh[opsu]_\w{20}|\bgithub_pat_|\bglpat-|\bxox[abp]-|\bsk-[\w-]{20}|\bdapi[0-9a-f]{32}"
    r"|-----BEGIN ")
NAMES = re.compile(r"(arn:aws[a-z-]*:secretsmanager:[a-z0-9-]+:\d{12}:secret:)?[A-Za-z0-9/_+=.@-]{1,512}")


def found_in(request: Mapping[str, Any]) -> Iterator[str]:
    """What looks like a credential in the request of a job, a sentence each that does not repeat it: SageMaker shows
    the whole request to who may describe the job."""
    environment = dict(request["Environment"])
    name = environment.pop(NAME, None)
    if name is not None and (not NAMES.fullmatch(name) or VALUES.search(name)):
        yield ("hydra.launcher.mlflow_secret is no name: keep the login in AWS Secrets Manager and type that secret's "
               "name or ARN")
    texts = [*((f"hyperparameter {key}", key, value) for key, value in request["HyperParameters"].items()),
             *((f"environment {key}", key, value) for key, value in environment.items()),
             *((f"tag {tag['Key']}", tag["Key"], tag["Value"]) for tag in request["Tags"])]
    for where, key, value in texts:
        if KEYS.search(key) or VALUES.search(str(value)):
            yield (f"{where} looks like a credential: leave it out; a login to MLflow goes into AWS Secrets Manager, "
                   "then type hydra.launcher.mlflow_secret=NAME")


def load() -> None:
    """Put the fields of the secret that DREAMBOOTH_SECRET names, if it names one, into this process's environment."""
    name = os.environ.get(NAME)
    if not name:
        return
    client = folders.client("secretsmanager")
    text = calling(lambda: client.get_secret_value(SecretId=name), "secretsmanager:GetSecretValue", name)
    try:
        found = {FIELDS[key]: str(value) for key, value in json.loads(text["SecretString"]).items()}
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"the secret {name} must be a JSON object with {', '.join(FIELDS)}, any of them: "
                        "change it in AWS Secrets Manager") from error
    for key, value in found.items():
        os.environ.setdefault(key, value)
