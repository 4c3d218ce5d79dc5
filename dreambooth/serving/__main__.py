"""Command `python -m dreambooth.serving`: serves the model in /opt/ml/model. The image runs it for `serve`."""

import os
import sys
from dataclasses import fields

from dreambooth import cli, serve
from dreambooth.cloud import secrets
from dreambooth.container.hosting import serving_overrides
from dreambooth.container.sagemaker_paths import SageMakerPaths
from dreambooth.serving.options import Serve

if __name__ == "__main__":
    cli.run_job(secrets.load, sweep=False)  # a token of the Hugging Face hub, if DREAMBOOTH_SECRET names a secret
    if cli.last_failure():
        cli.exit_process()
    sys.argv[1:] = serving_overrides(SageMakerPaths.from_environment(), sys.argv[1:], os.environ,
                                     [field.name for field in fields(Serve)])
    serve.main()
