"""How many KV blocks a GPU has room for: its weights lie there, a step's activations are measured, the rest is for blocks.

Placement estimates, to choose a device; here it is decided. Knows no CUDA: `Accelerator` does.
"""

from __future__ import annotations

import logging
from array import array

import msgspec
import torch

from ollamapy.engine.accelerator import Accelerator
from ollamapy.engine.batch import Batch
from ollamapy.engine.build import build_batch
from ollamapy.engine.device_sampler import DeviceSampler
from ollamapy.engine.graphs import MAX_BYTES, longest_context, seqs_bucket
from ollamapy.engine.protocol import Plan, SamplingParams
from ollamapy.engine.runner import Model, ModelRunner
from ollamapy.engine.sampler import Sampler
from ollamapy.engine.schedule import Schedule
from ollamapy.engine.sequence import Sequence
from ollamapy.errors import EngineError

log = logging.getLogger(__name__)

MARGIN = 1.1  # times the measured activations: what the allocator rounds up and cannot put together again
SHRINK = 0.9  # of the blocks, where the device has not the memory after all
WIDEST = SamplingParams(temperature=1.0, top_k=0, top_p=0.9, repeat_penalty=1.1, logprobs=20)
"""Draws from the whole vocabulary, sorted, beside a copy of the logits. Whatever a kernel of this has to be compiled for is
compiled here and not in a step of many."""


def allocated(model: Model, plan: Plan, accelerator: Accelerator | None) -> tuple[ModelRunner, Plan]:
    """A runner with its caches, and the plan as it came true. On an accelerator: with as many blocks as there is room for where
    the plan leaves that open (`most_blocks`), and one more for the padding of recorded steps. Raises EngineError when the least
    do not fit."""
    if accelerator is None:
        return ModelRunner(model, plan), plan
    accelerator.release()  # what loading and joining weights have left
    if plan.most_blocks:
        plan = _fitted(model, plan, accelerator)
    while True:
        try:
            return ModelRunner(model, plan, spare_blocks=1), plan
        except EngineError as error:
            fewer = max(int(plan.num_blocks * SHRINK), plan.least_blocks)
            if not plan.least_blocks or fewer >= plan.num_blocks:
                raise
            log.warning("%s: trying %d blocks, not %d", error, fewer, plan.num_blocks)
        accelerator.release()
        plan = msgspec.structs.replace(plan, num_blocks=fewer)


def shortage(asked: Plan, plan: Plan) -> tuple[str, ...]:
    """What a user should know of a plan that did not come true."""
    text = f"the GPU has room for {plan.num_blocks} KV blocks of {plan.block_size} tokens, not for {asked.num_blocks}"
    return (text,) if plan.num_blocks < asked.num_blocks else ()


def _fitted(model: Model, plan: Plan, accelerator: Accelerator) -> Plan:
    """With as many blocks as the device with the least room has for its layers' part of them."""
    taken, logits = _measured(model, plan, accelerator)
    accelerator.release()
    fitting = []
    for device, (peak, per_block) in zip(accelerator.devices, taken, strict=True):
        recorded = MAX_BYTES + (logits if device == accelerator.devices[0] else 0)
        reserve = plan.reserve_bytes + int(MARGIN * peak) + (recorded if plan.cuda_graphs else 0)
        room = accelerator.free_bytes(device) - reserve
        log.info(
            "%s: activations take %d MiB, a KV block %d KiB, %d MiB are left", device, peak >> 20, per_block >> 10, room >> 20
        )
        fitting += [room // per_block - 1] if per_block else []
    count = max(plan.least_blocks, min([*fitting, plan.most_blocks]))
    log.info("room for %d blocks", count)
    return msgspec.structs.replace(plan, num_blocks=count)


def _measured(model: Model, plan: Plan, accelerator: Accelerator) -> tuple[list[tuple[int, int]], int]:
    """On each device, bytes of the largest step beside weights and caches, and of a block; bytes of recorded steps' logits.

    The largest is one of prompts, or one that decodes: attention over long contexts has parts of each row's sums to itself.
    """
    length = min(plan.max_batch_tokens, plan.context_length)
    count, rows = max(plan.max_batch_tokens // length, 1), plan.max_num_seqs
    num_groups = len(plan.groups) or 1
    total = num_groups * max(count * -(-length // plan.block_size), rows)
    runner = ModelRunner(model, msgspec.structs.replace(plan, num_blocks=total))
    prompts, columns = _batch(plan, runner, [length] * count), 0
    decoding = _batch(plan, runner, [1] * rows)
    for each in (decoding, *decoding.others):
        each.context_lens = [longest_context(plan)] * rows  # a bound, as recorded steps have it
    seq = _sequence(0, length, plan)

    def prefill() -> None:
        nonlocal columns
        hidden = runner.forward(prompts)
        if model.config.causal:  # as many rows as a step has at most, each drawn in the most expensive way
            logits = runner.logits(hidden[:1].expand(rows, -1).contiguous())
            columns = logits.shape[1]
            DeviceSampler(Sampler(), accelerator.fetch).start(logits, [seq] * rows).results()

    def decode() -> None:
        runner.logits(runner.forward(decoding))

    with torch.inference_mode():
        peaks = accelerator.peak_bytes(prefill)
        if model.config.causal:
            peaks = list(map(max, peaks, accelerator.peak_bytes(decode)))
    sizes = [sum(each.nbytes for each in runner.tensors if each.device == device) for device in accelerator.devices]
    taken = [(peak, size // total) for peak, size in zip(peaks, sizes, strict=True)]
    return taken, seqs_bucket(rows) * columns * torch.float32.itemsize


def _sequence(number: int, length: int, plan: Plan) -> Sequence:
    return Sequence(number, array("q", bytes(8 * length)), WIDEST, plan.context_length, 0)


def _batch(plan: Plan, runner: ModelRunner, lengths: list[int]) -> Batch:
    """Whole prompts of so many tokens, each in blocks of its own."""
    sequences, first = [], 0
    for number, length in enumerate(lengths):
        seq, blocks = _sequence(number, length, plan), -(-length // plan.block_size)
        for _ in plan.groups or (None,):
            seq.block_tables.append(array("i", range(first, first + blocks)))
            first += blocks
        sequences.append(seq)
    return build_batch(Schedule(sequences, lengths), plan.block_size, runner.device)
