"""Features beside a dataset: the rows of the data, computed once, whatever dies; the same training."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from feature_toy import (
    SHARD_BYTES,
    TOP,
    WRIST,
    encode,
    files_of,
    own,
    planned,
    policy_path,
    shards,
)
from runs import TRAIN, toy_policy_and_reader
from toys import ToySource, ingested, with_cut_image

from pipelines import caching, feature_error, features
from pipelines.dataset import open_dataset
from pipelines.engine import Engine
from pipelines.features import missing_files
from pipelines.run_storage import RunStorage
from pipelines.stream import deal, micro_batches
from pipelines.tensors import ToTorch, unpacked
from pipelines.tower import StreamedTower
from smolvla.configuration import SmolVLAConfig
from smolvla.modeling import SmolVLAPolicy

assert own, policy_path
assert shards  # fixtures


def reader_of(folder, stored=None):
    reader = toy_policy_and_reader(folder)[2]
    return replace(reader, sources=[replace(reader.sources[0], features=stored)])


def test_the_stream_gives_the_same_rows_with_features_in_place_of_images(own, policy_path):
    assert len(list((own / "data").rglob("*.parquet"))) >= 3
    stored = encode(own, policy_path)
    policy = SmolVLAPolicy.from_pretrained(policy_path)
    from_images, from_features = reader_of(own), reader_of(own, stored)
    for pair in zip(from_images.encoded(1, first=3), from_features.encoded(1, first=3), strict=True):
        images, found = (r.decoded(t) for r, t in zip((from_images, from_features), pair, strict=True))
        for name in images.keys() - {TOP, WRIST}:
            np.testing.assert_array_equal(found[name], images[name], err_msg=name)
        assert found.keys() == images.keys() - {TOP, WRIST} | {f"{TOP}_features", f"{WRIST}_features"}
        for camera in (TOP, WRIST):
            expected = policy.image_features(camera, ToTorch()(images)[camera])
            columns = torch.from_numpy(found[f"{camera}_features"])
            torch.testing.assert_close(columns, expected, rtol=1e-5, atol=1e-5)


def test_the_files_lie_as_the_data_do_and_reading_them_is_copying(own, policy_path):
    stored = encode(own, policy_path, "bfloat16")
    for data in sorted((own / "data").rglob("*.parquet")):
        path = stored.path(str(data.relative_to(own)))
        found, expected = pq.read_metadata(path), pq.read_metadata(data)
        assert found.num_row_groups == expected.num_row_groups
        for group in range(found.num_row_groups):
            assert found.row_group(group).num_rows == expected.row_group(group).num_rows
            column = found.row_group(group).column(found.schema.names.index(TOP))
            assert (column.compression, column.statistics) == ("UNCOMPRESSED", None)
            assert "RLE_DICTIONARY" not in column.encodings
        frames = pq.read_table(path, columns=["episode_index", "frame_index"])
        assert frames.equals(
            pq.read_table(data, columns=["episode_index", "frame_index"]).cast(frames.schema)
        )


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 2e-2), ("int8", 2e-2)])
def test_what_is_stored_changes_loss_and_actions_by_its_rounding(own, policy_path, dtype, bound):
    stored = encode(own, policy_path, dtype)
    config = SmolVLAConfig.from_pretrained(policy_path)
    error = feature_error.measured(reader_of(own, stored), str(policy_path), config, device="cpu")
    assert error["frames"] == 16
    assert error["loss_error"] <= error["frame_loss_error"] < bound
    assert error["action_error"] <= error["largest_action_error"] < bound
    assert (error["action_error"] > 1e-7) == (dtype != "float32")


def test_a_row_whose_image_is_cut_off_is_masked_out_as_from_images(shards, policy_path, tmp_path):
    folder = tmp_path / "cut"
    with_cut_image(shards, folder, episode=1, frame=20, camera=WRIST)
    stored = encode(folder, policy_path)
    found = {}
    for name, reader in (("images", reader_of(folder)), ("features", reader_of(folder, stored))):
        batches = [reader.decoded(table) for group in range(5) for table in reader.encoded(group)]
        found[name] = {
            key: np.concatenate([batch[key] for batch in batches]) for key in ("bad_cameras", "action_is_pad")
        }
        if name == "features":
            bad = found[name]["bad_cameras"] != 0
            rows = np.concatenate([batch[f"{WRIST}_features"] for batch in batches])[bad]
            assert len(rows) == 1
            assert not rows.any()
    for key, values in found["images"].items():
        np.testing.assert_array_equal(found["features"][key], values)
    assert found["images"]["bad_cameras"].max() == 2


def test_actors_of_the_stream_give_what_the_worker_would_compute(shards, policy_path, tmp_path):
    """Two of them on parts of a CPU, and the micro-batches come in order."""
    shutil.copytree(policy_path, tmp_path / "start")
    tower = StreamedTower(
        storage=RunStorage(folder=tmp_path),
        dtype="float32",
        precision="float32",
        actors=2,
        cpus=0.25,
        gpus=0.0,
    )
    reader, policy = reader_of(shards), SmolVLAPolicy.from_pretrained(policy_path)
    expected = [ToTorch()(reader.decoded(table)) for table in reader.encoded(0)]
    dataset = micro_batches(reader, start=2, stop=9, tower=tower)
    deal(dataset, num_workers=1)
    dataset.context.execution_options.preserve_order = True
    (split,) = dataset.streaming_split(1, equal=True)
    blocks = split.iter_torch_batches(batch_size=None, collate_fn=ToTorch(), device="cpu")
    found = list(unpacked(blocks, reader.config.micro_batch))
    assert [int(batch["micro_batch"][0]) for batch in found] == list(range(2, 9))
    for batch in found:
        images = expected[int(batch["micro_batch"][0])]
        assert batch.keys() - {"stage_seconds"} == (
            images.keys() - {TOP, WRIST} | {f"{TOP}_features", f"{WRIST}_features"}
        )
        assert torch.equal(batch["action"], images["action"])
        assert (batch["stage_seconds"] > 0).all(), "reading, decoding and the tower say what they took"
        for camera in (TOP, WRIST):
            features = policy.image_features(camera, images[camera])
            torch.testing.assert_close(batch[f"{camera}_features"], features, rtol=1e-5, atol=1e-5)


def test_features_that_do_not_fit_are_named_with_what_differs(own, policy_path):
    dataset = open_dataset(str(own))
    box = (64, 64)

    def reason(**changes):
        wanted = {"weights": stored.recipe.weights, "image_box": box} | changes
        return features.found(open_dataset(str(own)), **wanted)

    assert features.found(dataset, weights="x", image_box=box)[1].endswith(
        "has no features; jobs/cache_features.py computes them"
    )
    stored = encode(own, policy_path, "bfloat16")
    assert reason() == ([stored], "")
    assert "is of another checkpoint: vision weights" in reason(weights="0" * 64)[1]
    assert (
        "is of images in (64, 64), the policy's resize_imgs_with_padding is (96, 96)"
        in reason(image_box=(96, 96))[1]
    )
    exact = encode(own, policy_path)
    assert reason() == ([exact, stored], "")
    assert reason(only=stored.recipe.fingerprint) == ([stored], "")
    Path(exact.uri, "info.json").unlink()
    assert reason() == ([stored], "")
    (path,) = list(Path(stored.uri).rglob("file-001.parquet"))
    path.unlink()
    found, why = reason()
    assert found == []
    assert "is not finished" in why
    lacking = f"lacks 1 of {len(dataset.files)} data files as they are now, {dataset.files[1]} first"
    assert lacking in why


def test_only_what_was_appended_is_computed_and_damaged_files_are_again(own, policy_path):
    stored = encode(own, policy_path)
    before = files_of(Path(stored.uri))
    ingested(ToySource(lengths=(20, 18), number=2), own, append=True, shard_bytes=SHARD_BYTES)
    dataset = open_dataset(str(own))
    assert missing_files(stored, dataset) == [len(before)]
    assert encode(own, policy_path) == stored
    after = files_of(Path(stored.uri))
    assert [after[name].st_mtime_ns for name in before] == [before[name].st_mtime_ns for name in before]
    assert len(after) == len(before) + 1
    path = Path(stored.path(dataset.files[1]))
    path.write_bytes(path.read_bytes()[:-20])
    assert missing_files(stored, dataset) == [1]


def test_a_dataset_of_others_is_covered_too(own, policy_path):
    """Without our notes its row groups are found in the footers, and its files are known by name and size."""
    info = json.loads((own / "meta/info.json").read_text())
    del info["row_group_frames"]
    (own / "meta/info.json").write_text(json.dumps(info))
    for path in (own / "meta/episodes").rglob("*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns(["sha256", "data/row_group_index"]), path)
    stored = encode(own, policy_path)
    assert missing_files(stored, open_dataset(str(own))) == []
    next(reader_of(own, stored).encoded(0))


def test_what_does_not_fit_on_the_disk_is_refused_with_both_sizes(own, policy_path):
    dataset, _, stored = planned(own, policy_path)
    needed = caching.needed_bytes(dataset, stored, range(len(dataset.files)))
    encode(own, policy_path)
    written = sum(stat.st_size for stat in files_of(Path(stored.uri)).values())
    assert written == pytest.approx(needed, rel=0.05)
    caching.check_space(stored.uri, needed)
    free = psutil.disk_usage(str(own)).free
    with pytest.raises(ValueError, match=r"the features need \d+\.\d\d GB, .* has \d+\.\d\d GB free"):
        caching.check_space(stored.uri, 2 * free)


# ---- the same training -------------------------------------------------------------------------------------


def curve(reader, policy_path, precision, steps=50):
    """Losses and the policy after some steps of the engine over the reader's rows."""
    train = replace(TRAIN, steps=steps, precision=precision)
    engine = Engine(SmolVLAPolicy.from_pretrained(policy_path), train)
    batches = (ToTorch()(reader.decoded(table)) for group in range(steps) for table in reader.encoded(group))
    losses = []
    for step in range(1, steps + 1):
        numbers = range((step - 1) * train.micro_batches, step * train.micro_batches)
        losses.append(
            engine.step(step, [(m, next(batches)) for m in numbers], count=len(numbers)).loss.item()
        )
    return losses, engine.policy


@pytest.mark.parametrize(
    ("precision", "dtype", "bound"), [("float32", "float32", 1e-5), ("bfloat16", "bfloat16", 2e-2)]
)
def test_fifty_steps_from_features_are_those_from_images(own, policy_path, tmp_path, precision, dtype, bound):
    stored = encode(own, policy_path, dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        expected, _ = curve(reader_of(own), policy_path, precision)
        found, policy = curve(reader_of(own, stored), policy_path, precision)
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(threads)
    assert found == pytest.approx(expected, rel=bound)
    assert max(found) > 1.2 * min(found)
    policy.save_pretrained(tmp_path / "exported")
    exported = SmolVLAPolicy.from_pretrained(tmp_path / "exported")
    start = SmolVLAPolicy.from_pretrained(policy_path)
    assert exported.state_dict().keys() == start.state_dict().keys()
    assert torch.equal(exported.model.action_in_proj.weight, policy.model.action_in_proj.weight)
    assert not torch.equal(exported.model.action_in_proj.weight, start.model.action_in_proj.weight)
