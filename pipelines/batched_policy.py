"""A policy in a Ray Serve replica: questions of several robots, answered in one forward pass.

What shares a pass: `Question.kind`. A robot's answer does not depend on its companions, as each has noise,
left-over, delay and horizon of its own.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ray import serve
from ray.util.metrics import Histogram

from pipelines.gathering import Gathering
from pipelines.metrics import SERVED_BATCH
from pipelines.questions import TASK, Answer, Question, Signature
from smolvla.features import ACTION, STATE

if TYPE_CHECKING:
    import torch

    from smolvla import SmolVLAPolicy


@serve.deployment
class BatchedPolicy:
    """The policy.

    Args:
        fetch: gives the policy's folder on the replica's node.
        signature: of the policy.
        max_batch: questions that are answered at once.
        batch_wait_s: how long the first of them waits for others.
        threads: of torch; None leaves them as they are, as on a GPU.
    """

    def __init__(
        self,
        fetch: Callable[[], Path],
        signature: Signature,
        *,
        max_batch: int,
        batch_wait_s: float,
        threads: int | None,
    ) -> None:
        import torch

        from smolvla import SmolVLAPolicy

        if threads:
            torch.set_num_threads(threads)
        self._policy = SmolVLAPolicy.from_pretrained(fetch()).eval()
        if torch.cuda.is_available():
            self._policy.to("cuda")
        self._sizes = Histogram(
            SERVED_BATCH.name, SERVED_BATCH.description, boundaries=[1, 2, 4, 8, 16, 32], tag_keys=("policy",)
        )
        self._sizes.set_default_tags({"policy": signature.policy})
        self._gathering = Gathering(self._answers, most=max_batch, wait_s=batch_wait_s)
        answered(self._policy, [plain_question(signature)])  # the first pass is slow, and no robot's

    async def act(self, question: Question) -> Answer:
        """The answer, from a pass that others share."""
        return await self._gathering.answer(question)

    async def _answers(self, questions: list[Question]) -> list[Answer]:
        """In the order of the questions; others gather while a thread computes."""
        answers = await asyncio.to_thread(answered, self._policy, questions)
        for size in Counter(question.kind for question in questions).values():
            self._sizes.observe(size)
        return answers

    async def ready(self) -> float:
        """The time, by its clock: it is there."""
        return time.time()


def plain_question(signature: Signature) -> Question:
    """Black images of the policy's own sizes."""
    return Question(
        images={name: np.zeros((*size, 3), np.uint8) for name, size in signature.cameras.items()},
        state=np.zeros(signature.state_width, np.float32),
        task="wait",
        seed=0,
    )


def answered(policy: "SmolVLAPolicy", questions: Sequence[Question]) -> list[Answer]:
    """Answer all questions, those of a kind in one forward pass."""
    kinds: dict[Any, list[int]] = {}
    for number, question in enumerate(questions):
        kinds.setdefault(question.kind, []).append(number)
    answers: dict[int, Answer] = {}
    for numbers in kinds.values():
        answers |= dict(zip(numbers, _together(policy, [questions[i] for i in numbers]), strict=True))
    return [answers[number] for number in range(len(questions))]


def _together(policy: "SmolVLAPolicy", questions: Sequence[Question]) -> list[Answer]:
    """One forward pass."""
    import torch

    from smolvla.data_utils import sample_noise

    config, processor = policy.config, policy.processor
    columns: dict[str, Any] = {
        name: torch.from_numpy(np.stack([question.images[name] for question in questions])).permute(
            0, 3, 1, 2
        )
        for name in questions[0].images
    }
    columns[STATE] = torch.from_numpy(np.stack([question.state for question in questions]))
    columns[TASK] = [question.task for question in questions]
    shape = (1, config.chunk_size, config.max_action_dim)
    seeded = [torch.Generator().manual_seed(question.seed) for question in questions]
    noise = torch.cat([sample_noise(shape, generator) for generator in seeded])
    guidance: dict[str, Any] = {}
    if questions[0].left_over is not None:
        guidance = {
            "prev_chunk_left_over": [_normalised(policy, question) for question in questions],
            "inference_delay": [question.inference_delay for question in questions],
            "execution_horizon": [question.execution_horizon for question in questions],
        }
    chunks = policy.predict_action_chunk(processor.observations(columns), noise, **guidance)
    actions = processor.unnormalize_actions(chunks).float().cpu().numpy()
    normalised = chunks.float().cpu().numpy()
    return [
        Answer(actions=actions[row], normalised=normalised[row], batch=len(questions))
        for row in range(len(questions))
    ]


def _normalised(policy: "SmolVLAPolicy", question: Question) -> "torch.Tensor":
    import torch

    assert question.left_over is not None
    left_over = torch.tensor(question.left_over)  # a copy: what comes through Ray may not be written to
    if question.left_over_is_normalised:
        return left_over
    return policy.processor.normalizer.normalize(ACTION, left_over)
