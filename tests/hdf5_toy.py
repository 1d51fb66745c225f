"""Small HDF5 files as ALOHA, robomimic, LIBERO and Isaac Lab write them; rows differ everywhere."""

import io
import json
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

HEIGHT, WIDTH = 24, 32
INSTRUCTION = "open the middle drawer"

ROBOMIMIC = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2, "object": 10}
LIBERO = {"ee_states": 6, "ee_pos": 3, "ee_ori": 3, "gripper_states": 2, "joint_states": 7}
ISAAC = {"eef_pos": 3, "eef_quat": 4, "gripper_pos": 2, "joint_pos": 9}


def vectors(key: str, episode: int, length: int, width: int) -> np.ndarray:
    """(L, D) float64, another series for every key and episode."""
    seed = sum(map(ord, key)) + 1000 * episode
    return np.random.default_rng(seed).standard_normal((length, width))


def frames(episode: int, length: int, tint: int = 0) -> np.ndarray:
    """(L, H, W, 3), a gradient that moves."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    t = np.arange(length)[:, None, None]
    planes = [x * 5 + t * 3 + episode * 40, y * 7 + t * 2 + tint * 60, x + y + t * 5 + 0 * episode]
    return np.stack(np.broadcast_arrays(*planes), axis=-1).astype(np.uint8)


def jpeg(frame: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(frame).save(out, "JPEG", quality=90)
    return out.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def write_aloha(
    path: Path, episode: int, length: int, *, encoded: bool = False, cameras: tuple[str, ...] = ("top",)
) -> Path:
    """Write one episode, as ACT does: padded JPEG with compress_len if `encoded`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as root:
        root.attrs["sim"] = True
        for key in ("action", "observations/qpos", "observations/qvel"):
            root[key] = vectors(key, episode, length, 14).astype(np.float32)
        lengths = []
        for tint, camera in enumerate(cameras):
            images = frames(episode, length, tint)
            key = f"observations/images/{camera}"
            if encoded:
                files = [jpeg(image) for image in images]
                lengths.append([len(data) for data in files])
                padded = np.zeros((length, max(lengths[-1]) + 7), np.uint8)
                for row, data in zip(padded, files, strict=True):
                    row[: len(data)] = np.frombuffer(data, np.uint8)
                root.create_dataset(key, data=padded, chunks=(1, padded.shape[1]))
            else:
                root.create_dataset(key, data=images, chunks=(1, HEIGHT, WIDTH, 3), compression="gzip")
        if encoded:
            root.attrs["compress"] = True
            # ACT's order is that of its configuration, not that of the file
            root["compress_len"] = np.array(lengths[::-1], np.float32)
    return path


def write_demos(
    path: Path,
    lengths: dict[str, int],
    *,
    keys: dict[str, int],
    cameras: tuple[str, ...],
    group: str = "obs",
    actions: int = 7,
    attrs: dict[str, object] | None = None,
) -> Path:
    """Write demos {name: length}; the number in a name is its episode's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as root:
        data = root.create_group("data")
        data.attrs["total"] = sum(lengths.values())
        for name, value in (attrs or {}).items():
            data.attrs[name] = value if isinstance(value, str) else json.dumps(value)
        for name, length in lengths.items():
            demo, episode = data.create_group(name), int(name.rpartition("_")[2])
            demo.attrs["num_samples"] = length
            demo["actions"] = vectors("actions", episode, length, actions)
            demo["robot_states"] = vectors("states", episode, length, 20)
            demo["dones"] = np.zeros(length, np.uint8)
            for key, width in keys.items():
                demo[f"{group}/{key}"] = vectors(key, episode, length, width)
                demo[f"next_{group}/{key}"] = vectors(key, episode, length, width)
            for tint, camera in enumerate(cameras):
                # chunks as h5py guesses them: of several frames, and cut through the picture
                demo.create_dataset(
                    f"{group}/{camera}", data=frames(episode, length, tint), compression="gzip"
                )
    return path


def write_robomimic(path: Path, lengths: dict[str, int], **changes) -> Path:
    attrs = {"env_args": {"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": 20}}}
    cameras = ("agentview_image", "robot0_eye_in_hand_image")
    return write_demos(path, lengths, **({"keys": ROBOMIMIC, "cameras": cameras, "attrs": attrs} | changes))


def write_libero(path: Path, lengths: dict[str, int], **changes) -> Path:
    attrs = {
        "problem_info": {"problem_name": "kitchen", "language_instruction": INSTRUCTION},
        "env_args": {"env_name": "Kitchen", "env_kwargs": {"control_freq": 20}},
        "macros_image_convention": "opengl",
    }
    cameras = ("agentview_rgb", "eye_in_hand_rgb")
    return write_demos(path, lengths, **({"keys": LIBERO, "cameras": cameras, "attrs": attrs} | changes))


def write_isaac(path: Path, lengths: dict[str, int], *, group: str = "obs/policy") -> Path:
    attrs: dict[str, object] = {
        "env_args": {"env_name": "Isaac-Stack", "type": 2, "sim_args": {"dt": 0.01, "decimation": 5}}
    }
    write_demos(path, lengths, keys=ISAAC, cameras=("table_cam", "wrist_cam"), group=group, attrs=attrs)
    with h5py.File(path, "r+") as root:
        for name, length in lengths.items():
            root[f"data/{name}/initial_state/articulation/robot/joint_position"] = np.zeros((1, 9))
            root[f"data/{name}/states/articulation/robot/joint_position"] = np.zeros((length, 9))
    return path
