"""A saved plan and the transformers model that takes it: the layers' names there, and the bytes of what is there."""

from transformers import PreTrainedModel

from hf_lossless.compression import tensor_bytes
from hf_lossless.errors import PlanError
from hf_lossless.storage.modules.base import CompressedModule
from hf_lossless.storage.plan import CompressionPlan, LayerPlan, activations_of


def plans_for(model: PreTrainedModel, layer_plans: dict[str, LayerPlan]) -> dict[str, LayerPlan]:
    """A saved plan under this model's names, which lack or have the base model's prefix where the saved ones do not.

    A head that the plan names and this model does not have (AutoModel of a classifier's checkpoint), or a pooler, is
    passed over, but not where the model is of the very class that was saved.

    Raises:
        PlanError: A layer of a model of the saved class is not there, or none of another class.
    """
    names = {name for name, _ in model.named_modules()}
    prefix = f"{model.base_model_prefix}."

    def local(name: str) -> str | None:
        return next((form for form in (name, prefix + name, name.removeprefix(prefix)) if form in names), None)

    found, missing = {}, []
    for name, layer_plan in layer_plans.items():
        own_name = local(name)
        if own_name is None:
            missing.append(name)
            continue
        tied = tuple(form for form in map(local, layer_plan.tied) if form is not None)
        found[own_name] = layer_plan.model_copy(update={"tied": tied})
    if missing and (is_saved_class(model) or not found):
        raise PlanError(
            f"the plan names the layer {missing[0]!r}, which {type(model).__name__} does not have. "
            f"Load the checkpoint with the class that saved it: {model.config.architectures}."
        )
    return found


def plan_of(model: PreTrainedModel, saved: CompressionPlan) -> CompressionPlan:
    """A saved plan as it stands in a loaded model: under the model's names, with its bytes.

    A model that took only a part of what was saved (AutoModel of a classifier's checkpoint) can so be saved in turn.
    Its `original_bytes` are those of that part, in the dtype it was loaded in.
    """
    layers = plans_for(model, saved.layers)
    plan = saved.model_copy(update={"layers": layers, "activations": activations_of(layers)})
    plan = with_present_bytes(model, plan)
    if is_saved_class(model):
        return plan
    original_bytes = plan.tensor_bytes
    for name, layer_plan in plan.layers.items():
        module = model.get_submodule(name)
        if isinstance(module, CompressedModule):
            original_bytes += module.weight_shape.numel() * module.dtype.itemsize - layer_plan.cost_bytes
    return plan.model_copy(update={"original_bytes": original_bytes})


def with_present_bytes(model: PreTrainedModel, plan: CompressionPlan) -> CompressionPlan:
    """A plan of this model with the bytes of its tensors as they are now; a cast changes what is in floating point."""
    layers = {}
    for name, layer_plan in plan.layers.items():
        module = model.get_submodule(name)
        cost_bytes = module.weight_bytes if isinstance(module, CompressedModule) else module.weight.nbytes
        layers[name] = layer_plan.model_copy(update={"cost_bytes": cost_bytes})
    other_bytes = tensor_bytes(model) - sum(layer_plan.cost_bytes for layer_plan in layers.values())
    return plan.model_copy(update={"layers": layers, "other_bytes": other_bytes})


def is_saved_class(model: PreTrainedModel) -> bool:
    """Whether a model is of the class that was saved, and so must find everything that was saved."""
    return type(model).__name__ in (model.config.architectures or ())
