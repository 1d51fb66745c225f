"""Windows at the policy's frame rate and observation histories, against the episodes they come from."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toys import LENGTHS

from jobs import training_data
from jobs.training_data import DatasetOptions
from pipelines.samples import ROW_IDS, SampleReader, StreamConfig
from pipelines.tensors import ToTorch
from pipelines.windows import frame_steps
from smolvla.configuration import SmolVLAConfig
from smolvla.modeling import SmolVLAPolicy

H = 10  # of the tiny policy
TOP, WRIST = "observation.images.top", "observation.images.wrist"
TINY = SmolVLAConfig.from_pretrained("configs/policy/tiny")


@pytest.mark.parametrize(
    ("data_fps", "policy_fps", "expected"),
    [
        (10, 10, [0, 1, 2, 3, 4]),
        (30, 10, [0, 3, 6, 9, 12]),
        (30, 20, [0, 2, 3, 5, 6]),  # 0, 1.5, 3, 4.5, 6: the later one of two that are equally near
        (30, 12, [0, 3, 5, 8, 10]),  # 0, 2.5, 5, 7.5, 10
        (25, 15, [0, 2, 3, 5, 7]),  # 0, 1.67, 3.33, 5, 6.67
        (29.97, 9.99, [0, 3, 6, 9, 12]),
    ],
)
def test_the_policys_frames_are_the_nearest_ones_of_the_data(data_fps, policy_fps, expected):
    assert frame_steps(5, data_fps=data_fps, policy_fps=policy_fps).tolist() == expected


def test_a_policy_faster_than_its_data_is_refused(episodes):
    with pytest.raises(ValueError, match="fps 30 is above the 10 frames a second of the data"):
        frame_steps(5, data_fps=10, policy_fps=30)
    with pytest.raises(ValueError, match=r"dataset.fps 30 is above the 10 frames a second of .*toy episodes"):
        training_data.opened(DatasetOptions(path=str(episodes), fps=30), rename={})
    with pytest.raises(ValueError, match=r"dataset.fps -1 is not positive"):
        DatasetOptions(fps=-1)


def reader_of(episodes, *, fps=None, num_observations=1):
    data = training_data.opened(DatasetOptions(path=str(episodes), fps=fps), rename={})
    config = training_data.fitted(TINY.changed(n_obs_steps=num_observations), data, policy_path="tiny")
    stream = StreamConfig(seed=3, micro_batch=8, mixing_rows=32)
    sources = training_data.sources(data, config)
    return config, SampleReader(
        sources, stream, H, config.resize_imgs_with_padding, fps=data.fps, num_observations=num_observations
    )


def by_row(reader):
    """(episode, frame) -> its arrays, over one epoch."""
    rows = {}
    for group in range(sum(LENGTHS) // reader.config.mixing_rows):
        for encoded in reader.encoded(group):
            batch = reader.decoded(encoded)
            for i, key in enumerate(zip(batch["episode_index"], batch["frame_index"], strict=True)):
                rows[tuple(map(int, key))] = {name: values[i] for name, values in batch.items()}
    return rows


@pytest.mark.parametrize(
    ("fps", "steps"), [(5, [2 * k for k in range(H)]), (4, [0, 3, 5, 8, 10, 13, 15, 18, 20, 23])]
)
def test_a_slower_policy_gets_every_frame_with_the_actions_of_its_own_rate(episodes, fps, steps):
    """10 Hz data; windows of up to 23 frames reach over three row groups."""
    _, reader = reader_of(episodes, fps=fps)
    rows = by_row(reader)
    assert set(rows) == {(e, f) for e, length in enumerate(LENGTHS) for f in range(length)}
    for (episode, frame), row in rows.items():
        frames = frame + np.array(steps)
        last = LENGTHS[episode] - 1
        t = np.minimum(frames, last)[:, None] / 10 + episode
        actions = reader.sources[0].normalizer.unnormalize("action", row["action"])
        np.testing.assert_allclose(actions, np.cos(t * [1, 2, 3, 4]), atol=1e-5)
        np.testing.assert_array_equal(row["action_is_pad"], frames > last)


def test_a_history_holds_the_moments_before_at_the_policys_rate_and_stays_in_the_episode(episodes):
    """Three moments at 2 Hz of 10 Hz data: frames t - 10, t - 5 and t; the toy's row groups have 16."""
    _, now = reader_of(episodes)
    _, reader = reader_of(episodes, fps=2, num_observations=3)
    single, rows = by_row(now), by_row(reader)
    assert rows.keys() == single.keys()
    for (episode, frame), row in rows.items():
        for place, back in enumerate((10, 5, 0)):
            expected = single[episode, max(frame - back, 0)]
            for name in ("observation.state", TOP, WRIST):
                np.testing.assert_array_equal(row[name][place], expected[name])
        steps = frame + 5 * np.arange(H)
        np.testing.assert_array_equal(row["action_is_pad"], steps >= LENGTHS[episode])


def test_a_history_changes_no_loss_because_smolvla_looks_at_the_last_moment(episodes):
    config, reader = reader_of(episodes, num_observations=2)
    _, now = reader_of(episodes)
    torch.manual_seed(0)
    policy = SmolVLAPolicy(config, allow_random_vlm=True).eval()
    found = []
    for one in (reader, now):
        columns = ToTorch()(one.decoded(next(one.encoded(2))))
        batch = {name: column for name, column in columns.items() if name not in ROW_IDS}
        noise = torch.randn(8, H, config.max_action_dim, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            out = policy(**policy.prepare_inputs(batch), noise=noise, time=torch.linspace(0.1, 1, 8))
        found.append((batch[TOP].shape[:-2], out["per_sample_loss"]))
    assert [tuple(shape) for shape, _ in found] == [(8, 2, 3), (8, 3)]
    assert torch.equal(found[0][1], found[1][1])


def test_datasets_of_several_rates_need_a_word_about_the_policys(episodes, other_episodes, tmp_path):
    import json
    import shutil

    faster = tmp_path / "faster"
    shutil.copytree(other_episodes, faster)
    info = json.loads((faster / "meta/info.json").read_text())
    (faster / "meta/info.json").write_text(json.dumps(info | {"fps": 30}))
    options = DatasetOptions(mixture=[{"path": str(episodes)}, {"path": str(faster)}])
    with pytest.raises(
        ValueError, match=r"toy episodes has 10 frames a second and .*faster 30; say with data"
    ):
        training_data.opened(options, rename={})
    data = training_data.opened(replace(options, fps=5), rename={})
    config = training_data.fitted(TINY, data, policy_path="tiny")
    sources = training_data.sources(data, config)
    stream = StreamConfig(seed=3, micro_batch=8, mixing_rows=32)
    reader = SampleReader(sources, stream, H, config.resize_imgs_with_padding, fps=data.fps)
    assert [reader.frame_steps(source, 4).tolist() for source in (0, 1)] == [[0, 2, 4, 6], [0, 6, 12, 18]]
