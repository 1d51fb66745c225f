"""SmolVLATrainer against a plain loop: same losses and weights, accumulated, resumed, on two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from parity import config, random_policy, relative_error
from safetensors.torch import load_file
from transformers import EvalPrediction, TrainerCallback, TrainingArguments

from smolvla import SmolVLAPolicy, SmolVLAProcessor, create_smolvla_trainer
from smolvla.optimization import adamw, clip_gradients, lr_factor
from smolvla.trainer import SeededDraw, action_errors, newest_checkpoint

STATS = {
    "observation.state": {"mean": [0.5] * 5, "std": [2.0] * 5},
    "action": {"mean": [1.0, 2.0, 3.0, 4.0], "std": [1.0, 2.0, 3.0, 4.0]},
}
STEPS, MICRO, ACCUMULATION = 4, 2, 2


class Raw(torch.utils.data.Dataset):
    """Samples as a dataset gives them; every second chunk ends early."""

    def __len__(self):
        return STEPS * MICRO * ACCUMULATION

    def __getitem__(self, index):
        generator = np.random.default_rng(index)
        return {
            "observation.images.left": generator.integers(0, 256, (3, 60, 80), dtype=np.uint8),
            "observation.images.right": generator.integers(0, 256, (3, 60, 80), dtype=np.uint8),
            "observation.state": generator.normal(size=5).astype(np.float32),
            "action": generator.normal(size=(6 - index % 3, 4)).astype(np.float32),
            "task": "open it" if index % 2 else "push the red block",
        }


def fresh_policy(num_vlm_layers=2):
    policy = random_policy(
        config(num_vlm_layers=num_vlm_layers, optimizer_lr=1e-3, scheduler_warmup_steps=2, num_steps=2)
    )
    policy.processor = SmolVLAProcessor(policy.config, STATS)
    return policy


def arguments(folder, **values):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": MICRO,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(**settings | values)


def in_order(trainer):
    """The plain loop's order: the dataset's."""
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    return trainer


def make_trainer(policy, folder, **values):
    trainer = create_smolvla_trainer(
        model_name_or_path=policy,
        training_args=arguments(folder, **values),
        train_dataset=Raw(),
        eval_dataset=Raw(),
    )
    return in_order(trainer)


def plain_loop(policy):
    """The arithmetic of the Ray loop (pipelines/train_worker.py) on one worker; returns the losses."""
    policy.train()
    optimizer, draw, losses = adamw(policy, policy.config), SeededDraw(3), []
    for step in range(STEPS):
        loss_sum, valid = torch.zeros(()), torch.zeros(())
        for i in range(ACCUMULATION):
            number = step * ACCUMULATION + i
            samples = [policy.processor(Raw()[number * MICRO + row]) for row in range(MICRO)]
            inputs = policy.prepare_inputs(policy.processor.collate(samples))
            noise, time = draw(number, inputs["actions"].shape)
            out = policy(**inputs, noise=noise, time=time)
            out["loss_sum"].backward()
            loss_sum, valid = loss_sum + out["loss_sum"].detach(), valid + out["num_valid"]
        parameters = [p for p in policy.parameters() if p.grad is not None]
        for parameter in parameters:
            parameter.grad /= valid
        clip_gradients(parameters, policy.config.optimizer_grad_clip_norm)
        factor = lr_factor(
            step,
            warmup_steps=2,
            decay_steps=None,
            total_steps=STEPS,
            peak_lr=1e-3,
            decay_lr=policy.config.scheduler_decay_lr,
        )
        optimizer.param_groups[0]["lr"] = 1e-3 * factor
        optimizer.step()
        optimizer.zero_grad()
        losses.append((loss_sum / valid).item())
    return losses


@pytest.fixture(scope="module")
def expected():
    policy = fresh_policy()
    losses = plain_loop(policy)
    return losses, policy.state_dict()


def logged(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same(found, expected, tolerance=1e-5):
    assert max(relative_error(found[name], tensor) for name, tensor in expected.items()) < tolerance


def test_losses_and_weights_are_those_of_the_plain_loop(expected, tmp_path):
    policy = fresh_policy()
    trainer = make_trainer(policy, tmp_path)
    trainer.train()
    losses, weights = expected
    assert logged(trainer) == pytest.approx(losses, rel=1e-4)
    assert_same(policy.state_dict(), weights)


def test_a_run_goes_on_where_it_stopped(expected, tmp_path):
    first = make_trainer(fresh_policy(), tmp_path, save_strategy="steps", save_steps=2)
    first.add_callback(StopAt(2))
    first.train()
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint == str(tmp_path / "checkpoint-2")
    assert SmolVLAPolicy.from_pretrained(checkpoint).processor.stats.keys() == STATS.keys()
    policy = fresh_policy()
    again = make_trainer(policy, tmp_path, save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=checkpoint)
    losses, weights = expected
    assert logged(again)[-2:] == pytest.approx(losses[2:], rel=1e-4)
    assert_same(policy.state_dict(), weights)
    assert newest_checkpoint(tmp_path / "nowhere") is None


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **others):
        control.should_training_stop = state.global_step >= self.step


def test_evaluation_is_repeatable_and_in_real_units(tmp_path):
    trainer = make_trainer(fresh_policy(), tmp_path)
    one, two = trainer.evaluate(), trainer.evaluate()
    values = {name: value for name, value in one.items() if "mae" in name or "rmse" in name or "loss" in name}
    assert values == {name: two[name] for name in values}
    assert {f"eval_mae_{name}" for name in ("1", "10", "all")} <= set(values)
    assert "eval_rmse_all/dim_3" in values
    assert values["eval_mae_1/dim_3"] > 1  # an action has a spread of 4 units there


def test_errors_are_means_over_real_steps():
    found = np.zeros((1, 3, 2))
    true = np.array([[[1.0, 2.0], [3.0, 2.0], [np.nan, np.nan]]])
    metrics = action_errors(EvalPrediction(predictions=found, label_ids=true))
    assert metrics["mae_1"] == 1.5
    assert metrics["mae_all/dim_0"] == 2
    assert metrics["mae_all/dim_1"] == 2
    assert metrics["rmse_all/dim_0"] == pytest.approx(5**0.5)
    assert metrics["rmse_10"] == pytest.approx((18 / 4) ** 0.5)


def test_repeated_noise_trains(tmp_path):
    policy = fresh_policy()
    trainer = create_smolvla_trainer(
        model_name_or_path=policy,
        training_args=arguments(tmp_path, max_steps=1),
        train_dataset=Raw(),
        repeated_noise=3,
    )
    trainer.train()
    assert logged(trainer)[0] < 100  # a mean, not three times one


SCRIPT = """
import sys, json
sys.path[:0] = {paths!r}
from test_trainer import fresh_policy, make_trainer
import torch
torch.set_num_threads(1)
policy = fresh_policy()
trainer = make_trainer(policy, {folder!r}, gradient_accumulation_steps=1, ddp_backend="gloo")
assert trainer.args.world_size == 2
trainer.train()
trainer.save_model({folder!r} + "/final")
if trainer.args.process_index == 0:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    open({folder!r} + "/losses.json", "w").write(json.dumps(losses))
"""


def test_two_processes_compute_what_one_does(expected, tmp_path):
    """Two processes with one micro-batch each are one process with two."""
    here = Path(__file__).parent
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(paths=[str(here), str(here.parents[1])], folder=str(tmp_path)))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
    ]
    subprocess.run(command, check=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"})
    losses, weights = expected
    assert json.loads((tmp_path / "losses.json").read_text()) == pytest.approx(losses, rel=1e-4)
    assert_same(load_file(tmp_path / "final" / "model.safetensors"), weights)
