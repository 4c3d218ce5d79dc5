"""Command `python -m dreambooth.serving`: serves the model in /opt/ml/model. The image runs it for `serve`."""

import os
import sys
from dataclasses import fields

from dreambooth import serve
from dreambooth.container.hosting import serving_overrides
from dreambooth.container.sagemaker_paths import SageMakerPaths
from dreambooth.serving.options import Serve

if __name__ == "__main__":
    sys.argv[1:] = serving_overrides(SageMakerPaths.from_environment(), sys.argv[1:], os.environ,
                                     [field.name for field in fields(Serve)])
    serve.main()
