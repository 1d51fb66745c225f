"""A mixture in the stream: every row is what its own dataset makes of it, and what it lacks is masked."""

import io

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from toys import copied

from jobs import training_data
from jobs.training_data import DatasetOptions
from pipelines.samples import ROW_IDS, SampleReader, StreamConfig
from pipelines.tensors import ToTorch
from smolvla.configuration import SmolVLAConfig
from smolvla.data_utils import resize_with_pad
from smolvla.modeling import SmolVLAPolicy

TOP, WRIST, SIDE = (f"observation.images.{name}" for name in ("top", "wrist", "side"))
LEFT = "observation.images.left"
TINY = SmolVLAConfig.from_pretrained("configs/policy/tiny")
STREAM = StreamConfig(seed=3, micro_batch=8, mixing_rows=32)


def prepared(options, *, box=(48, 48), rename=None):
    """(config, reader) of a tiny policy on the datasets that the options name."""
    data = training_data.opened(options, rename=rename or {})
    template = TINY.changed(resize_imgs_with_padding=list(box) if box else None)
    config = training_data.fitted(template, data, policy_path="tiny")
    sources = training_data.sources(data, config)
    return config, SampleReader(sources, STREAM, config.chunk_size, box, fps=data.fps)


@pytest.fixture(scope="module")
def mixture(episodes, other_episodes):
    entries = [
        {"path": str(episodes), "weight": 3},
        {"path": str(other_episodes), "weight": 1, "rename": {SIDE: LEFT}},
    ]
    return prepared(DatasetOptions(mixture=entries))


def rows_of(reader, *, groups):
    """(source, episode, frame) -> the row's arrays."""
    rows = {}
    for group in range(groups):
        for encoded in reader.encoded(group):
            batch = reader.decoded(encoded)
            for i, key in enumerate(
                zip(batch["source"], batch["episode_index"], batch["frame_index"], strict=True)
            ):
                rows[tuple(map(int, key))] = {name: values[i] for name, values in batch.items()}
    return rows


def test_cameras_are_the_union_in_the_order_of_the_datasets(mixture):
    config, reader = mixture
    assert reader.camera_names == [TOP, WRIST, LEFT]
    assert config.camera_names == [TOP, WRIST, LEFT]
    assert reader.cameras_that_some_lack == [WRIST, LEFT]


def test_a_row_of_a_mixture_is_the_row_that_its_dataset_alone_gives(mixture, episodes, other_episodes):
    _, reader = mixture
    rows = rows_of(reader, groups=4)
    alone = [
        rows_of(prepared(DatasetOptions(path=str(episodes)))[1], groups=10),
        rows_of(prepared(DatasetOptions(path=str(other_episodes)), rename={SIDE: LEFT})[1], groups=3),
    ]
    assert {source for source, _, _ in rows} == {0, 1}
    for (source, episode, frame), row in rows.items():
        assert np.isin(row["observation.language.tokens"], reader.words).all()
        expected = alone[source][0, episode, frame]
        for name in ("observation.state", "action", "action_is_pad"):
            np.testing.assert_array_equal(row[name], expected[name], err_msg=name)
        length = len(expected["observation.language.tokens"])
        np.testing.assert_array_equal(
            row["observation.language.tokens"][:length], expected["observation.language.tokens"]
        )
        assert not row["observation.language.attention_mask"][length:].any()
        own, lacking = (WRIST, LEFT) if source == 0 else (LEFT, WRIST)
        np.testing.assert_array_equal(row[own], expected[own])
        assert row[f"{own}_padding_mask"]
        assert not row[f"{lacking}_padding_mask"]
        assert not row[lacking].any()
        assert f"{TOP}_padding_mask" not in row
        assert row["bad_cameras"] == 0


def test_datasets_have_their_own_statistics(mixture):
    _, reader = mixture
    rows = rows_of(reader, groups=4)
    for source, scale in ((0, 1.0), (1, 5.0)):
        for (number, episode, frame), row in rows.items():
            if number != source:
                continue
            state = scale * np.sin((frame / 10 + episode) * np.array([1, 2, 3]))
            found = reader.sources[source].normalizer.unnormalize(
                "observation.state", row["observation.state"]
            )
            np.testing.assert_allclose(found, state, atol=1e-5)
    deviation = [s.dataset.stats["observation.state"]["std"][0] for s in reader.sources]
    assert deviation[1] > 4 * deviation[0]


def test_images_of_several_sizes_are_fitted_as_the_policy_fits_them(mixture):
    _, reader = mixture
    assert reader.image_size(TOP) == (48, 48)  # the box: (34, 48) and (32, 40) have no size in common
    assert reader.image_size(WRIST) == (34, 48)
    batch = next(reader.encoded(0))
    found = reader.decoded(batch)
    assert set(found["source"]) == {0, 1}
    for i, encoded in enumerate(batch[TOP]):
        stored = np.asarray(Image.open(io.BytesIO(encoded.as_py())).convert("RGB"))
        image = torch.from_numpy(stored.copy()).permute(2, 0, 1)[None].float()
        expected = resize_with_pad(image, (48, 48))[0].permute(1, 2, 0).numpy()
        assert np.abs(found[TOP][i] - expected).max() <= 1.0


def test_a_camera_that_a_dataset_lacks_takes_no_part_in_the_loss_of_its_rows(mixture):
    config, reader = mixture
    torch.manual_seed(0)
    policy = SmolVLAPolicy(config, allow_random_vlm=True).eval()
    columns = ToTorch()(reader.decoded(next(reader.encoded(0))))
    batch = {name: column for name, column in columns.items() if name not in ROW_IDS}
    noise = torch.randn(8, config.chunk_size, config.max_action_dim)
    time = torch.rand(8)

    def losses(batch):
        with torch.no_grad():
            out = policy(**policy.prepare_inputs(batch), noise=noise[: len(batch["action"])], time=time)
        return out["per_sample_loss"]

    found = losses(batch)
    for camera in (WRIST, LEFT):
        mask = batch[f"{camera}_padding_mask"]
        assert set(mask.tolist()) == {True, False}
        garbage = torch.where(mask[:, None, None, None], batch[camera], torch.full_like(batch[camera], 77))
        assert torch.equal(losses(batch | {camera: garbage}), found)
        seen = batch | {camera: garbage, f"{camera}_padding_mask": torch.ones(8, dtype=torch.bool)}
        assert not torch.isclose(losses(seen), found)[~mask].any()
    # without a mask, the camera left out altogether: fewer tokens in the sums, so equal but for rounding
    for source, camera in ((0, LEFT), (1, WRIST)):
        mine = columns["source"] == source
        without = {n: c for n, c in batch.items() if n not in (camera, f"{camera}_padding_mask")}
        torch.testing.assert_close(losses(without)[mine], found[mine], rtol=1e-5, atol=1e-6)


def test_others_write_state_and_action_in_float64(episodes, tmp_path):
    """Beside float32 of another dataset they are the same rows."""
    copied(episodes, tmp_path / "double", change=doubled)
    entries = [{"path": str(path), "name": path.name} for path in (episodes, tmp_path / "double")]
    _, reader = prepared(DatasetOptions(mixture=entries))
    rows = rows_of(reader, groups=20)
    for source, episode, frame in list(rows):
        for name in ("observation.state", "action"):
            one, other = (rows[number, episode, frame][name] for number in (source, 0))
            assert one.dtype == np.float32
            np.testing.assert_array_equal(one, other)


def doubled(table):
    for name in ("observation.state", "action"):
        width = table.schema.field(name).type.list_size
        column = table[name].cast(pa.list_(pa.float64(), width))
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table


def test_equal_sizes_are_handed_on_as_before_and_without_masks(episodes):
    entries = [{"path": str(episodes), "name": name} for name in ("a", "b")]
    _, reader = prepared(DatasetOptions(mixture=entries))
    _, alone = prepared(DatasetOptions(path=str(episodes)))
    assert reader.image_size(TOP) == alone.image_size(TOP) == (34, 48)
    assert not any(name.endswith("_padding_mask") for name in reader.decoded(next(reader.encoded(0))))


def test_sizes_that_differ_are_refused_where_the_policy_takes_images_as_they_are(episodes, other_episodes):
    entries = [{"path": str(path)} for path in (episodes, other_episodes)]
    with pytest.raises(
        ValueError, match=r"'observation.images.top' has several sizes .*\(40, 56\).*\(32, 40\)"
    ):
        prepared(DatasetOptions(mixture=entries), box=None)
