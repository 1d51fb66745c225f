"""SmolVLATrainer: training on one node with transformers' Trainer and a map-style dataset.

Loss, optimiser and schedule are those of the policy, the same code as in any other loop. Samples go through
`SmolVLAProcessor`, in the dataset or in the collator that `create_smolvla_trainer` builds.

Shape letters: B batch, H chunk, A action width.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import get_last_checkpoint

from .data_utils import sample_noise, sample_time
from .features import ACTION
from .modeling import SmolVLAPolicy
from .optimization import adamw, lr_factor
from .processing import SmolVLAProcessor

Draw: TypeAlias = Callable[[int, torch.Size], tuple[Tensor, Tensor]]
"""(number of the micro-batch, shape (B * k, H, A)) -> noise of that shape, times (B * k,)."""

EVALUATION_SEED = 0
METRIC_HORIZONS = {"1": 1, "10": 10, "all": None}
"""First steps of a chunk that errors are reported over."""


class SmolVLATrainer(Trainer):
    """A Trainer that knows a SmolVLA batch.

    The loss of a step is the sum over valid action entries divided by their number over all micro-batches and
    processes, so that accumulation and the number of processes change nothing. Learning rate, optimiser and
    schedule are the presets of the policy's configuration, whose decay follows the run unless `decay_steps`
    says otherwise; gradients are clipped at its norm.

    Args:
        model: its processor brings predictions back into real units.
        args: columns are not removed by name, and checkpoints are safetensors, whatever it says.
        repeated_noise: noise and time draws per sample, see `SmolVLAPolicy.forward`.
        decay_steps: of the cosine; None: the run's.
        draw: where noise and times come from; if absent, a generator seeded by (args.seed, micro-batch).
        others: as Trainer takes them.
    """

    def __init__(
        self,
        model: SmolVLAPolicy,
        args: TrainingArguments,
        *,
        repeated_noise: int = 1,
        decay_steps: int | None = None,
        draw: Draw | None = None,
        **others: Any,
    ) -> None:
        args.remove_unused_columns = False  # the policy's columns are not arguments of its forward
        args.label_names = [ACTION]
        args.max_grad_norm = model.config.optimizer_grad_clip_norm
        args.learning_rate = model.config.optimizer_lr
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # what trains has a gradient in every step
        others.setdefault("compute_metrics", None)
        super().__init__(model=model, args=args, **others)
        self.policy = model
        self.repeated_noise, self.decay_steps = repeated_noise, decay_steps
        self.draw = draw or SeededDraw(args.seed)
        self.model_accepts_loss_kwargs = True
        self._micro_batch = 0
        if self.compute_metrics is None:
            self.compute_metrics = action_errors

    # ---- loss ---------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,  # noqa: FBT001, FBT002 -- Trainer's signature
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The share of this micro-batch in the step's mean loss."""
        prepared = self.policy.prepare_inputs(inputs)
        noise, time = self._drawn(prepared["actions"])
        outputs = model(**prepared, noise=noise, time=time, repeated_noise=self.repeated_noise)
        if num_items_in_batch is None:
            loss = outputs["loss"]
        else:
            # DDP takes the mean over processes of what should be summed over them.
            loss = outputs["loss_sum"] * (self.args.world_size / (num_items_in_batch * self.repeated_noise))
        return (loss, outputs) if return_outputs else loss

    def _drawn(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        shape = torch.Size((len(actions) * self.repeated_noise, *actions.shape[1:]))
        # Trainer deals micro-batches out to its processes in turn
        number = self._micro_batch * self.args.world_size + self.args.process_index
        self._micro_batch += 1
        noise, time = self.draw(number, shape)
        return noise.to(actions.device), time.to(actions.device)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """Valid action entries of a step, over all its micro-batches and processes."""
        if not batch_samples:
            return None
        count = torch.stack([valid_entries(batch) for batch in batch_samples]).sum().to(device)
        if self.args.world_size == 1:
            return count
        counts: Any = self.accelerator.gather(count)
        return counts.sum()

    # ---- evaluation ---------------------------------------------------------------------------------------

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,  # noqa: FBT001 -- Trainer's signature
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Any, Any]:
        """Loss with fixed noise and times, and sampled and true actions in real units.

        The draws depend on a sample's place in its batch only, so that two evaluations can be compared.
        Padded steps of the true actions are NaN.
        """
        generator = torch.Generator().manual_seed(EVALUATION_SEED)
        with torch.no_grad(), self.compute_loss_context_manager():
            prepared = self.policy.prepare_inputs(inputs)
            actions = prepared["actions"]
            noise = sample_noise(actions.shape, generator).to(actions.device)
            time = sample_time(len(actions), generator).to(actions.device)
            loss = model(**prepared, noise=noise, time=time)["loss"]
            if prediction_loss_only:
                return loss, None, None
            sampled = self.policy.predict_action_chunk(inputs, noise)
        processor = self.policy.processor
        true = processor.unnormalize_actions(inputs[ACTION].to(sampled.device)).clone()
        if "action_is_pad" in inputs:
            true[inputs["action_is_pad"].to(true.device)] = torch.nan
        return loss, processor.unnormalize_actions(sampled), true

    # ---- optimiser, schedule, checkpoints -----------------------------------------------------------------

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The configuration's AdamW; weight decay and learning rate of the arguments are not used."""
        if self.optimizer is None:
            self.optimizer = adamw(self.policy, self.policy.config)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        """The configuration's warm-up and cosine."""
        if self.lr_scheduler is None:
            config = self.policy.config

            def factor(step: int) -> float:
                return lr_factor(
                    step,
                    warmup_steps=config.scheduler_warmup_steps,
                    decay_steps=self.decay_steps,
                    total_steps=num_training_steps,
                    peak_lr=config.optimizer_lr,
                    decay_lr=config.scheduler_decay_lr,
                )

            self.lr_scheduler = LambdaLR(optimizer or self.create_optimizer(), factor)
        return self.lr_scheduler

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """A checkpoint that LeRobot loads, in the folder where Trainer keeps its own state too."""
        folder = Path(output_dir or self.args.output_dir or ".")
        self.policy.save_pretrained(folder, state_dict=state_dict)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        restored = SmolVLAPolicy.from_pretrained(resume_from_checkpoint)
        self.policy.load_state_dict(restored.state_dict())
        steps = TrainerState.load_from_json(
            str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME)
        ).global_step
        self._micro_batch = steps * self.args.gradient_accumulation_steps

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        restored = SmolVLAPolicy.from_pretrained(self.state.best_model_checkpoint)
        self.policy.load_state_dict(restored.state_dict())


class SeededDraw:
    """Noise and times that depend on the seed and the number of the micro-batch only."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, micro_batch: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
        state = np.random.SeedSequence((self.seed, micro_batch)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
        return sample_noise(shape, generator), sample_time(shape[0], generator)


def valid_entries(batch: Mapping[str, Any]) -> Tensor:
    """Action entries of a batch that are no padding."""
    actions = batch[ACTION]
    if "action_is_pad" not in batch:
        return torch.tensor(actions.numel())
    return (~batch["action_is_pad"]).sum() * actions.shape[-1]


def action_errors(predictions: EvalPrediction) -> dict[str, float]:
    """MAE and RMSE in real units over 1, 10 and all steps, of every action dimension and of all.

    Names are `mae_10` and `mae_10/dim_3`. Predictions and labels are (samples, H, A); NaN labels count not.
    """
    found = torch.as_tensor(predictions.predictions).double()
    true = torch.as_tensor(predictions.label_ids).double()
    metrics = {}
    for name, steps in METRIC_HORIZONS.items():
        errors = (found - true)[:, :steps].flatten(0, 1)
        for kind, values in (("mae", errors.abs()), ("rmse", errors.square())):
            per_dimension, overall = values.nanmean(dim=0), values.nanmean()
            if kind == "rmse":
                per_dimension, overall = per_dimension.sqrt(), overall.sqrt()
            metrics[f"{kind}_{name}"] = overall.item()
            metrics |= {f"{kind}_{name}/dim_{i}": v for i, v in enumerate(per_dimension.tolist())}
    return metrics


def create_smolvla_trainer(
    *,
    model_name_or_path: str | Path | SmolVLAPolicy,
    training_args: TrainingArguments,
    train_dataset: Any,
    eval_dataset: Any = None,
    data_collator: Callable[[list[Any]], dict[str, Tensor]] | None = None,
    processor: SmolVLAProcessor | None = None,
    **settings: Any,
) -> SmolVLATrainer:
    """A trainer of the policy in a folder, of a hub id, or of a policy that is there already.

    Without a `data_collator` the dataset holds raw samples, and the processor (the policy's own unless one is
    given) prepares them. With one, the dataset's samples or the collator's batches are processed already.
    """
    policy = (
        model_name_or_path
        if isinstance(model_name_or_path, SmolVLAPolicy)
        else SmolVLAPolicy.from_pretrained(model_name_or_path)
    )
    if processor is not None:
        policy.processor = processor
    return SmolVLATrainer(
        policy,
        training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=data_collator or RawCollator(policy.processor),
        **settings,
    )


class RawCollator:
    """Raw samples -> a batch."""

    def __init__(self, processor: SmolVLAProcessor) -> None:
        self.processor = processor

    def __call__(self, samples: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        return self.processor.collate([self.processor(sample) for sample in samples])


def newest_checkpoint(folder: str | Path) -> str | None:
    """What `train(resume_from_checkpoint=...)` takes to go on in an output folder; None: nothing there."""
    return get_last_checkpoint(str(folder)) if Path(folder).is_dir() else None
