"""jobs/inspect_dataset.py tells what is in a dataset: counts, warnings, and pictures of the right frames."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from flawed_toy import LENGTHS, LIFT, ODD, TOP, WRIST, FlawedSource, colour_of, episode, ingested
from lerobot_toy import edit, replaced, write_json
from PIL import Image

from jobs import inspect_dataset
from jobs.command_line import parsed
from jobs.inspect_dataset import InspectDataset, with_path_flag
from pipelines import drawing
from pipelines.dataset import open_dataset
from pipelines.inspection import Look, episode_columns, inspect, looks, spread

ROOT = Path(__file__).parents[2]
COUNTED = sum(LENGTHS)


@pytest.fixture(scope="module")
def dataset_path(ray_session, tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "cups"
    ingested(FlawedSource(), root)
    return root


@pytest.fixture
def copy(dataset_path, tmp_path):
    return Path(shutil.copytree(dataset_path, tmp_path / "copy"))


def inspected(path, output, capsys, *flags):
    """Run the job in this process; return (its JSON line, the text before it)."""
    code = inspect_dataset.main(
        parsed(InspectDataset, with_path_flag([str(path), "--output", str(output), *flags]))
    )
    *text, line = capsys.readouterr().out.splitlines()
    assert code == 0
    return json.loads(line), "\n".join(text)


def refused(path, output, capsys, *flags):
    with pytest.raises(SystemExit) as error:
        inspected(path, output, capsys, *flags)
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


# --- what it says ---


def test_a_user_gets_text_two_pictures_and_one_json_line(dataset_path, tmp_path):
    job = subprocess.run(
        [sys.executable, str(ROOT / "jobs/inspect_dataset.py"), str(dataset_path)],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (job.returncode, job.stderr) == (0, "")
    line = json.loads(job.stdout.splitlines()[-1])
    assert (line["episodes"], line["frames"], line["tasks"]) == (5, COUNTED, 3)
    assert line["hours"] == pytest.approx(COUNTED / 10 / 3600, abs=1e-4)
    assert line["fingerprint"] == open_dataset(str(dataset_path)).fingerprint
    assert line["recorded"]["refused"] == {"video_missing": 1}
    for kind in ("contact_sheet", "curves"):
        assert line[kind] == f"outputs/inspect/cups/{kind}.png"
        with Image.open(tmp_path / line[kind]) as image:
            assert min(image.size) > 200


def test_the_text_has_counts_sizes_lengths_statistics_and_provenance(dataset_path, tmp_path, capsys):
    _, text = inspected(dataset_path, tmp_path, capsys)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for expected in (
        "episodes 5",
        "frames 151 at 10 fps, 0.3 minutes",
        "robot type toy",
        f"{TOP} camera, 32 x 24 pixels",
        "observation.state float32[3] x, y, gripper",
        f"0 4 episodes 130 frames {LIFT!r}",  # 40 + 30 + 50 + the first 10 of episode 4
        "1 1 episode 1 frame ' '",
        f"2 1 episode 20 frames {ODD!r}",
        "episode length min 1, median 30, max 50 frames (0.1, 3.0, 5.0 s)",
        "code 0123abc",
        "ingestion refused 1 episode; noted",
    ):
        assert expected in lines
    bars = [line for line in lines if line.endswith("#")]
    assert sum(int(line.partition("..")[2].split()[1]) for line in bars) == 5
    values = np.concatenate([episode(number).columns["action"] for number in range(len(LENGTHS))])
    column = values.astype(np.float32)[:, 0].astype(np.float64)
    numbers = [
        f"{value:.4g}"
        for value in (
            column.min(),
            np.quantile(column, 0.01),
            column.mean(),
            column.std(),
            np.quantile(column, 0.99),
            column.max(),
        )
    ]
    assert " ".join(["0 x", *numbers]) in lines


def test_every_flaw_is_a_warning_that_says_where(dataset_path, tmp_path, capsys):
    line, _ = inspected(dataset_path, tmp_path, capsys)
    for expected in (
        "observation.state[2] gripper: constant, always 0",
        "action[1] dy: min -500 in episode 3 is an outlier, 98 % of the values lie in -0.99",
        f"{WRIST}: a single colour throughout 1 episode (2)",
        f"{TOP}: the same picture in all 6 frames looked at of episode 3",
        "a single frame in 1 episode (1)",
        "task 1: the instruction of 1 frame is empty",
    ):
        assert any(warning.startswith(expected) for warning in line["warnings"]), expected
    assert not [warning for warning in line["warnings"] if "[0] x" in warning]


def test_refusals_are_read_from_their_table_where_there_is_one(copy, tmp_path, capsys):
    line, text = inspected(copy, tmp_path, capsys)
    assert line["recorded"]["refused"] == {"video_missing": 1}
    place = {"episode": "demo_7", "camera": TOP, "frame": 3, "reason": "dead_camera", "detail": "all alike"}
    rows = [place | {"kind": "warning"}] * 2 + [
        {
            "episode": "9",
            "camera": None,
            "frame": None,
            "reason": "empty",
            "detail": "0 rows",
            "kind": "refused",
        }
    ]
    (copy / "meta/refused.parquet").unlink(missing_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), copy / "meta/refused.parquet")
    line, text = inspected(copy, tmp_path, capsys)
    assert line["recorded"] == {"warning": {"dead_camera": 2}, "refused": {"empty": 1}}
    assert f"  warning dead_camera, 2 times\n    episode demo_7, camera {TOP}, frame 3: all alike" in text


# --- the pictures ---


def test_the_contact_sheet_shows_the_frames_it_names(dataset_path):
    dataset = open_dataset(str(dataset_path))
    seen = looks(dataset, episodes=3, moments=4)
    assert [(look.episode, look.frames) for look in seen] == [
        (0, (0, 13, 26, 39)),
        (2, (0, 10, 19, 29)),
        (4, (0, 10, 19, 29)),
    ]
    assert seen[2].tasks == (LIFT, ODD)
    sheet = np.asarray(drawing.contact_sheet(seen, title="cups", fps=10))
    for look in seen:
        for frame, image in zip(look.frames, look.images[TOP], strict=True):
            assert image is not None
            colour = colour_of(look.episode, frame)
            np.testing.assert_array_equal(np.asarray(image)[-1, -1], colour)
            # a tile is 220 pixels wide and 165 high, and shows its frame's colour almost everywhere
            assert (sheet == colour).all(axis=2).sum() > 0.8 * 220 * 165


def test_an_unreadable_image_is_shown_as_such_and_named(copy, tmp_path, capsys):
    def spoilt(table):
        images = table[TOP].to_pylist()
        images[0] = {"bytes": b"\\x89PNG no more", "path": "frame-000000.png"}
        small = io.BytesIO()
        Image.new("RGB", (8, 8)).save(small, "PNG")
        images[39] = {"bytes": small.getvalue(), "path": "frame-000039.png"}
        return replaced(table, TOP, pa.array(images, table.schema.field(TOP).type))

    edit(copy / "data/chunk-000/file-000.parquet", spoilt)
    info = json.loads((copy / "meta/info.json").read_text())
    del info["row_group_frames"]  # the row groups are others now
    write_json(copy / "meta/info.json", info)
    line, _ = inspected(copy, tmp_path, capsys, "--sheet_episodes", "1", "--sheet_moments", "2")
    found = [warning for warning in line["warnings"] if warning.startswith(f"{TOP}: episode 0")]
    assert found[0].startswith(f"{TOP}: episode 0, frame 0: the image cannot be decoded")
    assert found[1] == f"{TOP}: episode 0, frame 39: the image is 8x8, info.json declares 24x32"
    with Image.open(line["contact_sheet"]) as image:
        reds = (np.asarray(image) == (192, 57, 43)).all(axis=2).sum()
    assert reds > 50  # the word "unreadable"


def test_the_curves_are_the_values_over_seconds(dataset_path):
    dataset = open_dataset(str(dataset_path))
    columns = episode_columns(dataset, 3, ["observation.state", "action"])
    expected = episode(3).columns
    for name, values in columns.items():
        np.testing.assert_array_equal(values, expected[name].astype(np.float32))
    names = {"observation.state": ["x", "y", "gripper"], "action": ["x", "dy"]}
    figure = drawing.curves(columns, names, title=f"cups\n{ODD}", fps=10)
    panels = {axis.get_title(loc="left"): axis for axis in figure.axes}
    assert list(panels) == ["x", "state y", "state gripper", "action dy"]
    state, action = panels["x"].get_lines()  # the same name on both sides: one panel
    np.testing.assert_allclose(np.asarray(state.get_xdata()), np.arange(50) / 10)
    np.testing.assert_array_equal(state.get_ydata(), columns["observation.state"][:, 0])
    np.testing.assert_array_equal(action.get_ydata(), columns["action"][:, 0])
    assert panels["x"].get_xlabel() == "time [s]"
    figure.savefig(io.BytesIO())  # dollars in an instruction are no formula


def test_a_small_step_gets_an_axis_of_its_own_beside_a_position():
    position, step = np.linspace(100, 200, 20), np.full(20, 0.5) + np.linspace(0, 0.1, 20)
    vectors = {"observation.state": position[:, None], "action": step[:, None]}
    figure = drawing.curves(vectors, {"observation.state": ["z"], "action": ["z"]}, title="z", fps=10)
    assert len(figure.axes) == 2


def test_numbers_without_names_are_not_paired_and_too_many_are_left_out_aloud():
    vectors = {"observation.state": np.zeros((5, 40)), "action": np.zeros((5, 40))}
    names = {name: [str(i) for i in range(40)] for name in vectors}
    figure = drawing.curves(vectors, names, title="wide\nmany", fps=10)
    assert len([axis for axis in figure.axes if axis.get_visible()]) == drawing.MOST_PANELS
    assert "first 64 of 80 panels" in figure.get_suptitle()


def test_an_episode_of_one_frame_can_be_drawn(dataset_path, tmp_path, capsys):
    line, _ = inspected(dataset_path, tmp_path, capsys, "--episode", "1")
    with Image.open(line["curves"]) as image:
        blue = np.abs(np.asarray(image.convert("RGB")).astype(int) - (31, 111, 180)).sum(axis=2)
    assert (blue < 30).sum() > 20  # the legend's line, and a dot in every panel of the state


@pytest.mark.parametrize(
    ("count", "at_most", "expected"), [(5, 3, (0, 2, 4)), (2, 6, (0, 1)), (1, 6, (0,)), (9, 1, (0,))]
)
def test_places_are_spread_from_the_first_to_the_last(count, at_most, expected):
    assert spread(count, at_most=at_most) == expected


def test_a_sheet_of_short_and_long_episodes_is_as_wide_as_the_longest_needs():
    image = Image.new("RGB", (64, 48))
    bands = [
        Look(
            episode=number,
            num_frames=moments,
            tasks=("a long instruction " * 40,),
            frames=tuple(range(moments)),
            images={TOP: (image,) * moments},
            warnings=(),
        )
        for number, moments in enumerate((1, 5))
    ]
    one, both = (drawing.contact_sheet(some, title="t", fps=10) for some in (bands[:1], bands))
    assert both.width - one.width == 4 * (drawing.TILE_PX + drawing.GAP_PX)


# --- others' datasets, object stores, what is refused ---


def test_a_dataset_without_our_additions_is_told_from_its_footers(copy, dataset_path, tmp_path, capsys):
    ours, _ = inspected(dataset_path, tmp_path, capsys)
    edit(
        copy / "meta/episodes/chunk-000/file-000.parquet", lambda t: t.drop_columns(["data/row_group_index"])
    )
    (copy / "meta/ingest.json").unlink()
    (copy / "meta/refused.parquet").unlink(missing_ok=True)
    stats = json.loads((copy / "meta/stats.json").read_text())
    for name in ("q01", "q99"):  # LeRobot's converter of v2.1 leaves quantiles out
        del stats["action"][name]
    write_json(copy / "meta/stats.json", stats)
    line, text = inspected(copy, tmp_path, capsys)
    assert {name: line[name] for name in ("episodes", "frames", "cameras")} == {
        name: ours[name] for name in ("episodes", "frames", "cameras")
    }
    assert "written by   others: there is no meta/ingest.json" in text
    assert "action: meta/stats.json has no q01 and q99; outliers were not looked for" in line["warnings"]
    assert inspect(str(copy)).tasks == inspect(str(dataset_path)).tasks


def test_names_in_lerobots_other_forms_are_understood():
    for names, expected in (
        ({"motors": ["a", "b"]}, ["a", "b"]),
        ({"a": 0, "b": 1}, ["a", "b"]),
        (["a", "b"], ["a", "b"]),
        (["a"], ["0", "1"]),
        (None, ["0", "1"]),
    ):
        feature = {"dtype": "float32", "shape": [2], "names": names}
        assert inspect_dataset.dimension_names(feature) == expected


def test_a_dataset_in_an_object_store_is_inspected_in_place(dataset_path, tmp_path, capsys, monkeypatch):
    server = pytest.importorskip("moto.server").ThreadedMotoServer(
        ip_address="127.0.0.1", port=0, verbose=False
    )
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            monkeypatch.setenv(name, value)
        store, bucket = pafs.FileSystem.from_uri("s3://robots?allow_bucket_creation=true")
        store.create_dir(bucket)
        pafs.copy_files(str(dataset_path), "robots/cups", destination_filesystem=store)
        there, _ = inspected("s3://robots/cups", "s3://robots/pictures", capsys)
        here, _ = inspected(dataset_path, tmp_path, capsys)
        assert {**there, "path": 0, "seconds": 0, "contact_sheet": 0, "curves": 0} == {
            **here,
            "path": 0,
            "seconds": 0,
            "contact_sheet": 0,
            "curves": 0,
        }
        for kind in ("contact_sheet", "curves"):
            assert there[kind] == f"s3://robots/pictures/{kind}.png"
            with store.open_input_stream(f"robots/pictures/{kind}.png") as stream:
                assert stream.read() == Path(here[kind]).read_bytes()
        assert "no meta/info.json" in refused("s3://robots/none", tmp_path, capsys)
    finally:
        server.stop()


def test_an_unfinished_or_absent_dataset_is_one_line(copy, tmp_path, capsys):
    (copy / "meta/info.json").unlink()
    line = refused(copy, tmp_path / "out", capsys)
    assert line.endswith(f"{copy}: no meta/info.json, so this is not a complete episode dataset")
    assert not (tmp_path / "out").exists()


def test_rows_of_another_episode_are_not_shown_as_this_one(copy, tmp_path, capsys):
    edit(
        copy / "meta/episodes/chunk-000/file-000.parquet",
        lambda t: replaced(
            t, "data/row_group_index", [max(n - 1, 0) for n in t["data/row_group_index"].to_pylist()]
        ),
    )
    message = "holds other rows than meta/episodes says of episode"
    assert message in refused(copy, tmp_path, capsys, "--sheet_episodes", "1")


def test_an_instruction_that_is_not_in_the_table_is_refused(copy, tmp_path, capsys):
    edit(copy / "meta/tasks.parquet", lambda t: t.slice(0, 2))
    assert "episode 4 has task_index 0..2, meta/tasks.parquet has 0..1" in refused(copy, tmp_path, capsys)


def test_what_contradicts_itself_is_refused_by_name(copy, tmp_path, capsys):
    stats = json.loads((copy / "meta/stats.json").read_text())
    write_json(copy / "meta/stats.json", stats | {"action": stats["action"] | {"min": [0.0]}})
    assert "stats.json: min of action has 1 numbers, info.json declares 2" in refused(copy, tmp_path, capsys)
    write_json(copy / "meta/stats.json", stats)
    data = copy / "data/chunk-000/file-000.parquet"
    whole = data.read_bytes()
    for change, message in (
        (lambda t: t.slice(1), "has 1 row groups, meta/episodes names"),
        (lambda t: t.drop_columns(["task_index"]), "column 'task_index' is missing"),
    ):
        data.write_bytes(whole)
        edit(data, change)
        assert f"file-000.parquet: {message}" in refused(copy, tmp_path, capsys)
    data.write_bytes(whole[:-100])
    assert "file-000.parquet: Parquet magic bytes not found" in refused(copy, tmp_path, capsys)
    data.unlink()
    assert "file-000.parquet: the episode table names this file" in refused(copy, tmp_path, capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--episode", "5"], "episode 5: "),
        (["--sheet_moments", "0"], "sheet_moments 0 is not within 1..100"),
        (["elsewhere"], "path is given twice"),
        (["--path", "elsewhere"], "path is given twice"),
        (["--episodes", "3"], "unknown flag --episodes; did you mean --episode?"),
    ],
)
def test_wrong_flags_are_one_line(dataset_path, tmp_path, capsys, flags, message):
    assert message in refused(dataset_path, tmp_path, capsys, *flags)


@pytest.mark.parametrize(
    "words",
    [
        ["data", "--episode", "3"],
        ["--episode", "3", "data"],
        ["--episode=3", "data"],
        ["--path", "data", "--episode", "3"],
        ["--path=data", "--episode=3"],
    ],
)
def test_the_path_stands_alone_or_behind_its_flag(words):
    assert parsed(InspectDataset, with_path_flag(words)) == InspectDataset(path="data", episode=3)
