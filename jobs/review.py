"""What a person reviews of a run beside its curves: data, order, environment; all as artifacts.

    environment/packages.txt, machine.json, changes.patch; of a run that was continued also in a folder below
    plan.json                           how samples are drawn, and the rows of the first step
    data/<dataset>/report.txt           what `jobs/inspect_dataset.py` says of it
    data/<dataset>/contact_sheet.png    a few moments of a few episodes
    data/<dataset>/normalization.png    how state and action lie to what normalises them
    images "samples"                    what the model is given, a slider

Nothing waits for it: it is made and sent by a thread of the driver while the workers start.
"""

import threading
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from mlflow.exceptions import MlflowException
from PIL import Image

from jobs import environment, inspect_dataset
from jobs.tracking import TrackedRun
from pipelines import drawing
from pipelines.inspection import VECTORS, dimension_names, episode_columns, inspect, spread
from pipelines.progress import folder_name
from pipelines.samples import SampleReader, Source
from pipelines.train_config import TrainConfig

HISTOGRAM_EPISODES = 32
"""Read for the histograms, spread over the dataset."""
SAMPLES = 8
"""Images of the slider, from the first micro-batches."""
SHOWN_ROWS = 64
"""Of the first step, in plan.json."""


class Review:
    """Makes the artifacts behind a job that has begun."""

    def __init__(self, run: TrackedRun, reader: SampleReader, train: TrainConfig, *, step: int) -> None:
        self._run, self._reader, self._train = run, reader, train
        self._environment = f"environment/from_{folder_name(step)}" if step else "environment"
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Wait for the rest."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            print(f"the artifacts for review were not complete after {timeout_s:.0f} s", flush=True)

    def _send(self) -> None:
        try:
            self._send_environment()
            client, run_id = self._run.client, self._run.run_id
            if "plan.json" in {entry.path for entry in client.list_artifacts(run_id)}:
                return  # the run goes on: all this was sent when it began
            self._send_samples()
            for source in self._reader.sources:
                self._send_dataset(source)
            client.log_dict(run_id, plan_summary(self._reader, self._train), "plan.json")
        except (MlflowException, OSError, ValueError) as error:  # training must not suffer from it
            print(f"the artifacts for review are not complete: {error}", flush=True)

    def _send_environment(self) -> None:
        client, run_id = self._run.client, self._run.run_id
        client.log_text(run_id, environment.packages(), f"{self._environment}/packages.txt")
        client.log_dict(run_id, environment.machine(), f"{self._environment}/machine.json")
        if changes := environment.git_changes():
            client.log_text(run_id, changes, f"{self._environment}/changes.patch")

    def _send_samples(self) -> None:
        client = self._run.client
        for step, card in enumerate(sample_cards(self._reader, count=SAMPLES)):
            client.log_image(self._run.run_id, np.asarray(card), key="samples", step=step, synchronous=True)

    def _send_dataset(self, source: Source) -> None:
        dataset, name = source.dataset, source.title
        client, run_id, folder = self._run.client, self._run.run_id, f"data/{name}"
        text, sheet = inspect_dataset.summary(inspect(dataset.uri), dataset, name=name)
        client.log_text(run_id, text, f"{folder}/report.txt")
        client.log_image(run_id, sheet, f"{folder}/contact_sheet.png")
        figure = normalization_figure(source, name=name)
        client.log_figure(run_id, figure, f"{folder}/normalization.png")


def plan_summary(reader: SampleReader, train: TrainConfig) -> dict[str, Any]:
    """How the run draws its samples, and the first rows, to be compared with those of another run."""
    plan, config = reader.plan, reader.config
    rows = plan.mixing_group(0)
    first = []
    for place in range(min(train.batch_size, SHOWN_ROWS, len(rows.source))):
        dataset = reader.sources[int(rows.source[place])].dataset
        unit = int(rows.row_group[place])
        episode = int(dataset.episode_index[dataset.row_groups.episode[unit]])
        frame = int(dataset.row_groups.first_frame[unit] + rows.offset[place])
        first.append([int(rows.source[place]), episode, frame])
    return {
        "seed": config.seed,
        "steps": train.steps,
        "batch_size": train.batch_size,
        "micro_batch": config.micro_batch,
        "mixing_rows": config.mixing_rows,
        "samples": train.steps * train.batch_size,
        "datasets": [
            {
                "name": source.title,
                "fingerprint": source.dataset.fingerprint,
                "episodes": len(source.dataset.episode_index),
                "frames": source.dataset.num_frames,
                "share": plan.share(number),
                "epochs": train.steps * train.batch_size * plan.share(number) / source.dataset.num_frames,
            }
            for number, source in enumerate(reader.sources)
        ],
        "first_rows": first,
        "first_rows_are": "[number of the dataset, episode_index, frame_index] of the first step",
    }


def sample_cards(reader: SampleReader, *, count: int) -> list[Image.Image]:
    """The first rows of the first micro-batches as the model gets them, augmented, with their instruction."""
    cards = []
    encoded = reader.encoded(0)
    for table in (next(encoded) for _ in range(min(count, reader.plan.batches_per_group))):
        batch = reader.decoded(table)
        dataset = reader.sources[int(batch["source"][0])].dataset
        task = dataset.tasks[int(table["task_index"][0].as_py())]
        images = {name: batch[name][0] for name in reader.camera_names}
        if reader.num_observations > 1:  # the newest
            images = {name: image[-1] for name, image in images.items()}
        place = f"episode {batch['episode_index'][0]}, frame {batch['frame_index'][0]}"
        cards.append(drawing.sample_card(images, task=task, place=place))
    return cards


def normalization_figure(source: Source, *, name: str) -> Figure:
    """Histograms of state and action over some episodes, and what of each axis becomes -1 to 1."""
    dataset = source.dataset
    rows = spread(len(dataset.episode_index), at_most=HISTOGRAM_EPISODES)
    columns = [episode_columns(dataset, row, list(VECTORS)) for row in rows]
    values = {vector: np.concatenate([column[vector] for column in columns]) for vector in VECTORS}
    ones = {vector: np.ones(values[vector].shape[1], dtype=np.float32) for vector in VECTORS}
    return drawing.histograms(
        values,
        {vector: dimension_names(dataset.features[vector]) for vector in VECTORS},
        {
            vector: (
                source.normalizer.unnormalize(vector, -one),
                source.normalizer.unnormalize(vector, one),
            )
            for vector, one in ones.items()
        },
        title=f"{name}: {len(values['action']):,} frames of {len(rows)} episodes\n"
        "What lies on grey becomes -1 to 1.",
    )
