"""MPO the plain way: transformers' InternVL, each answer with images of its own, every formula written out."""

import copy

import numpy as np
import torch
from torch import Tensor

from internvl_megatron.config.schema import RunConfig
from tests.support.layouts import Ranks, Scenario
from tests.support.models import huggingface_model
from tests.support.reference import gradients_of, images_of, our_tensors, row_logits, without_broken_images
from tests.support.rows import StepData
from tests.support.training import Trained


def train_preference_reference(scenario: Scenario, ranks: Ranks) -> Trained:
    """Train a scenario of pairs with SGD at a constant rate."""
    config = scenario.config(ranks)
    policy = huggingface_model(config.model)
    frozen = copy.deepcopy(policy)
    history: list[float] = []
    result = Trained()
    for step in range(config.num_steps):
        data = without_broken_pairs(scenario.data(config, step), scenario)
        policy.zero_grad()
        loss, means = mixed_loss(policy, frozen, data, config, history, learns=True)
        history += means
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.optimizer.clip_grad_norm or 1e30).item()
        if step == 0:
            result.gradients = our_tensors(gradients_of(policy), config.model)
        result.losses.append(loss.item())
        result.grad_norms.append(norm)
        result.updated.append(True)
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.grad is not None:
                    parameter -= config.optimizer.learning_rate * parameter.grad
    result.parameters = our_tensors(policy.state_dict(), config.model)
    with torch.no_grad():
        data = without_broken_pairs(scenario.data(config, 0), scenario)
        result.evaluation = mixed_loss(policy, frozen, data, config, history, learns=False)[0].item()
    return result


def mixed_loss(
    policy: torch.nn.Module,
    frozen: torch.nn.Module,
    data: StepData,
    config: RunConfig,
    history: list[float],
    learns: bool,
) -> tuple[Tensor, list[float]]:
    """The loss of a global batch, and what its pairs add to the history."""
    mpo, pairs = config.mpo, []
    for index in range(len(data.rows)):
        answers = answer_logprobs(policy, data, index)
        with torch.no_grad():
            reference = answer_logprobs(frozen, data, index)
        for number in range(0, len(answers), 2):
            (chosen, length), (rejected, _) = answers[number : number + 2]
            if length:
                lead = mpo.beta * (chosen - reference[number][0])
                trail = mpo.beta * (rejected - reference[number + 1][0])
                pairs.append((lead, trail, chosen, length))
    means = [float(lead.detach() + trail.detach()) / 2 for lead, trail, *_ in pairs]
    known = history + (means if learns and mpo.shift == "with_step" else [])
    shift = sum(known) / len(known) if known else 0.0
    preference = sum(-torch.log(torch.sigmoid(lead - trail)) for lead, trail, *_ in pairs) / len(pairs)
    quality = sum(
        -torch.log(torch.sigmoid(lead - shift)) - torch.log(torch.sigmoid(-(trail - shift)))
        for lead, trail, *_ in pairs
    ) / len(pairs)
    if config.loss.normalize == "step":
        generation = -sum(chosen for *_, chosen, _ in pairs) / sum(length for *_, length in pairs)
    else:
        generation = -sum(chosen / length for *_, chosen, length in pairs) / len(pairs)
    loss = mpo.preference_factor * preference + mpo.quality_factor * quality + mpo.generation_factor * generation
    assert isinstance(loss, Tensor), "there are pairs"
    return loss, means


def answer_logprobs(model: torch.nn.Module, data: StepData, index: int) -> list[tuple[Tensor, int]]:
    """Log-probability and tokens of every answer of a row, in fp64 from fp32 logits."""
    row, tiles = data.rows[index], images_of(data, index)
    ends = np.cumsum(row.segment_lengths)
    starts = ends - row.segment_lengths
    twice = []  # each answer sees images of its own, in the order of their tokens
    for pair in range(row.num_samples // 2):
        first, end = starts[2 * pair], ends[2 * pair]
        own = [tiles[image] for image, start in enumerate(row.image_starts) if first <= start < end]
        twice += own + own
    logits = row_logits(model, row, twice).double()
    found = []
    for sample in range(row.num_samples):
        places = [place for place in range(starts[sample], ends[sample]) if row.weights[place] > 0]
        logprobs = [torch.log_softmax(logits[place], dim=0)[int(row.targets[place])] for place in places]
        found.append((torch.stack(logprobs).sum() if logprobs else torch.zeros((), dtype=torch.float64), len(places)))
    return found


def without_broken_pairs(data: StepData, scenario: Scenario) -> StepData:
    """Black tiles for images that cannot be decoded, and no loss on both samples of their pairs."""
    rows, tiles = [*data.rows], without_broken_images(data, scenario).tiles
    for row, image in scenario.broken & data.tiles.keys():
        ends = np.cumsum(rows[row].segment_lengths)
        pair = int((ends <= rows[row].image_starts[image]).sum()) // 2
        first, end = int(ends[2 * pair] - rows[row].segment_lengths[2 * pair]), int(ends[2 * pair + 1])
        rows[row].weights[first:end] = 0
    return StepData(rows, tiles)
