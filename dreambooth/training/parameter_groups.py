"""The parameter groups of a run: trained weights with another learning rate than train.learning_rate."""

from dreambooth.config.recipe import Recipe
from dreambooth.models.loading import TrainedModel
from dreambooth.models.new_tokens import training as new_tokens
from dreambooth.optim.memory_levers import Group


def parameter_groups(model: TrainedModel, recipe: Recipe) -> list[Group]:
    """Return the groups that follow the group of all other weights.

    They are the weights of the text encoders with train.text_encoder_learning_rate, and the embeddings of new tokens.

    Args:
        model: its trained parameters have requires_grad.
    """
    rate = recipe.train.text_encoder_learning_rate
    encoders = [name for name, parameter in model.named_parameters() if parameter.requires_grad
                and name.partition(".")[0] in model.encoder_names and name not in model.new_rows]
    groups = [Group(encoders, {"lr": rate, "part": "text_encoder"})] if rate is not None and encoders else []
    return groups + ([Group(list(model.new_rows), new_tokens.optimizer_options(recipe))] if model.new_rows else [])
