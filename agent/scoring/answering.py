"""How a method answers among the names that it learned and those that a task brings, before it learns them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from agent.methods.base import InferenceModule, Method, TaskData, task_generator
from agent.model import ranks
from agent.model.clip import Clip

PREDICTED = 512
"""Training samples of a task that are predicted before they are learned: the standard error of an accuracy is then at
most sqrt(0.25 / 512), 2.2 points. More only take longer; each is one pass through the towers."""


def answering(
    clip: Clip,
    method: Method,
    module: InferenceModule | None,
    classes: Sequence[str],
    texts: Callable[[Sequence[str]], Tensor],
) -> tuple[list[str], Callable[[Tensor], Tensor]]:
    """Give all names known with the task's, and a function from tokens to scores float32 [B, names] on the CPU.

    module: what `method.inference_module()` gives; None while no class is learned. texts: names to the method's
    features of them, float32 [n, D].
    """
    learned = len(method.classes)
    names = [*method.classes, *(name for name in classes if name not in method.classes)]
    text = texts(names) if len(names) > learned else None

    @torch.no_grad()
    def answer(tokens: Tensor) -> Tensor:
        # In float32 whatever model.precision says: the module is scored as it is released.
        own = module.from_tokens(tokens.float())[2] if module is not None else None
        if text is None:
            assert own is not None
            return own.cpu()
        scores = torch.softmax(clip.logit_scale * method.encode_tokens(tokens) @ text.T, dim=-1)
        if own is not None:
            # The learned classes and the others are scored in different units. The module's best class is put at
            # the probability that the texts give the best learned name: its order stays, and new names compare.
            best = scores[:, :learned].amax(1, keepdim=True)
            scores = torch.cat([own / own.amax(1, keepdim=True) * best, scores[:, learned:]], dim=1)
        return (scores / scores.sum(1, keepdim=True)).cpu()

    return names, answer


def predicted(
    clip: Clip,
    method: Method,
    module: InferenceModule | None,
    task: TaskData,
    batch_size: int,
    texts: Callable[[Sequence[str]], Tensor],
    tick: Callable[[], None] = lambda: None,
) -> float:
    """Predict images of a task before it is learned: the share of right answers, see `Evaluator.before`.

    Of an update that several ranks share, each answers for its images; all of them have to call this then.
    """
    names, answer = answering(clip, method, module, task.classes, texts)
    # Not the configured seed: whatever it is, the same images are asked, so that runs can be compared.
    generator = task_generator(0, task.number, "predict before learning")
    picked = torch.randperm(len(task), generator=generator)[:PREDICTED]
    index_of = torch.tensor([names.index(name) for name in task.classes])

    def best(tokens: Tensor) -> Tensor:
        tick()
        return answer(tokens).argmax(1)

    answers = ranks.encoded(task.tokens, picked, best, batch_size)
    return int((answers == index_of[task.labels[picked]]).sum()) / len(picked)
