"""A registered policy as MLflow loads and serves it (models from code: MLflow runs this file by itself).

One row of the input is one robot's observation under its own names: cameras, `observation.state`, `task`. An
image is a base64 text of a PNG or JPEG, or an array (height, width, 3) of levels 0 to 255. The answer has a
column `action`: for each row (n_action_steps, action width) in the dataset's units.
"""

import base64
import binascii
import io
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from PIL import Image, UnidentifiedImageError

from smolvla import SmolVLAPolicy
from smolvla.data_utils import sample_noise
from smolvla.features import STATE

ARTIFACT, TASK, ANSWER = "policy", "task", "action"
MOST_PIXELS = 4096 * 4096


class ServedPolicy(mlflow.pyfunc.PythonModel):
    """A checkpoint that answers observations with chunks of actions."""

    def load_context(self, context: Any) -> None:
        self._policy = SmolVLAPolicy.from_pretrained(context.artifacts[ARTIFACT]).eval()
        if torch.cuda.is_available():
            self._policy.to("cuda")

    # MLflow would take hints for the signature.
    def predict(self, context, model_input, params=None):  # noqa: ANN001, ANN201  # pyright: ignore[reportIncompatibleMethodOverride]
        """Answer each row; a row's answer does not depend on the others, as each has the seed's noise."""
        params = params or {}
        config, rows = self._policy.config, model_input.to_dict("records")
        steps = int(params.get("n_action_steps", config.n_action_steps))
        if not 1 <= steps <= config.chunk_size:
            raise refused(f"n_action_steps {steps} is not within 1..{config.chunk_size}")
        actions = [self._answer(row, number, int(params.get("seed", 0))) for number, row in enumerate(rows)]
        return pd.DataFrame({ANSWER: [chunk[:steps].tolist() for chunk in actions]})

    def _answer(self, row: dict[str, Any], number: int, seed: int) -> np.ndarray:
        observation = {
            name: image(value, name=f"row {number}: {name}")
            for name, value in row.items()
            if name not in (STATE, TASK)
        }
        if not isinstance(row[TASK], str):
            raise refused(f"row {number}: {TASK} {row[TASK]!r} is not a text")
        config = self._policy.config
        shape = (1, config.chunk_size, config.max_action_dim)
        noise = sample_noise(shape, torch.Generator().manual_seed(seed), device=self._policy.device)
        try:
            observation[STATE] = torch.tensor(np.asarray(row[STATE], dtype=np.float32))[None]
            return self._policy.predict_actions(observation | {TASK: row[TASK]}, noise)[0].cpu().numpy()
        except (ValueError, TypeError) as error:
            raise refused(f"row {number}: {error}") from None


def image(value: Any, *, name: str) -> torch.Tensor:
    """An image of the input as (1, 3, h, w) uint8.

    Raises:
        MlflowException: names the row and the camera; the server answers 400.
    """
    try:
        if isinstance(value, str):
            data = io.BytesIO(base64.b64decode(value, validate=True))
            with Image.open(data, formats=("PNG", "JPEG")) as opened:
                if opened.width * opened.height > MOST_PIXELS:
                    raise refused(f"{name}: {opened.width} x {opened.height} pixels are too many")
                pixels = np.asarray(opened.convert("RGB"))
        else:
            levels = np.asarray(value)
            if levels.ndim != 3 or levels.shape[2] != 3 or levels.size == 0:
                raise refused(f"{name}: an array of shape {levels.shape}, not (height, width, 3)")
            if levels.min() < 0 or levels.max() > 255 or np.any(levels != np.round(levels)):
                raise refused(f"{name}: an image has whole levels 0 to 255")
            pixels = levels.astype(np.uint8)
    except (binascii.Error, UnidentifiedImageError, OSError, ValueError, TypeError) as error:
        raise refused(f"{name}: neither an image in base64 nor an array: {error}") from None
    return torch.tensor(pixels).permute(2, 0, 1)[None]


def refused(message: str) -> MlflowException:
    """What a wrong request ends in."""
    return MlflowException.invalid_parameter_value(message)


mlflow.models.set_model(ServedPolicy())
