"""A toy in several data files, a policy whose tower is frozen, and the features of one of the other."""

import shutil
from pathlib import Path

import pytest
import torch
from toys import ToySource, ingested

from pipelines.caching import FileEncoder, Tower
from pipelines.dataset import file_digests, open_dataset
from pipelines.features import Recipe, StoredFeatures, folder_of, missing_files, seal
from smolvla.configuration import SmolVLAConfig
from smolvla.features import FeatureDtype
from smolvla.image_features import feature_shape, weights_digest
from smolvla.modeling import SmolVLAPolicy

VLM = Path("tests/golden/tiny_vlm").absolute()
TOP, WRIST = "observation.images.top", "observation.images.wrist"
SHARD_BYTES = 150_000
EXACT: FeatureDtype = "float32"


@pytest.fixture(scope="module")
def policy_path(tmp_path_factory):
    """A frozen random policy for the toy."""
    config = SmolVLAConfig.from_pretrained("tests/golden/default").changed(
        vlm_model_name=str(VLM), scheduler_warmup_steps=2, optimizer_lr=1e-3
    )
    folder = tmp_path_factory.mktemp("policy")
    config = config.with_features(
        {
            TOP: {"type": "VISUAL", "shape": [3, 40, 56]},
            WRIST: {"type": "VISUAL", "shape": [3, 40, 56]},
            "observation.state": {"type": "STATE", "shape": [3]},
        },
        {"action": {"type": "ACTION", "shape": [4]}},
    )
    torch.manual_seed(0)
    SmolVLAPolicy(config, allow_random_vlm=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shards(ray_session, tmp_path_factory):
    """The toy in several data files."""
    return ingested(ToySource(), tmp_path_factory.mktemp("data") / "shards", shard_bytes=SHARD_BYTES)


@pytest.fixture
def own(shards, tmp_path):
    """A copy to write into."""
    return Path(shutil.copytree(shards, tmp_path / "own"))


def planned(folder, policy_path, dtype: FeatureDtype = EXACT):
    """(dataset, config, features) as the job makes them."""
    dataset = open_dataset(str(folder))
    config = SmolVLAConfig.from_pretrained(policy_path).with_features(*dataset.policy_features())
    assert config.resize_imgs_with_padding == [64, 64]
    recipe = Recipe(
        weights=weights_digest(policy_path, config), image_box=(64, 64), dtype=dtype, precision="float32"
    )
    tokens = {name: feature_shape(config, dataset.image_size(name))[0] for name in dataset.camera_names}
    width = feature_shape(config, (40, 56))[1]
    uri = folder_of(dataset, recipe.fingerprint)
    return dataset, config, StoredFeatures(uri=uri, recipe=recipe, tokens=tokens, width=width)


def encode(folder, policy_path, dtype: FeatureDtype = EXACT):
    """Compute and seal without Ray."""
    dataset, config, stored = planned(folder, policy_path, dtype)
    tower = Tower(policy_path=str(policy_path), config=config, use_gpu=False)
    encoder = FileEncoder(dataset, stored, file_digests(dataset), tower, 40, 1)
    for number in missing_files(stored, dataset):
        assert sum(encoder.encode(number)) == dataset.row_groups.rows[dataset.row_groups.file == number].sum()
    seal(stored, dataset, {})
    return stored


def files_of(folder):
    return {path.name: path.stat() for path in sorted(folder.rglob("*.parquet"))}
