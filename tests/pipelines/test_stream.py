"""The stream: real Parquet through real Ray Data, every number compared with the episodes it came from."""

import io
import itertools
import os
import struct
import subprocess
import sys
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from toys import LENGTHS, TASKS, with_cut_image

from pipelines.dataset import open_dataset
from pipelines.samples import SampleReader, Source, StreamConfig
from pipelines.stream import deal, execution_options, micro_batches, shares
from pipelines.tensors import Decoded, Unpacked
from smolvla.data_utils import tokenize_tasks
from smolvla.features import Normalizer

H = 10


@pytest.fixture(scope="module")
def reader(episodes):
    dataset = open_dataset(str(episodes))
    inputs, outputs = dataset.policy_features()
    mapping = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
    normalizer = Normalizer(dataset.stats, inputs | outputs, mapping)
    tokens, mask = tokenize_tasks(dataset.tasks, "configs/policy/tiny/vlm", max_length=48)
    config = StreamConfig(seed=3, micro_batch=8, mixing_rows=32)
    return SampleReader([Source(dataset, normalizer, tokens, mask)], config, chunk_size=H, image_box=(28, 28))


def test_an_opened_dataset_knows_its_episodes_tasks_and_row_groups(reader):
    dataset = reader.sources[0].dataset
    assert dataset.tasks == TASKS
    assert dataset.episode_length.tolist() == list(LENGTHS)
    assert dataset.camera_names == ["observation.images.top", "observation.images.wrist"]
    for unit in range(len(dataset.row_groups)):
        file = dataset.open_file(int(dataset.row_groups.file[unit]))
        table = file.read_row_group(
            int(dataset.row_groups.group[unit]), columns=["episode_index", "frame_index"]
        )
        assert len(table) == dataset.row_groups.rows[unit] <= 16
        assert set(table["episode_index"].to_pylist()) == {dataset.row_groups.episode[unit]}
        assert table["frame_index"][0].as_py() == dataset.row_groups.first_frame[unit]


def test_a_dataset_of_others_gives_the_same_rows_whatever_its_row_groups(reader, episodes, tmp_path):
    """Without our notes the footers are read; here all episodes of a file lie in one large row group."""
    import json
    import shutil

    other = tmp_path / "others"
    shutil.copytree(episodes, other)
    info = json.loads((other / "meta/info.json").read_text())
    del info["row_group_frames"]
    (other / "meta/info.json").write_text(json.dumps(info))
    for file in (other / "data").rglob("*.parquet"):
        pq.write_table(pq.read_table(file), file, row_group_size=100)
    dataset = open_dataset(str(other))
    assert dataset.row_groups.rows.sum() == sum(LENGTHS)
    assert dataset.row_groups.skip.max() > 0
    source = reader.sources[0]
    theirs = SampleReader(
        [Source(dataset, source.normalizer, source.tokens, source.token_mask)], reader.config, H, (28, 28)
    )
    everything = [by_row(reader), by_row(theirs)]
    assert everything[0].keys() == everything[1].keys()
    for key, row in everything[0].items():
        for name, values in row.items():
            np.testing.assert_array_equal(values, everything[1][key][name], err_msg=f"{key} {name}")


def test_a_uri_is_read_by_several_threads_and_gives_the_same_rows(reader, episodes):
    source = replace(reader.sources[0], dataset=open_dataset(episodes.as_uri()))
    theirs = SampleReader([source], reader.config, H, (28, 28))
    for ours, found in zip(reader.encoded(1), theirs.encoded(1), strict=True):
        assert found.equals(ours)


def test_renamed_cameras_carry_the_pixels_of_their_columns_even_when_names_are_swapped(reader):
    top, wrist = reader.camera_names
    swapped = SampleReader(
        [replace(reader.sources[0], rename={top: wrist, wrist: top})], reader.config, H, (28, 28)
    )
    assert swapped.camera_names == [wrist, top]
    batch, other = (r.decoded(next(r.encoded(0))) for r in (reader, swapped))
    np.testing.assert_array_equal(batch[top], other[wrist])
    np.testing.assert_array_equal(batch[wrist], other[top])
    assert not np.array_equal(batch[top], batch[wrist])


def test_a_row_with_an_image_cut_off_is_marked_and_masked_and_no_other_is_touched(reader, episodes, tmp_path):
    camera = "observation.images.wrist"
    with_cut_image(episodes, tmp_path / "broken", episode=2, frame=5, camera=camera)
    source = replace(reader.sources[0], dataset=open_dataset(str(tmp_path / "broken")))
    theirs = SampleReader([source], reader.config, H, (28, 28))
    expected, found, marked = by_row(reader), by_row(theirs), []
    for group in range(sum(LENGTHS) // reader.config.mixing_rows):
        for encoded in theirs.encoded(group):
            batch = theirs.decoded(encoded)
            for i in np.flatnonzero(batch["bad_cameras"]):
                row = (int(batch["episode_index"][i]), int(batch["frame_index"][i]))
                marked.append((*row, batch["bad_cameras"][i]))
    assert marked == [(2, 5, 1 << theirs.camera_names.index(camera))]
    assert found[(2, 5)]["action_is_pad"].all()
    assert not found[(2, 5)][camera].any()
    for key in expected.keys() - {(2, 5)}:
        for name, values in expected[key].items():
            np.testing.assert_array_equal(values, found[key][name])


def by_row(reader):
    """(episode, frame) -> its arrays, over one epoch."""
    rows = {}
    for group in range(sum(LENGTHS) // reader.config.mixing_rows):
        for encoded in reader.encoded(group):
            batch = reader.decoded(encoded)
            for i in range(len(batch["frame_index"])):
                key = (int(batch["episode_index"][i]), int(batch["frame_index"][i]))
                names = ("observation.state", "action", "action_is_pad", *reader.camera_names)
                rows[key] = {name: batch[name][i] for name in names}
    return rows


def test_windows_states_tokens_and_pixels_are_those_of_the_episode(reader):
    source = reader.sources[0]
    for (episode, frame), row in by_row(reader).items():
        length = LENGTHS[episode]
        steps = np.arange(frame, frame + H)
        t = np.minimum(steps, length - 1)[:, None] / 10 + episode
        actions = np.cos(t * [1, 2, 3, 4]).astype(np.float32)
        np.testing.assert_allclose(source.normalizer.unnormalize("action", row["action"]), actions, atol=1e-5)
        np.testing.assert_array_equal(row["action_is_pad"], steps >= length)
        state = np.sin((frame / 10 + episode) * np.array([1, 2, 3])).astype(np.float32)
        np.testing.assert_allclose(
            source.normalizer.unnormalize("observation.state", row["observation.state"]), state, atol=1e-5
        )


def test_shrinking_equals_the_models_own_resize_within_rounding(reader, episodes):
    torch = pytest.importorskip("torch")
    from smolvla.data_utils import resize_with_pad

    file = next((episodes / "data").rglob("*.parquet"))
    table = pq.read_table(file)
    rows = by_row(reader)
    camera = "observation.images.top"
    for i in (0, 16, 100):
        stored = np.asarray(Image.open(io.BytesIO(table[camera][i]["bytes"].as_py())).convert("RGB"))
        key = (table["episode_index"][i].as_py(), table["frame_index"][i].as_py())
        ours = rows[key][camera]
        assert ours.shape == (20, 28, 3)
        whole = resize_with_pad(torch.from_numpy(stored.copy()).permute(2, 0, 1)[None].float(), (28, 28))
        expected = whole[0, :, 8:].permute(1, 2, 0).numpy()  # the padding is on top
        assert np.abs(ours - expected).max() <= 1.0


def test_task_tokens_belong_to_the_row(reader):
    source = reader.sources[0]
    batch = reader.decoded(next(reader.encoded(0)))
    for i, episode in enumerate(batch["episode_index"]):
        np.testing.assert_array_equal(batch["observation.language.tokens"][i], source.tokens[episode % 2])
        np.testing.assert_array_equal(
            batch["observation.language.attention_mask"][i], source.token_mask[episode % 2]
        )


def test_ray_gives_worker_r_the_micro_batches_of_the_plan_from_any_position(reader, ray_session, monkeypatch):
    """In two of them, a read task takes several mixing groups; in one, the workers decode."""
    expected = {}
    for group in range(8):
        for encoded in reader.encoded(group):
            batch = reader.decoded(encoded)
            expected[int(batch["micro_batch"][0])] = batch
    cases = [(2, 6, 6, "none"), (1, 0, 6, "tasks"), (3, 5, 24, "tasks"), (2, 5, 24, "workers")]
    for workers, start, count, dealt in cases:
        monkeypatch.setattr("pipelines.stream.MOST_READ_TASKS", 2 if count > 6 else 256)
        decoding = "workers" if dealt == "workers" else "tasks"
        dataset = micro_batches(reader, start=start, stop=start + count, decoding=decoding)
        if dealt != "none":
            deal(dataset, num_workers=workers)
        dataset.context.execution_options = execution_options(decoding, num_workers=workers)
        decoder = reader if decoding == "workers" else None
        task = ray_session.remote(num_cpus=0)(consumed)
        shares = ray_session.get(
            [task.remote(split, decoder) for split in dataset.streaming_split(workers, equal=True)]
        )
        for rank, batches in enumerate(shares):
            numbers = [batch["micro_batch"].tolist() for batch in batches]
            assert numbers == [[m] * 8 for m in range(start + rank, start + count, workers)]
            for batch in batches:
                assert_same_batch(batch, expected[int(batch["micro_batch"][0])], reader.camera_names)


@pytest.mark.parametrize("size", [(30_000, 30_000), (65_000, 65_000), (2_000, 2_000)])
def test_an_image_with_a_damaged_header_is_a_bad_row_whatever_size_it_declares(reader, size):
    """2.7 GB would be taken for the first, and the second is more than OpenCV ever decodes."""
    camera = reader.camera_names[0]
    table = next(reader.encoded(0))
    images = table[camera].to_pylist()
    start = images[3].index(b"\xff\xc0") + 5  # of the frame: length, precision, then height and width
    images[3] = images[3][:start] + struct.pack(">HH", *size) + images[3][start + 4 :]
    place = table.schema.get_field_index(camera)
    batch = reader.decoded(table.set_column(place, camera, pa.array(images, pa.large_binary())))
    assert batch["bad_cameras"].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    assert batch["action_is_pad"][3].all()
    assert not batch[camera][3].any()


def test_images_are_decoded_into_memory_that_nobody_holds_any_more(reader):
    camera, reader = reader.camera_names[0], replace(reader)  # with no memory from another test
    tables = list(reader.encoded(0))
    held = reader.decoded(tables[0])[camera][2:3]
    copy = held.copy()
    second = reader.decoded(tables[1])[camera]
    np.testing.assert_array_equal(held, copy)
    assert not np.shares_memory(held, second)
    place = second.__array_interface__["data"][0]
    third = reader.decoded(tables[2])[camera]
    assert not np.shares_memory(second, third)
    del second
    assert reader.decoded(tables[2])[camera].__array_interface__["data"][0] == place


def test_rows_are_put_together_in_memory_that_nobody_holds_any_more(reader):
    apart = [table.to_pylist() for group in range(3) for table in replace(reader).encoded(group)]
    theirs, column = replace(reader), reader.camera_names[0]
    held = [table for group in range(3) for table in theirs.encoded(group)]
    assert [table.to_pylist() for table in held] == apart  # each kept its bytes while others were read
    addresses = [table[column].chunk(0).buffers()[2].address for table in held]
    del held
    again = [
        table[column].chunk(0).buffers()[2].address for group in range(3) for table in theirs.encoded(group)
    ]
    assert set(again) & set(addresses)
    assert len(set(again)) <= 4 * len(reader.camera_names)


def test_a_process_that_decodes_waits_for_no_import_of_torch_and_transformers():
    """Ray starts many of them, and each would hold 280 MB of its own."""
    script = "import sys, pipelines.stream; print(*{'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def consumed(split, decoder):
    """What a worker sees of its share."""
    batches = Unpacked(split, 8, pin_memory=False)
    if decoder is not None:
        batches = Decoded(decoder, split.iter_batches(batch_size=None, batch_format="pyarrow"), threads=3)
    found = [{name: tensor.numpy().copy() for name, tensor in batch.items()} for batch in batches]
    assert batches.rows_ready == sum(len(batch["action"]) for batch in found)
    assert all((batch["stage_seconds"][:, :2] > 0).all() for batch in found)
    return found


@pytest.fixture(scope="module")
def blocks(reader, ray_session):
    """Those of one worker that decodes."""
    dataset = micro_batches(reader, start=0, stop=8, decoding="workers")
    deal(dataset, num_workers=1)
    dataset.context.execution_options = execution_options("workers", num_workers=1)
    (split,) = dataset.streaming_split(1, equal=True)
    whole: Any = None  # blocks; Ray's hint knows only numbers of rows
    return list(split.iter_batches(batch_size=whole, batch_format="pyarrow"))


def test_an_error_of_the_stream_reaches_who_trains_after_what_came_before_it(reader, blocks):
    def broken():
        yield from blocks
        raise ConnectionError("the node is gone")

    found = []
    with pytest.raises(ConnectionError, match="the node is gone"):
        found.extend(Decoded(reader, broken(), threads=2))
    assert [batch["micro_batch"][0].item() for batch in found] == list(range(8))


def test_who_stops_in_the_middle_leaves_no_thread_behind(reader, blocks):
    def threads():
        return [t for t in threading.enumerate() if t.name == "blocks" or t.name.startswith("decode")]

    assert not threads()
    batches = iter(Decoded(reader, itertools.cycle(blocks), threads=2))
    for _ in range(20):
        next(batches)
    assert len(threads()) == 3
    batches.close()
    for thread in threads():
        thread.join(timeout=10)
    assert not threads()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread has no nice value of its own")
def test_threads_that_decode_step_aside_and_the_one_that_trains_does_not(reader, blocks):
    batches = iter(Decoded(reader, itertools.cycle(blocks), threads=2))
    next(batches)
    threads = [(t.name, t.native_id) for t in threading.enumerate()]
    nice = {name: os.getpriority(os.PRIO_PROCESS, number) for name, number in threads if number is not None}
    batches.close()
    before = os.getpriority(os.PRIO_PROCESS, 0)
    assert nice["MainThread"] == nice["blocks"] == before
    assert {value for name, value in nice.items() if name.startswith("decode")} == {min(before + 5, 19)}


def assert_same_batch(found, expected, cameras):
    for name in expected.keys() - set(cameras):
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    for camera in cameras:
        np.testing.assert_array_equal(found[camera].transpose(0, 2, 3, 1), expected[camera])


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("meta/info.json", lambda info: info.pop("fps"), "field 'fps' is missing"),
        ("meta/info.json", lambda info: info.update(codebase_version="v2.1"), "codebase_version 'v2.1'"),
        ("meta/info.json", lambda info: info["features"].pop("action"), "features has no 'action'"),
        ("meta/info.json", lambda info: info.update(total_frames=5), "total_frames 5"),
    ],
)
def test_a_dataset_that_cannot_be_used_is_refused_with_file_and_field(
    episodes, tmp_path, file, change, message
):
    import json
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(episodes / "meta", broken / "meta")
    content = json.loads((broken / file).read_text())
    change(content)
    (broken / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        open_dataset(str(broken))
    assert str(broken) in str(error.value)


def test_a_folder_that_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no meta/info\.json"):
        open_dataset(str(tmp_path))


@given(
    start=st.integers(0, 200),
    group=st.integers(0, 3),
    count=st.integers(1, 60),
    num_workers=st.integers(1, 9),
    size=st.integers(1, 12),
)
def test_blocks_are_dealt_in_turn_and_hold_each_workers_micro_batches_in_order(
    start, group, count, num_workers, size
):
    first = start + group * count
    lists = list(shares(first, first + count, start=start, num_workers=num_workers, size=size))
    assert len(lists) % num_workers == 0
    assert max(map(len, lists)) <= size
    for rank in range(num_workers):
        mine = [m for numbers in lists[rank::num_workers] for m in numbers]
        assert mine == [m for m in range(first, first + count) if (m - start) % num_workers == rank]
