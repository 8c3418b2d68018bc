"""megamoe: pretraining of Mixture-of-Experts decoders on DeepSpeed.

From Python, with their documentation in `library.py` and where they are defined:

    load_preset, ModelConfig          what a model is
    build_model, load_model           a model: new, or from a run, a checkpoint, an export, an open model
    load_tokenizer                    its tokenizer
    save_state_dict                   its weights as one file of plain tensors, which torch.load opens
    generate, evaluate                text from it, its loss on a text
    init_distributed                  join the ranks of a launcher, or be a single one
    build_trainer, train_step, Batch  a DeepSpeed engine with balanced experts, and one step of it
    UserError                         what all of them raise for what the user can change
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PLACES = {
    "ModelConfig": "config.model",
    "UserError": "utils.errors",
    "Batch": "data.batches",
    "init_distributed": "launch.distributed",
    **dict.fromkeys(
        ("load_preset", "build_model", "load_model", "load_tokenizer", "save_state_dict", "generate", "evaluate",
         "build_trainer", "train_step"),
        "library",
    ),
}  # fmt: skip
__all__ = ["__version__", *_PLACES]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    """Import a name when it is asked for: torch and DeepSpeed take seconds, and a launcher needs the version alone."""
    if name not in _PLACES:
        raise AttributeError(f"megamoe has no {name}; it has {', '.join(_PLACES)}")
    return getattr(import_module(f"megamoe.{_PLACES[name]}"), name)
