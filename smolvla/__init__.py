"""SmolVLA, a vision-language-action policy in torch and transformers that shares LeRobot's checkpoints."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration import SmolVLAConfig
    from .modeling import SmolVLAPolicy

__all__ = ["SmolVLAConfig", "SmolVLAPolicy"]


def __getattr__(name: str) -> Any:
    """Import on first use: a process that only prepares data must not wait for the model's libraries."""
    if name == "SmolVLAConfig":
        from .configuration import SmolVLAConfig

        return SmolVLAConfig
    if name == "SmolVLAPolicy":
        from .modeling import SmolVLAPolicy

        return SmolVLAPolicy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
