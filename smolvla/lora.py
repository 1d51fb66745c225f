"""Low-rank adapters (LoRA) on the expert, through peft: what trains, and how it is saved.

A policy with adapters has peft's parameter names: `x.weight` becomes `x.base_layer.weight`, beside
`x.lora_A.default.weight` (rank, in) and `x.lora_B.default.weight` (out, rank). What is saved has none of
them: `merged` gives an ordinary checkpoint, `save_adapter` a folder that LeRobot and peft put on the base.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .tensor_files import write_tensors

if TYPE_CHECKING:
    from .modeling import SmolVLAPolicy

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
HEADS = ("state_proj", "action_in_proj", "action_out_proj", "action_time_mlp_in", "action_time_mlp_out")
A_NAME, B_NAME, BASE_NAME = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Which adapters a policy gets. They have no dropout: its draws would depend on how a batch is cut."""

    rank: int
    alpha: float
    """An adapter adds alpha / rank * B A."""
    targets: tuple[str, ...] = ATTENTION
    """Projections of the expert's layers (ATTENTION, MLP), and HEADS."""
    train_fully: tuple[str, ...] = ()
    """HEADS that are trained as they are; all other weights are frozen."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank {self.rank} is below 1")
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha {self.alpha} is not positive")
        if not self.targets:
            raise ValueError("lora.targets is empty, so nothing would have an adapter")
        for field, known in (("targets", (*ATTENTION, *MLP, *HEADS)), ("train_fully", HEADS)):
            for name in getattr(self, field):
                if name not in known:
                    raise ValueError(f"lora.{field}: {name!r} is none of {', '.join(known)}")
        if both := set(self.targets) & set(self.train_fully):
            raise ValueError(f"lora: {sorted(both)} stand in targets and in train_fully; take one")

    @property
    def pattern(self) -> str:
        """Matches the full names of the modules that get an adapter, as peft wants it."""
        layers = r"vlm_with_expert\.lm_expert\.layers\.\d+\."
        parts = [
            rf"{layers}self_attn\.({'|'.join(n for n in self.targets if n in ATTENTION)})",
            rf"{layers}mlp\.({'|'.join(n for n in self.targets if n in MLP)})",
            rf"({'|'.join(n for n in self.targets if n in HEADS)})",
        ]
        return rf"model\.({'|'.join(part for part in parts if not part.endswith('()'))})"

    def peft_config(self, **others: Any) -> Any:
        """The same for peft, but for `train_fully`, which it would do by wrapping copies of the modules."""
        from peft import LoraConfig  # only runs with adapters wait for its import

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # pyright: ignore[reportArgumentType] - annotated int, only divided
            lora_dropout=0.0,
            target_modules=self.pattern,
            **others,
        )


def add_adapters(policy: "SmolVLAPolicy", lora: LoRA, *, seed: int) -> None:
    """Put adapters on a policy in place; from now on only they train, and what `train_fully` names.

    They change nothing yet: B is zero. A is drawn from `seed`, the same on every worker.
    """
    from peft import inject_adapter_in_model

    policy.requires_grad_(requires_grad=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(lora.peft_config(), policy)
    for name in lora.train_fully:
        policy.model.get_submodule(name).requires_grad_(requires_grad=True)
    policy.lora = lora


def merged(weights: Mapping[str, Tensor], lora: LoRA) -> dict[str, Tensor]:
    """The tensors of a policy with adapters as those of an ordinary one, under LeRobot's names."""
    ordinary = {}
    for name, tensor in weights.items():
        if name.endswith((A_NAME, B_NAME)):
            continue
        module, base, rest = name.partition(BASE_NAME)
        if base and rest == "weight":
            a, b = weights[module + A_NAME], weights[module + B_NAME]
            tensor = tensor + lora.alpha / lora.rank * (b @ a).to(tensor.dtype)
        ordinary[f"{module}.{rest}" if base else name] = tensor
    return ordinary


def save_adapter(
    policy: "SmolVLAPolicy", folder: str | Path, *, base: str | Path, state_dict: Mapping[str, Tensor] | None
) -> None:
    """Write what was trained in the form that LeRobot (`use_peft`) and `peft.PeftModel` load.

    Args:
        policy: with adapters.
        folder: created when missing.
        base: the checkpoint they belong on, which LeRobot will load; its path is written into the files.
        state_dict: gathered tensors of a sharded policy, instead of its own.
    """
    folder, lora = Path(folder), policy.lora
    assert lora is not None
    policy.save_description(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"use_peft": True}, indent=2) + "\n")
    fully = list(lora.train_fully) or None
    lora.peft_config(base_model_name_or_path=str(base), modules_to_save=fully).save_pretrained(str(folder))
    kept = re.compile(rf"\.lora_[AB]\.default\.|^model\.({'|'.join(lora.train_fully) or '$'})\.")
    tensors = {
        f"base_model.model.{name.replace('.default.', '.')}": tensor.detach().contiguous().cpu()
        for name, tensor in (state_dict or policy.state_dict()).items()
        if kept.search(name)
    }
    write_tensors(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
