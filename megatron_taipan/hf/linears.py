"""The weight matrices as `nn.Linear` modules, which adapters, quantisers and offloading look for, and their names.

In files a matrix keeps the name that the trainer gives it (`layers.0.mixer.in_proj_z`), so every reader of exports
reads a tuned model too; a loaded model has `layers.0.mixer.in_proj_z.weight`. transformers renames both ways.
"""

from torch import nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

MIXER = ("in_proj_z", "in_proj_x", "in_proj_B", "in_proj_C", "in_proj_dt", "out_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
MATRICES = frozenset(MIXER + ATTENTION + MLP)  # last parts of names in the table (parameters.py)


def hold_in_linears(network: nn.Module) -> None:
    """Puts an `nn.Linear` that holds the same parameter in the place of every matrix that multiplies tokens."""
    for owner in list(network.modules()):
        for name, weight in list(owner.named_parameters(recurse=False)):
            if name not in MATRICES:
                continue
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = weight
            delattr(owner, name)
            owner.add_module(name, linear)


def table_name(name: str) -> str:
    """What the table (parameters.py) calls a parameter of the transformers classes."""
    if name == "lm_head.weight":
        return "head.weight"
    name = name.removeprefix("model.")
    owner, _, last = name.rpartition(".")
    return owner if last == "weight" and owner.rpartition(".")[2] in MATRICES else name


def register_names(model_type: str) -> None:
    """Registers with transformers how names in files differ from those in a model, for loading and for saving.

    A pattern is searched for in the name; `(?!.)`, its end, is what transformers takes away to turn a renaming round.
    """
    matrices = [WeightRenaming(f"{name}(?!.)", f"{name}.weight") for name in sorted(MATRICES)]
    head = WeightRenaming("model.head.weight", "lm_head.weight")
    register_checkpoint_conversion_mapping(model_type, [*matrices, head], overwrite=True)
