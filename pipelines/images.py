"""Images as they are stored: shrunk once, encoded as JPEG or PNG. `H` height, `W` width, pixels RGB uint8."""

import io

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
PNG_END = b"\0\0\0\0IEND\xae\x42\x60\x82"
SUFFIXES = {"JPEG": "jpg", "PNG": "png"}
"""File name endings of what a dataset may hold."""


def fitted_size(height: int, width: int, *, box: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) within box (width, height), ratio kept, truncated as SmolVLA does."""
    ratio = max(width / box[0], height / box[1])
    if ratio <= 1:
        return height, width
    return max(int(height / ratio), 1), max(int(width / ratio), 1)


def shrunk(frame: np.ndarray, *, size: tuple[int, int], out: np.ndarray | None = None) -> np.ndarray:
    """Resize (H, W, 3) to size (height, width), bilinear without antialiasing: what the model would do.

    Args:
        frame: the pixels.
        size: (height, width).
        out: where the result goes, if it is to lie in a larger array.
    """
    if frame.shape[:2] == size:
        if out is None:
            return frame
        out[...] = frame
        return out
    return cv2.resize(frame, (size[1], size[0]), dst=out, interpolation=cv2.INTER_LINEAR)


def encoded_image(image: np.ndarray, *, image_format: str, jpeg_quality: int) -> bytes:
    """Return (H, W, 3) as PNG, or as JPEG with halved chroma (4:2:0)."""
    assert image_format in ("jpeg", "png"), image_format
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    if image_format == "png":
        ok, data = cv2.imencode(".png", bgr)
    else:
        ok, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, jpeg_quality])
    assert ok
    return data.tobytes()


def encoded_kind(data: bytes | None) -> tuple[str, tuple[int, int]] | None:
    """Return the suffix and (height, width) of a stored image from its header, before anything is allocated.

    None: neither JPEG nor PNG.
    """
    try:
        with Image.open(io.BytesIO(data or b""), formats=tuple(SUFFIXES)) as image:
            assert image.format is not None
            return SUFFIXES[image.format], (image.height, image.width)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError):
        return None


def is_whole(data: bytes) -> bool:
    """Whether a JPEG or PNG ends as one must: decoders fill a cut-off image with grey and say nothing."""
    return data.rstrip(b"\0").endswith(JPEG_END) if data.startswith(JPEG_START) else data.endswith(PNG_END)


def decoded_image(data: bytes | None) -> np.ndarray | None:
    """Return the pixels (H, W, 3) that a reader of a stored image sees; None if there is no image in it.

    OpenCV decodes bit for bit what PIL and torchvision decode. What a damaged header declares to have
    more than 2**26 pixels is no image: `pipelines/__init__.py` sets OpenCV's limit.
    """
    if not data or not is_whole(data):
        return None
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error:
        return None
