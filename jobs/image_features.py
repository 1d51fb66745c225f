"""Whether a run trains from stored image features: the flag, what lies beside the data, what the run was."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.training_data import TrainingData, readable_vlm
from pipelines.dataset import EpisodeDataset
from pipelines.features import StoredFeatures, found, has_any
from pipelines.tower import Precision
from smolvla.configuration import SmolVLAConfig
from smolvla.features import FeatureDtype
from smolvla.image_features import trained_part, weights_digest


@dataclass(frozen=True, kw_only=True)
class ImageFeatures:
    """What a run takes instead of images."""

    of_datasets: Sequence[StoredFeatures] = ()
    """Of each dataset; empty: the run trains from images."""
    reason: str = ""
    """Why it does."""
    streamed: FeatureDtype | None = None
    """Computed on the way by actors, in this form."""

    def identity(self) -> str | None:
        """What of it a run is: stored numbers are rounded, so a run stays with what it began with."""
        if self.streamed:
            return f"stream {self.streamed}"
        return self.of_datasets[0].recipe.fingerprint if self.of_datasets else None

    def __str__(self) -> str:
        if self.streamed:
            return f"trains from features that actors compute meanwhile ({self.streamed})"
        if not self.of_datasets:
            return f"trains from images: {self.reason}"
        told = [f"{stored.uri} ({stored.recipe.dtype})" for stored in self.of_datasets]
        return f"trains from features: {', '.join(told)}"

    def like_these(
        self, dataset: EpisodeDataset, *, fingerprint: str | None, resumed: bool
    ) -> StoredFeatures | None:
        """Features of another dataset, by the same weights; None: its images are taken.

        Args:
            dataset: which is measured on, not trained on.
            fingerprint: of those that a resumed run took.
            resumed: whether the run began earlier.
        """
        if not self.of_datasets or (resumed and fingerprint is None):
            return None
        recipe = self.of_datasets[0].recipe
        weights, box = recipe.weights, recipe.image_box
        fitting, _ = found(dataset, weights=weights, image_box=box, only=fingerprint)
        return fitting[0] if fitting else None


def chosen(
    use: str,
    data: TrainingData,
    config: SmolVLAConfig,
    *,
    policy_path: str,
    augmented: bool,
    precision: Precision,
    before: Mapping[str, Any] | None,
) -> ImageFeatures:
    """The features of all datasets, or none and the reason.

    Args:
        use: what the flag says.
        data: the opened datasets.
        config: of the policy.
        policy_path: where its weights are.
        augmented: whether images are augmented.
        precision: of the run.
        before: identity of the run, if it began earlier: it stays with what it began with.

    Raises:
        ValueError: features are required, by the flag or by the run, and something is in their way.
    """
    if use == "off":
        return ImageFeatures(reason="dataset.features is off")
    if use == "stream":
        if trains := trained_part(config):
            raise ValueError(f"dataset.features stream: policy.path {policy_path}: {trains}")
        return ImageFeatures(streamed=precision)
    began = (before or {}).get("features")
    if use == "auto" and before is not None and not began:
        return ImageFeatures(reason="this run began from images")
    stored, reason = _stored(data, config, policy_path=policy_path, augmented=augmented, only=began)
    if not reason:
        return ImageFeatures(of_datasets=stored)
    if use == "required":
        raise ValueError(f"dataset.features required: {reason}")
    if began:
        raise ValueError(f"dataset.features auto: this run began from features {began}: {reason}")
    return ImageFeatures(reason=reason)


def _stored(
    data: TrainingData,
    config: SmolVLAConfig,
    *,
    policy_path: str,
    augmented: bool,
    only: str | None,
) -> tuple[list[StoredFeatures], str]:
    """The features of every dataset, or the first reason why there are none to train from."""
    if augmented:
        return [], "images are augmented, and features are those of images as they are"
    if trains := trained_part(config):
        return [], f"policy.path {policy_path}: {trains}"
    for dataset in data.datasets:
        if not has_any(dataset):
            return [], f"{dataset.uri} has no features; jobs/cache_features.py computes them"
    if not (Path(policy_path) / "model.safetensors").is_file():
        return [], f"policy.path {policy_path}: no model.safetensors, so its tower is random"
    with readable_vlm(config):
        weights = weights_digest(policy_path, config)
    return _agreeing(data, weights, config.resize_imgs_with_padding, only=only)


def _agreeing(
    data: TrainingData, weights: str, box: Sequence[int] | None, *, only: str | None
) -> tuple[list[StoredFeatures], str]:
    """One recipe for all, the most exact that all have: rows of several datasets are one array."""
    of_each: list[dict[str, StoredFeatures]] = []
    for dataset in data.datasets:
        fitting, reason = found(dataset, weights=weights, image_box=box, only=only)
        if not fitting:
            return [], reason
        of_each.append({stored.recipe.fingerprint: stored for stored in fitting})
    common = [name for name in of_each[0] if all(name in others for others in of_each)]
    if not common:
        told = [f"{dataset.uri} {list(has)}" for dataset, has in zip(data.datasets, of_each, strict=True)]
        return [], f"the datasets have no features in common: {', '.join(told)}"
    return [has[common[0]] for has in of_each], ""
