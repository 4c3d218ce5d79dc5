"""Asks the planner what drawing with a model needs on a machine. Only this file of the folder imports torch.

Importing this file does not import torch.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from importlib.util import find_spec

from dreambooth.config.compose import read_options
from dreambooth.config.hardware import Hardware
from dreambooth.container.hosting import PREFIX, SECRETS
from dreambooth.deployment.instances import Need, Predict
from dreambooth.deployment.model_artifact import DeployedModel
from dreambooth.deployment.options import Deploy
from dreambooth.errors import ConfigError, UserError
from dreambooth.models.inference_memory import read_memory
from dreambooth.serving.options import Serve


def read_server_options(environment: Mapping[str, str]) -> Serve:
    """Return the options that environment variables DREAMBOOTH_SERVE_KEY give to the server in the container.

    Raises:
        ConfigError: the server would refuse an option, or has no such option; one line per problem.
    """
    words = {variable: f"{variable.removeprefix(PREFIX).lower()}={value}"
             for variable, value in environment.items()
             if variable.startswith(PREFIX) and variable not in SECRETS and value}
    known = {PREFIX + item.name.upper() for item in fields(Serve)}
    if unknown := sorted(words.keys() - known):
        raise ConfigError(*(f"+environment.{variable} sets no option of the server: see conf/serve.yaml"
                            for variable in unknown))
    try:
        return read_options([*words.values()], Serve)
    except UserError as error:
        lines = [(f"{PREFIX}{line.partition(' ')[0].upper()}", line) for line in str(error).splitlines()]
        raise ConfigError(*(f"+environment.{variable}: {line}" if variable in words else f"+environment: {line}"
                            for variable, line in lines)) from error


def predict_with_planner(model: DeployedModel, options: Deploy) -> Predict:
    """Return a function that predicts what drawing with a model needs on a machine.

    The function returns None if torch is not installed here, or if the architecture of the model is not known.
    """
    source = model.source
    if source is None or find_spec("torch") is None:
        return lambda hardware: None
    size = None if options.sides is None else options.sides[::-1]  # height and width
    server = read_server_options(options.environment)
    adapter_bytes = model.adapter_bytes + sum(model.other_adapters[:server.max_adapters])

    def predict(hardware: Hardware) -> Need | None:
        from dreambooth.models.loading import import_libraries

        import_libraries()  # without their warnings
        from dreambooth.planner.serving_plan import model_of_source, plan_serving

        served = model_of_source(source, server.max_batch, size)
        served = replace(served, adapter_bytes=served.adapter_bytes + adapter_bytes)
        try:
            plan = plan_serving(served, hardware, read_memory(server.memory_options))
        except UserError:
            return None
        return Need(plan.peak_gib, plan.seconds_per_picture, plan.host_gib, tuple(plan.memory.names), plan.memory.exact)

    return predict
