"""Credentials that a job takes from AWS Secrets Manager: its request, which many may read, holds only the name."""

import json
import os

from dreambooth import storage
from dreambooth.bucket import calling
from dreambooth.errors import UserError

NAME = "DREAMBOOTH_SECRET"
FIELDS = {"username": "MLFLOW_TRACKING_USERNAME", "password": "MLFLOW_TRACKING_PASSWORD",
          "token": "MLFLOW_TRACKING_TOKEN"}


def load() -> None:
    """Put the fields of the secret that DREAMBOOTH_SECRET names, if it names one, into this process's environment."""
    name = os.environ.get(NAME)
    if not name:
        return
    client = storage.client("secretsmanager")
    text = calling(lambda: client.get_secret_value(SecretId=name), "secretsmanager:GetSecretValue", name)
    try:
        found = {FIELDS[key]: str(value) for key, value in json.loads(text["SecretString"]).items()}
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"the secret {name} must be a JSON object with {', '.join(FIELDS)}, any of them: "
                        "change it in AWS Secrets Manager") from error
    for key, value in found.items():
        os.environ.setdefault(key, value)
