"""FSDP2 over one gloo process: the joint layers are the units, and names and numbers stay."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity import (
    Golden,
    config,
    gradient_error,
    gradients,
    random_batch,
    random_draw,
    random_policy,
    relative_error,
)
from torch._C._distributed_c10d import HashStore
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from smolvla import SmolVLAPolicy
from smolvla.optimization import adamw
from smolvla.processing import TOKENS


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()
    # init_device_mesh leaves these behind for the next test's process group
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


@pytest.mark.parametrize("name", ["default", "aloha"])
def test_a_sharded_policy_trains_with_the_same_gradients_and_saves_the_same_file(name, mesh, tmp_path):
    golden = Golden(name)
    policy = golden.policy()
    names = [name for name, _ in policy.named_parameters()]
    policy.shard(mesh=mesh)
    assert [name for name, _ in policy.named_parameters()] == names

    outputs = policy(**policy.prepare_inputs(golden.batch), **golden.draw)
    outputs["loss"].backward()
    sharded: dict[str, Any] = gradients(policy)
    found = {name: gradient.full_tensor() for name, gradient in sharded.items()}
    assert gradient_error(found, golden.gradients) < 1e-5
    chunk = policy.predict_action_chunk(golden.batch, golden.draw["noise"])
    assert relative_error(chunk, golden.expected("action_chunk")) < 1e-5

    optimizer = adamw(policy, policy.config)
    optimizer.step()
    model_state, optimizer_state = get_state_dict(policy, optimizer)
    assert list(model_state) == names
    assert set(optimizer_state["state"]) == set(golden.meta["trainable"])
    set_state_dict(policy, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)

    whole: dict[str, Any] = get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True))
    policy.save_pretrained(tmp_path, state_dict=whole)
    loaded = SmolVLAPolicy.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in whole.items())


def test_bfloat16_shards_stay_near_float32(mesh):
    golden = Golden("default")
    policy = golden.policy()
    policy.shard(
        mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    )
    loss = policy(**policy.prepare_inputs(golden.batch), **golden.draw)["loss"]
    loss.backward()
    assert loss.dtype == torch.float32
    assert relative_error(loss, golden.expected("loss")) < 2e-2  # bfloat16 keeps 8 bits


def test_kept_words_include_the_tokens_around_images(mesh):
    settings = config(add_image_special_tokens=True)
    batch, draw = random_batch(settings), random_draw(settings)
    whole, sharded = random_policy(settings), random_policy(settings)
    sharded.shard(mesh=mesh, words=batch[TOKENS].unique())
    losses = [policy(**policy.prepare_inputs(batch), **draw)["loss"] for policy in (whole, sharded)]
    assert torch.equal(*losses)
