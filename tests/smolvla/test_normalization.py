"""How checkpoints say what state and actions were normalised by: every form of LeRobot's."""

import json
import shutil

import pytest
import torch
from parity import config, random_batch, random_policy
from safetensors.torch import load_file, save_file

from smolvla import SmolVLAConfig, SmolVLAPolicy, SmolVLAProcessor

STATS = {
    "observation.state": {"mean": [0.1, 0.2, 0.3, 0.4, 0.5], "std": [0.5] * 5, "count": [7]},
    "action": {"mean": [0.2] * 4, "std": [0.25, 0.5, 1.0, 2.0], "q01": [-1.0] * 4, "count": [7]},
}
FILE = "policy_preprocessor_step_5_normalizer_processor.safetensors"


@pytest.fixture(scope="module")
def policy():
    return random_policy(config())


@pytest.fixture
def saved(policy, tmp_path):
    policy.save_pretrained(tmp_path / "saved", STATS)
    return tmp_path / "saved"


def with_buffers(folder, buffers):
    """An older checkpoint: no processor files, statistics among the weights, compiled names."""
    for file in folder.glob("policy_*"):
        file.unlink()
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.replace("model.", "model._orig_mod.", 1): tensor for name, tensor in tensors.items()}
    save_file(tensors | buffers, folder / "model.safetensors")
    return folder


def buffers_of(prefix="", scale=1.0):
    return {
        f"{group}.{prefix}buffer_{name.replace('.', '_')}.{which}": scale * torch.tensor(STATS[name][which])
        for group, name in (
            ("normalize_inputs", "observation.state"),
            ("normalize_targets", "action"),
            ("unnormalize_outputs", "action"),
        )
        for which in ("mean", "std")
    }


def actions_of(processor):
    return processor.unnormalize_actions(torch.ones(4)).tolist()


EXPECTED = pytest.approx([0.45, 0.7, 1.2, 2.2])


def test_new_checkpoints_bring_their_statistics_back(saved):
    assert actions_of(SmolVLAProcessor.from_pretrained(saved)) == EXPECTED
    assert actions_of(SmolVLAPolicy.from_pretrained(saved).processor) == EXPECTED


def test_a_round_trip_keeps_every_tensor_statistic_and_setting(saved, tmp_path):
    before = json.loads((saved / "policy_preprocessor.json").read_text())
    before["steps"][0]["config"]["rename_map"] = {"observation.images.top": "observation.images.left"}
    before["steps"][3]["config"]["max_length"] = 31
    (saved / "policy_preprocessor.json").write_text(json.dumps(before, indent=2) + "\n")
    SmolVLAPolicy.from_pretrained(saved).save_pretrained(tmp_path / "again")
    names = sorted(file.name for file in saved.iterdir() if file.is_file())
    assert names == sorted(file.name for file in (tmp_path / "again").iterdir() if file.is_file())
    assert len(names) == 6
    for name in names:
        one, two = saved / name, tmp_path / "again" / name
        if name.endswith(".json"):
            assert json.loads(one.read_text()) == json.loads(two.read_text())
        else:
            left, right = load_file(one), load_file(two)
            assert set(left) == set(right)
            assert all(torch.equal(left[key], right[key]) for key in left)


def test_older_checkpoints_hold_statistics_among_the_weights(policy, saved):
    loaded = SmolVLAPolicy.from_pretrained(with_buffers(saved, buffers_of()))
    assert actions_of(loaded.processor) == EXPECTED
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in policy.state_dict().items())


def test_the_statistics_of_one_robot_are_taken_and_of_several_one_must_be_chosen(saved, tmp_path):
    several = shutil.copytree(saved, tmp_path / "several")
    assert actions_of(SmolVLAProcessor.from_pretrained(with_buffers(saved, buffers_of("so100_")))) == EXPECTED
    with_buffers(several, buffers_of("so100_", scale=3.0) | buffers_of("so100-red_"))
    policy = SmolVLAPolicy.from_pretrained(several)  # the weights do not need them
    with pytest.raises(ValueError, match="statistics of the robots so100, so100-red"):
        _ = policy.processor
    assert actions_of(SmolVLAProcessor.from_pretrained(several, robot="so100-red")) == EXPECTED
    with pytest.raises(ValueError, match="no statistics of robot 'so101'"):
        SmolVLAProcessor.from_pretrained(several, robot="so101")


def test_migrated_statistics_that_match_no_feature_are_never_an_identity(saved):
    tensors = load_file(saved / FILE)
    migrated = {f"so100.buffer.{name}": tensor for name, tensor in tensors.items()}
    for name in (FILE, "policy_postprocessor_step_0_unnormalizer_processor.safetensors"):
        save_file(migrated, saved / name)
    with pytest.raises(ValueError, match=r"belong to robots \(so100\), not to this policy's features"):
        SmolVLAProcessor.from_pretrained(saved)
    assert actions_of(SmolVLAProcessor.from_pretrained(saved, robot="so100")) == EXPECTED


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {k: v for k, v in t.items() if k != "action.std"},
            "statistic 'std' of 'action'",
        ),
        (lambda t: {k.replace("action", "act"): v for k, v in t.items()}, "'mean' of 'action'"),
        (lambda t: t | {"action.mean": torch.zeros(3)}, "has 3 numbers; the feature has 4"),
        (lambda t: t | {"action.mean": torch.full((4,), torch.inf)}, "'mean' of 'action' is not finite"),
        (lambda t: t | {"action.std": torch.ones(4)}, "'std' of 'action' contradicts the pre-processor's"),
    ],
)
def test_statistics_that_are_missing_or_wrong_are_refused(saved, change, message):
    changed = change(load_file(saved / FILE))
    save_file(changed, saved / FILE)
    if "contradicts" not in message:
        save_file(changed, saved / "policy_postprocessor_step_0_unnormalizer_processor.safetensors")
    with pytest.raises(ValueError, match=message):
        SmolVLAProcessor.from_pretrained(saved)


def test_a_checkpoint_without_any_statistics_can_only_be_an_identity_when_it_says_so(policy, saved, tmp_path):
    with pytest.raises(ValueError, match="has no statistics: neither policy_preprocessor"):
        SmolVLAProcessor.from_pretrained(with_buffers(saved, {}))
    with pytest.raises(ValueError, match=r"needs the statistic 'mean' of 'observation\.state'"):
        _ = SmolVLAPolicy.from_pretrained(saved).processor
    identity = {"VISUAL": "IDENTITY", "STATE": "IDENTITY", "ACTION": "IDENTITY"}
    random_policy(config(normalization_mapping=identity)).save_pretrained(tmp_path / "identity")
    loaded = SmolVLAPolicy.from_pretrained(tmp_path / "identity")
    assert actions_of(loaded.processor) == [1, 1, 1, 1]


def test_images_normalised_by_statistics_are_refused():
    mapping = {"VISUAL": "MEAN_STD", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
    with pytest.raises(ValueError, match=r"normalization_mapping\['VISUAL'\] is 'MEAN_STD'"):
        SmolVLAProcessor(config(normalization_mapping=mapping), STATS)


# shared/reference/hub_configs/smolvla_ported_thanos_picking: an older pre-processor, its steps' classes, and
# a normalisation of images that its own configuration contradicts.
PORTED = {
    "name": "preprocessor",
    "seed": None,
    "steps": [
        {"registry_name": "rename_processor", "config": {"rename_map": {}}},
        {
            "registry_name": "normalizer_processor",
            "config": {
                "eps": 1e-08,
                "features": {
                    "observation.state": {"type": "STATE", "shape": [5]},
                    "observation.images.left": {"type": "VISUAL", "shape": [3, 480, 640]},
                    "action": {"type": "ACTION", "shape": [4]},
                },
                "norm_map": {"STATE": "MEAN_STD", "ACTION": "MEAN_STD", "VISUAL": "MEAN_STD"},
            },
            "state_file": "preprocessor_step_1_normalizer_processor.safetensors",
        },
        {"registry_name": "to_batch_processor", "config": {}},
        {"class": "lerobot.processor.device_processor.DeviceProcessor", "config": {"device": "cpu"}},
    ],
}


def test_the_older_names_of_processor_files_are_read_and_their_classes_never_imported(saved):
    (saved / FILE).rename(saved / PORTED["steps"][1]["state_file"])
    for file in saved.glob("policy_*"):
        file.unlink()
    (saved / "preprocessor.json").write_text(json.dumps(PORTED))
    assert actions_of(SmolVLAProcessor.from_pretrained(saved)) == EXPECTED


def test_a_normaliser_that_contradicts_the_configuration_is_the_one_that_counts(saved):
    # lerobot/smolvla_libero: the configuration still has the base's state of 6, the data have 8
    values = json.loads((saved / "config.json").read_text())
    values["input_features"]["observation.state"]["shape"] = [3]
    (saved / "config.json").write_text(json.dumps(values))
    processor = SmolVLAProcessor.from_pretrained(saved)
    assert processor.normalizer.normalize("observation.state", torch.zeros(5)).shape == (5,)


# ---- starting points --------------------------------------------------------------------------------------


def feature(kind, *shape):
    return {"type": kind, "shape": list(shape)}


DATA = {
    "observation.images.wrist": feature("VISUAL", 3, 48, 64),
    "observation.images.top": feature("VISUAL", 3, 96, 96),
    "observation.images.side": feature("VISUAL", 3, 48, 64),
    "observation.state": feature("STATE", 7),
}
ACTION = {"action": feature("ACTION", 6)}
RENAME = {
    "observation.images.top": "observation.images.left",
    "observation.images.wrist": "observation.images.right",
}


def test_renamed_cameras_take_the_policys_names_and_order_and_the_datas_shapes(policy, saved, tmp_path):
    settings = SmolVLAConfig.from_pretrained(saved).with_features(DATA, ACTION, rename=RENAME)
    assert settings.camera_names == [
        "observation.images.left",
        "observation.images.right",
        "observation.images.side",
    ]
    assert settings.input_features["observation.images.left"]["shape"] == [3, 96, 96]
    assert (settings.state_dim, settings.action_dim) == (7, 6)
    tuned = SmolVLAPolicy.from_pretrained(saved, config=settings)
    assert all(torch.equal(tuned.state_dict()[n], t) for n, t in policy.state_dict().items())
    chunk = tuned.predict_action_chunk(random_batch(settings))
    assert chunk.shape == (3, 6, 6)

    stats = {
        name: {"mean": [0.0] * n, "std": [1.0] * n} for name, n in (("observation.state", 7), ("action", 6))
    }
    tuned.processor = SmolVLAProcessor(settings, stats, rename=RENAME)
    tuned.save_pretrained(tmp_path / "tuned")
    sample = {
        "observation.images.top": torch.zeros(3, 8, 8, dtype=torch.uint8),
        "observation.state": torch.zeros(7),
        "task": "push",
    }
    assert "observation.images.left" in SmolVLAProcessor.from_pretrained(tmp_path / "tuned")(sample)


def test_fewer_cameras_are_fewer_images(saved):
    fewer = {name: DATA[name] for name in ("observation.images.top", "observation.state")}
    rename = {"observation.images.top": "observation.images.right"}
    settings = SmolVLAConfig.from_pretrained(saved).with_features(fewer, ACTION, rename=rename)
    assert settings.camera_names == ["observation.images.right"]


def test_a_wrong_renaming_is_refused():
    with pytest.raises(ValueError, match=r"the data have no column \['observation.images.tip'\]"):
        config().with_features(DATA, ACTION, rename={"observation.images.tip": "observation.images.left"})
    both = dict.fromkeys(RENAME, "observation.images.left")
    with pytest.raises(ValueError, match=r"several columns become \['observation.images.left'\]"):
        config().with_features(DATA, ACTION, rename=both)
