"""Cameras of a LeRobot dataset that are video files: every frame by its own presentation time.

A file is passed over once, forwards. A frame belongs to the row whose time is nearest; on top of that the
frames of an episode must keep step with its rows, or the video has another frame rate. FFmpeg may open video
containers and nothing that leads to other files.
"""

from collections.abc import Iterator

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter

from pipelines.sources import Refusal, RefusedEpisodeError
from pipelines.sources.lerobot_metadata import Facts, FlawError, Recording

OPTIONS = {"format_whitelist": "mov,matroska,avi", "protocol_whitelist": "file"}
"""FFmpeg would also follow playlists and scripts that name other files, whatever a file is called."""
CODED_MARGIN = 64
"""Pixels that a codec may add to either side of a picture to fill its blocks."""


class Videos:
    """The open video file of every camera."""

    def __init__(self, facts: Facts, *, tolerance_s: float) -> None:
        self.facts = facts
        self.tolerance_s = tolerance_s
        self.open: dict[str, _VideoFile] = {}

    def frames(self, camera: str, recording: Recording, timestamps: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the frame of every row of an episode; anything between or missing refuses the episode."""
        clip = recording.clips[self.facts.cameras[camera]]
        assert clip is not None  # refused before
        due_s = clip.from_s + timestamps.astype(np.float64)
        number = 0
        try:
            video = self._at(camera, clip.path, due_s[0])
            for image in video.matched(due_s, alone=clip.to_s is None):
                yield image
                number += 1
        except (FlawError, FileNotFoundError, FFmpegError) as error:
            self._drop(camera)
            reason, detail = _described(error)
            raise RefusedEpisodeError(
                Refusal(
                    episode=str(recording.index),
                    camera=camera,
                    frame=number,
                    reason=reason,
                    detail=f"{clip.path}: {detail}",
                )
            ) from None

    def _at(self, camera: str, path: str, start_s: float) -> "_VideoFile":
        """Return the camera's file at a position not after `start_s`."""
        video = self.open.get(camera)
        if video is None or video.path != path or video.time_s >= start_s:
            self._drop(camera)
            size = self.facts.declared[self.facts.cameras[camera]]["shape"][:2]
            video = _VideoFile(self.facts, path, size=(size[0], size[1]), tolerance_s=self.tolerance_s)
            self.open[camera] = video
            video.seek(start_s)
        return video

    def _drop(self, camera: str) -> None:
        if camera in self.open:
            self.open.pop(camera).close()

    def close(self) -> None:
        for camera in list(self.open):
            self._drop(camera)


def _described(error: Exception) -> tuple[str, str]:
    if isinstance(error, FlawError):
        return error.reason, error.detail
    if isinstance(error, FileNotFoundError):
        return "video_missing", "does not exist"
    return "video_unreadable", str(error)


class _VideoFile:
    """A video file that is passed over once, forwards."""

    def __init__(self, facts: Facts, path: str, *, size: tuple[int, int], tolerance_s: float) -> None:
        self.facts = facts
        self.path = path
        self.size = size
        """(height, width) as declared."""
        self.tolerance_s = tolerance_s
        self.half_s = 0.5 / facts.fps
        self.time_s = -np.inf
        """Presentation time of the frame decoded last."""
        self.held: av.VideoFrame | None = None
        """Decoded, but not looked at."""
        self.reformatter = VideoReformatter()  # one for all: a frame's own builds its tables anew
        self.container = self._opened()

    def _opened(self) -> InputContainer:
        folder = self.facts.folder
        file = folder.local_path(self.path) if folder.is_local else folder.open_ahead(self.path)
        container = av.open(file, "r", options=OPTIONS)
        if not container.streams.video:
            container.close()
            raise FlawError("video_unreadable", "no video stream")
        self.stream = container.streams.video[0]
        codec = self.stream.codec_context
        codec.thread_count = 1  # a task has one CPU, and Ray runs one for each
        height, width = self.size
        most = (height + CODED_MARGIN) * (width + CODED_MARGIN)
        if codec.height * codec.width > most:  # before anything is allocated for it
            container.close()
            raise self._wrong_size(codec.height, codec.width)
        codec.options = {"max_pixels": str(most)}  # the size may change in midstream
        self.decoded = container.decode(self.stream)
        return container

    def _wrong_size(self, height: int, width: int) -> FlawError:
        return FlawError("frame_size", f"{height}x{width}, declared {self.size[0]}x{self.size[1]}")

    def seek(self, start_s: float) -> None:
        """Go to a key frame not after `start_s`; where the file's index misleads, stay at the beginning."""
        time_base = self.stream.time_base
        if start_s <= self.half_s or time_base is None:
            return
        self.container.seek(int((start_s - self.half_s) / time_base), stream=self.stream, backward=True)
        self.held = next(self.decoded, None)
        if self.held is None or _time_s(self.held) > start_s + self.half_s:
            self.close()
            self.held = None
            self.container = self._opened()

    def matched(self, due_s: np.ndarray, *, alone: bool) -> Iterator[np.ndarray]:
        """Yield the RGB frame of every time; unless `alone` in the file, others may precede and follow.

        Frames are paired with the nearest time. The first may lie up to half a frame off, as after a remux;
        the others must then lie as far off, within the tolerance and what can be written: one tick of the
        video's clock and one float32 step of the row's timestamp.
        """
        allowed_s = self.tolerance_s + float(self.stream.time_base or 0) + np.spacing(np.float32(due_s[-1]))
        offset_s = 0.0
        for number, frame_due_s in enumerate(due_s):
            frame = self._frame_at(frame_due_s, skip_earlier=number == 0 and not alone)
            if number == 0:
                offset_s = self.time_s - frame_due_s
            drift_s = self.time_s - frame_due_s - offset_s
            if abs(drift_s) > allowed_s:
                raise FlawError(
                    "video_off_fps",
                    f"the frame at {self.time_s:.4f} s lies {drift_s:+.4f} s off {self.facts.fps} frames a "
                    "second: another frame rate, or a changing one",
                )
            yield self._pixels(frame)
        if alone and self._next() is not None:
            raise FlawError("frames_surplus", f"more frames than the {len(due_s)} rows")

    def _frame_at(self, due_s: float, *, skip_earlier: bool) -> av.VideoFrame:
        while True:
            frame = self._next()
            if frame is None:
                raise FlawError("frames_missing", f"ends before the frame at {due_s:.4f} s")
            if self.time_s >= due_s + self.half_s:
                raise FlawError(
                    "frames_missing", f"no frame at {due_s:.4f} s, the next is at {self.time_s:.4f} s"
                )
            if self.time_s > due_s - self.half_s:
                return frame
            if not skip_earlier:
                raise FlawError("frames_surplus", f"the frame at {self.time_s:.4f} s has no row")

    def _pixels(self, frame: av.VideoFrame) -> np.ndarray:
        if frame.is_corrupt:
            raise FlawError("frame_corrupt", f"the frame at {self.time_s:.4f} s is damaged")
        if frame.rotation:
            raise FlawError(
                "video_rotated",
                f"to be shown turned by {frame.rotation} degrees; readers differ in whether they turn it",
            )
        if (frame.height, frame.width) != self.size:
            raise self._wrong_size(frame.height, frame.width)
        return self.reformatter.reformat(frame, format="rgb24").to_ndarray()

    def _next(self) -> av.VideoFrame | None:
        frame, self.held = (self.held or next(self.decoded, None)), None
        if frame is not None:
            self.time_s = _time_s(frame)
        return frame

    def close(self) -> None:
        self.container.close()


def _time_s(frame: av.VideoFrame) -> float:
    if frame.pts is None or frame.time_base is None:
        raise FlawError("video_unreadable", "a frame without a presentation time")
    return float(frame.pts * frame.time_base)
