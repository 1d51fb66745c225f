"""SmolVLAProcessor: raw samples -> normalised, tokenised columns for the policy, and actions back.

Shape letters: B batch, N cameras, H chunk, A action width, S state width, L tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from .configuration import SmolVLAConfig
from .data_utils import tokenize_tasks
from .features import ACTION, PADDING_MASK, STATE
from .normalization import (
    NormalizationFiles,
    dataset_names,
    normalizer_of,
    read_normalization,
    settings_of,
    write_normalization,
)

TASK = "task"
IS_PAD = "action_is_pad"
TOKENS = "observation.language.tokens"
TOKENS_MASK = "observation.language.attention_mask"
# IL-Studio's names; its `image` holds all cameras and is taken apart.
IL_STUDIO = {"state": STATE, "action": ACTION, "is_pad": IS_PAD, "raw_lang": TASK}
IL_STUDIO_IMAGE = "image"
MAX_KNOWN_TASKS = 4096


class SmolVLAProcessor:
    """One raw sample -> the columns that a policy's `prepare_inputs` takes, once collated.

    Args:
        config: a policy's configuration, with features.
        stats: statistics of the dataset, as in `meta/stats.json`. None only where every mode is IDENTITY.
        rename: column of the data -> column of the policy.
        tokenizer: a loaded one, instead of the VLM's.

    Raises:
        ValueError: statistics that a feature needs are missing.
    """

    def __init__(
        self,
        config: SmolVLAConfig,
        stats: Mapping[str, Any] | None = None,
        *,
        rename: Mapping[str, str] | None = None,
        tokenizer: Any = None,
    ) -> None:
        self._use(config, replace(settings_of(config, stats or {}), rename=dict(rename or {})), tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        config: SmolVLAConfig | None = None,
        *,
        robot: str | None = None,
        rename: Mapping[str, str] | None = None,
    ) -> Self:
        """The processor of a checkpoint: a folder or a hub id, in any of LeRobot's forms.

        `robot` chooses among the statistics of a base checkpoint, or among the datasets of a mixture;
        `rename` replaces the checkpoint's own.

        Raises:
            ValueError: statistics are missing, or none belongs to the policy's state and actions.
        """
        config = config or SmolVLAConfig.from_pretrained(folder)
        files = read_normalization(folder, config, robot=robot)
        processor = cls.__new__(cls)
        processor._use(config, files if rename is None else replace(files, rename=dict(rename)), None)
        names = dataset_names(folder)
        processor.of_datasets = {name: read_normalization(folder, config, robot=name) for name in names}
        return processor

    def _use(self, config: SmolVLAConfig, files: NormalizationFiles, tokenizer: Any) -> None:
        self.config, self.files = config, files
        self.of_datasets: dict[str, NormalizationFiles] = {}
        """Of each dataset of the mixture that the policy was trained on, by name; saved with these."""
        self.normalizer = normalizer_of(files, config)
        self._tokenizer = tokenizer
        self._known_tasks: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def stats(self) -> dict[str, dict[str, Any]]:
        """Statistics as they were given or read."""
        return self.files.stats

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            from transformers import AutoTokenizer  # processes that only decode do without its import

            self._tokenizer = AutoTokenizer.from_pretrained(self.config.vlm_source())
        return self._tokenizer

    def save_pretrained(self, folder: str | Path, config: SmolVLAConfig | None = None) -> None:
        """Write LeRobot's processor files; `config` is the one written beside them, if it is another."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_normalization(folder, config or self.config, self.files)
        for name, files in self.of_datasets.items():
            write_normalization(folder, config or self.config, files, dataset=name)

    # ---- one sample ---------------------------------------------------------------------------------------

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, Tensor]:
        """Columns of one sample, LeRobot's or IL-Studio's, as tensors under LeRobot's names.

        LeRobot: `observation.images.<camera>` (3, h, w), `observation.state` (S,), `action` (H, A),
        `action_is_pad` (H,), `task`. IL-Studio: `image` (k, 3, h, w) in the order of the policy's cameras,
        `state`, `action`, `is_pad`, `raw_lang`. Arrays, tensors and lists alike; the sample stays as it is.
        Images are uint8 or float in [0, 1]. A shorter chunk of actions repeats its last one as padding.

        Returns:
            cameras as they came, state and action normalised, tokens and their mask (L,).

        Raises:
            ValueError: names the column that is missing or has the wrong shape.
        """
        named = self._named(sample)
        columns = {name: camera(name, named[name]) for name in self._cameras(named)}
        if not columns:
            raise ValueError(
                f"the sample has none of the cameras {self.config.camera_names}: {sorted(sample)}"
            )
        for name in columns:
            mask = PADDING_MASK.format(name)
            if mask in named:
                columns[mask] = torch.as_tensor(named[mask]).bool().reshape(())
        columns[STATE] = self._vector(named, STATE)
        columns[TOKENS], columns[TOKENS_MASK] = self._tokens(named)
        if ACTION in named:
            columns[ACTION], columns[IS_PAD] = self._chunk(named)
        return columns

    def _named(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """The sample under the policy's names."""
        named = {
            IL_STUDIO.get(name, name): value for name, value in sample.items() if name != IL_STUDIO_IMAGE
        }
        for ours, theirs in self.files.rename.items():
            if ours in named:
                named[theirs] = named.pop(ours)
        if IL_STUDIO_IMAGE in sample:
            named |= self._stacked_cameras(tensor(IL_STUDIO_IMAGE, sample[IL_STUDIO_IMAGE]))
        return named

    def _stacked_cameras(self, images: Tensor) -> dict[str, Tensor]:
        images = images[None] if images.ndim == 3 else images
        cameras = self.config.camera_names
        if images.ndim != 4 or not 0 < len(images) <= len(cameras):
            raise ValueError(
                f"{IL_STUDIO_IMAGE!r} has shape {tuple(images.shape)}; "
                f"it must be (k, 3, height, width) for up to {len(cameras)} cameras"
            )
        return dict(zip(cameras, images, strict=False))

    def _cameras(self, named: Mapping[str, Any]) -> list[str]:
        return [name for name in self.config.camera_names if named.get(name) is not None]

    def _vector(self, named: Mapping[str, Any], name: str) -> Tensor:
        if name not in named:
            raise ValueError(f"the sample has no {name!r}; it has {sorted(named)}")
        values = tensor(name, named[name]).float()
        if name == STATE and values.ndim == 2:  # a history counts by its last moment
            values = values[-1]
        width = self.files.features[name]["shape"][0]
        if values.shape[-1:] != (width,):
            raise ValueError(f"{name!r} has shape {tuple(values.shape)}; its last axis must be {width}")
        return self.normalizer.normalize(name, values)

    def _chunk(self, named: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Actions (H, A) and which are padding (H,)."""
        actions, size = self._vector(named, ACTION), self.config.chunk_size
        given = len(actions) if actions.ndim == 2 else 0
        if not 0 < given <= size:
            raise ValueError(f"{ACTION!r} has shape {tuple(actions.shape)}; it must be (up to {size}, width)")
        is_pad = named.get(IS_PAD)
        padding = torch.zeros(given, dtype=torch.bool) if is_pad is None else tensor(IS_PAD, is_pad).bool()
        if padding.shape != (given,):
            raise ValueError(f"{IS_PAD!r} has shape {tuple(padding.shape)}; {ACTION!r} has {given} steps")
        steps = torch.arange(size)
        return actions[steps.clamp(max=given - 1)], torch.cat((padding, steps[given:] >= given))

    def _tokens(self, named: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Token ids and mask (L,) of the instruction; each text is tokenised once."""
        task = named.get(TASK)
        if isinstance(task, Sequence) and not isinstance(task, str) and len(task) == 1:
            task = task[0]
        if not isinstance(task, str):
            raise ValueError(f"the sample needs its instruction as {TASK!r} or 'raw_lang'; it is {task!r}")
        if task not in self._known_tasks:
            if len(self._known_tasks) >= MAX_KNOWN_TASKS:
                self._known_tasks.clear()
            tokens, mask = tokenize_tasks(
                [task], self.tokenizer, max_length=self.files.max_length, padding=self.files.padding
            )
            self._known_tasks[task] = torch.from_numpy(tokens[0]), torch.from_numpy(mask[0])
        return self._known_tasks[task]

    # ---- a batch, and back --------------------------------------------------------------------------------

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """`data_collator` with this tokenizer's padding."""
        return data_collator(samples, pad_token_id=self.tokenizer.pad_token_id or 0)

    def observations(self, obs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Observations of B environments, a batch axis in front of everything, -> columns for the policy.

        An instruction may be one string for all. Actions, if there are any, are left out.
        """
        state = next((obs[name] for name in (STATE, "state") if name in obs), None)
        if state is None:
            raise ValueError(f"the observation has no {STATE!r} and no 'state'; it has {sorted(obs)}")
        state = tensor(STATE, state)
        if state.ndim != 2:
            raise ValueError(
                f"the state has shape {tuple(state.shape)}; observations are a batch, (B, width)"
            )
        columns = {name: value for name, value in obs.items() if self._observed(name)}
        samples = [
            self({name: row_of(name, value, row, len(state)) for name, value in columns.items()})
            for row in range(len(state))
        ]
        return self.collate(samples)

    def _observed(self, name: str) -> bool:
        """What an environment reports beside (rewards, times) is nothing to the policy."""
        target = self.files.rename.get(name, IL_STUDIO.get(name, name))
        cameras = self.config.camera_names
        masks = [PADDING_MASK.format(name) for name in cameras]
        return target in (IL_STUDIO_IMAGE, STATE, TASK, *cameras, *masks)

    def unnormalize_actions(self, actions: Tensor) -> Tensor:
        """Normalised actions (..., A) in the dataset's units."""
        return self.normalizer.unnormalize(ACTION, actions)


def data_collator(samples: Sequence[Mapping[str, Any]], *, pad_token_id: int = 0) -> dict[str, Tensor]:
    """Processed samples -> one batch for `prepare_inputs`.

    Instructions are padded on the right to the longest. A camera that only some samples have becomes a black
    image with `<camera>_padding_mask` False in the others.

    Raises:
        ValueError: names the column that some samples lack, or that differs in shape or dtype.
    """
    if not samples:
        raise ValueError("there are no samples to collate")
    names = list(dict.fromkeys(name for sample in samples for name in sample))
    cameras = [name for name in names if is_camera(name)]
    filled = [with_all_cameras(sample, cameras, samples) for sample in samples]
    names = list(dict.fromkeys(name for sample in filled for name in sample))
    length = max(len(sample[TOKENS]) for sample in filled) if TOKENS in names else 0
    batch = {}
    for name in names:
        lacking = [row for row, sample in enumerate(filled) if name not in sample]
        if lacking:
            raise ValueError(f"samples {lacking} have no {name!r}; the others do")
        columns = [torch.as_tensor(sample[name]) for sample in filled]
        if name in (TOKENS, TOKENS_MASK):
            fill = pad_token_id if name == TOKENS else False
            columns = [torch.cat((c, c.new_full((length - len(c),), fill))) for c in columns]
        kinds = {(tuple(column.shape), column.dtype) for column in columns}
        if len(kinds) > 1:
            raise ValueError(f"{name!r} differs over the samples: {sorted(kinds, key=str)}")
        batch[name] = torch.stack(columns)
    return batch


def is_camera(name: str) -> bool:
    return name.startswith("observation.image") and not name.endswith(PADDING_MASK.format(""))


def with_all_cameras(
    sample: Mapping[str, Any], cameras: Sequence[str], samples: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The sample with a masked black image for every camera that only others have."""
    filled = dict(sample)
    for name in cameras:
        mask = PADDING_MASK.format(name)
        if name not in sample:
            image = next(torch.as_tensor(other[name]) for other in samples if name in other)
            filled |= {name: torch.zeros_like(image), mask: torch.tensor(False)}  # noqa: FBT003 -- a value
        elif any(name not in other or mask in other for other in samples):
            filled.setdefault(mask, torch.tensor(True))  # noqa: FBT003 -- a value
    return filled


def tensor(name: str, value: Any) -> Tensor:
    """A tensor of an array, a tensor or nested lists."""
    try:
        return value if isinstance(value, Tensor) else torch.as_tensor(np.array(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name!r} is not an array of numbers: {type(value).__name__}") from error


def camera(name: str, value: Any) -> Tensor:
    """The last moment of a camera as (3, h, w), uint8 or float in [0, 1]."""
    image = tensor(name, value)
    image = image[-1] if image.ndim == 4 else image
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"{name!r} has shape {tuple(image.shape)}; an image is (3, height, width)")
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise ValueError(f"{name!r} has dtype {image.dtype}; images are uint8, or float in [0, 1]")
    low, high = (value.item() for value in image.aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"{name!r} is float with values in [{low:g}, {high:g}]; a float image lies in [0, 1]"
        )
    return image.float()


def row_of(name: str, value: Any, row: int, batch: int) -> Any:
    """One environment's share of an observation; a single string is everyone's."""
    if isinstance(value, str):
        return value
    if len(value) != batch:
        raise ValueError(f"{name!r} has {len(value)} rows; the state has {batch}")
    return value[row]
