"""SmolVLA, a vision-language-action policy in torch and transformers that shares LeRobot's checkpoints."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration import SmolVLAConfig
    from .modeling import SmolVLAPolicy
    from .policy_loader import PolicyLoader, get_data_collator, get_data_processor, load_model
    from .processing import SmolVLAProcessor, data_collator
    from .trainer import SmolVLATrainer, create_smolvla_trainer

__all__ = [
    "PolicyLoader",
    "SmolVLAConfig",
    "SmolVLAPolicy",
    "SmolVLAProcessor",
    "SmolVLATrainer",
    "create_smolvla_trainer",
    "data_collator",
    "get_data_collator",
    "get_data_processor",
    "load_model",
]

HOMES = {
    "SmolVLAConfig": "configuration",
    "SmolVLAPolicy": "modeling",
    "SmolVLAProcessor": "processing",
    "data_collator": "processing",
    "PolicyLoader": "policy_loader",
    "load_model": "policy_loader",
    "get_data_processor": "policy_loader",
    "get_data_collator": "policy_loader",
    "SmolVLATrainer": "trainer",
    "create_smolvla_trainer": "trainer",
}


def __getattr__(name: str) -> Any:
    """Import on first use: a process that only prepares data must not wait for the model's libraries."""
    if name in HOMES:
        return getattr(importlib.import_module(f".{HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
