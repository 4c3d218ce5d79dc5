"""Keeps credentials out of the requests that start jobs. A running job loads credentials from AWS Secrets Manager.

A request can be read by many users. A request therefore contains only the name of a secret.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from dreambooth.errors import UserError
from dreambooth.storage import folders
from dreambooth.storage.s3_bucket import call_with_retries

SECRET_VARIABLE = "DREAMBOOTH_SECRET"
LOGIN_VARIABLES = {  # field of the secret -> environment variable; hf_token is a token of the Hugging Face hub
    "username": "MLFLOW_TRACKING_USERNAME", "password": "MLFLOW_TRACKING_PASSWORD", "token": "MLFLOW_TRACKING_TOKEN",
    "hf_token": "HF_TOKEN", "wandb_api_key": "WANDB_API_KEY"}
CREDENTIAL_KEY = re.compile(r"(?i)password|passwd|secret|token(?!i[sz])|(api|access|private|auth)_?key|credential")
CREDENTIAL_VALUE = re.compile(  # a login in a URL or in its query string, and tokens with a known prefix
    r"://[^/\s:@]*:[^/\s]+@|https?://[^/\s]+@|(?i:password|passwd|secret|token|api_?key|signature)=."
    r"|\bA[KS]IA[0-9A-Z]{16}|\bhf_\w{20}|\bgh[opsu]_\w{20}|\bgithub_pat_|\bglpat-|\bxox[abp]-|\bsk-[\w-]{20}|\bdapi[0-9a-f]{32}"
    r"|-----BEGIN ")
SECRET_NAME = re.compile(r"(arn:aws[a-z-]*:secretsmanager:[a-z0-9-]+:\d{12}:secret:)?[A-Za-z0-9/_+=.@-]{1,512}")


def find_credentials(request: Mapping[str, Any], option: str = "hydra.launcher.mlflow_secret") -> Iterator[str]:
    """Yield one sentence for each value of a request that looks like a credential, without showing the value.

    SageMaker shows the whole request to every user who has permission to describe the job.

    Args:
        option: the option that takes the name of the secret, for the sentences.
    """
    environment = dict(request["Environment"])
    name = environment.pop(SECRET_VARIABLE, None)
    if name is not None and (not SECRET_NAME.fullmatch(name) or CREDENTIAL_VALUE.search(name)):
        yield (f"{option} is not the name of a secret: keep the login in AWS Secrets Manager and type that secret's "
               "name or ARN")
    values = [*((f"hyperparameter {key}", key, value) for key, value in request["HyperParameters"].items()),
              *((f"environment {key}", key, value) for key, value in environment.items()),
              *((f"tag {tag['Key']}", tag["Key"], tag["Value"]) for tag in request["Tags"])]
    for description, key, value in values:
        if CREDENTIAL_KEY.search(key) or CREDENTIAL_VALUE.search(str(value)):
            yield (f"{description} looks like a credential: leave it out; logins to MLflow and to the Hugging Face hub "
                   f"go into a secret in AWS Secrets Manager ({', '.join(LOGIN_VARIABLES)}), then type "
                   f"{option}=NAME")


def load() -> None:
    """Set the login variables from the secret whose name or ARN is in the environment variable DREAMBOOTH_SECRET.

    The login variables are the environment variables in LOGIN_VARIABLES. Variables that are already set keep their
    values. Do nothing if DREAMBOOTH_SECRET is not set.

    Raises:
        UserError: the secret cannot be read, is not a JSON object, or has a field that is not in LOGIN_VARIABLES.
    """
    name = os.environ.get(SECRET_VARIABLE)
    if not name:
        return
    # The region is that of the secret; an ARN is arn:PARTITION:secretsmanager:REGION:ACCOUNT:secret:NAME.
    client = folders.client("secretsmanager", region=name.split(":")[3] if name.count(":") > 3 else None)
    response = call_with_retries(
        lambda: client.get_secret_value(SecretId=name), "secretsmanager:GetSecretValue", name)
    try:
        variables = {LOGIN_VARIABLES[key]: str(value) for key, value in json.loads(response["SecretString"]).items()}
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"the secret {name} must be a JSON object with {', '.join(LOGIN_VARIABLES)}, any of them: "
                        "change it in AWS Secrets Manager") from error
    for key, value in variables.items():
        os.environ.setdefault(key, value)
