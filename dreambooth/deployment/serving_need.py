"""Asks the planner what drawing with a model needs on a machine. Only this file of the folder imports torch.

Importing this file does not import torch.
"""

from dataclasses import replace
from importlib.util import find_spec

from dreambooth.config.hardware import Hardware
from dreambooth.deployment.endpoint_requests import OPTION_PREFIX
from dreambooth.deployment.instances import Need, Predict
from dreambooth.deployment.model_artifact import DeployedModel
from dreambooth.deployment.options import Deploy
from dreambooth.errors import UserError

DEFAULT_BATCH = 4  # max_batch of the server


def predict_with_planner(model: DeployedModel, options: Deploy) -> Predict:
    """Return a function that predicts what drawing with a model needs on a machine.

    The function returns None if torch is not installed here, or if the architecture of the model is not known.
    """
    source = model.source
    if source is None or find_spec("torch") is None:
        return lambda hardware: None
    width, height = map(int, options.size.split("x")) if options.size else (0, 0)
    batch = int(options.environment.get(f"{OPTION_PREFIX}MAX_BATCH", DEFAULT_BATCH))

    def predict(hardware: Hardware) -> Need | None:
        from dreambooth.models.loading import import_libraries

        import_libraries()  # without their warnings
        from dreambooth.planner.serving_plan import model_of_source, plan_serving

        served = model_of_source(source, batch, (height, width) if options.size else None)
        try:
            plan = plan_serving(replace(served, adapter_bytes=served.adapter_bytes + model.adapter_bytes), hardware)
        except UserError:
            return None
        return Need(plan.peak_gib, plan.seconds_per_picture, plan.host_gib, tuple(plan.memory.names), plan.memory.exact)

    return predict
