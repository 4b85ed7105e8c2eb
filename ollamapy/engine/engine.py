"""Engine: token ids in, token ids out. One step computes the next tokens of all sequences that have room in it.

Single-threaded and synchronous: the process around it takes commands between steps. Knows no text, no HTTP, no file.
What is wrong with one request ends that request with reason "error" and a text; the others go on. Only a device that is
lost ends the engine, by an EngineError from `step`.
"""

from __future__ import annotations

import logging
import secrets
import time
from array import array
from bisect import bisect_left
from collections.abc import Callable

from ollamapy import ops
from ollamapy.engine.accelerator import Accelerator
from ollamapy.engine.adapters import Adapters
from ollamapy.engine.arrivals import Arrivals
from ollamapy.engine.batch import RowAdapter
from ollamapy.engine.execution import Execution
from ollamapy.engine.grammar import Vocabulary
from ollamapy.engine.grammars import Grammars
from ollamapy.engine.memory import allocated, shortage
from ollamapy.engine.overlap import Overlap
from ollamapy.engine.pooling import pooling_of
from ollamapy.engine.prefix_store import PrefixStore
from ollamapy.engine.prefixes import Prefixes
from ollamapy.engine.protocol import (
    NOBODY,
    STEP_TOKENS,
    Caller,
    Embedding,
    EngineInfo,
    Event,
    Finish,
    Output,
    Plan,
    SamplingParams,
    Stats,
    Step,
)
from ollamapy.engine.runner import Model
from ollamapy.engine.schedule import Schedule, finish
from ollamapy.engine.scheduler import Scheduler
from ollamapy.engine.sequence import Pooling, Result, Sequence, refusal
from ollamapy.engine.speculation import Speculation
from ollamapy.engine.speculation_draft import DraftModel
from ollamapy.errors import EngineError

log = logging.getLogger(__name__)

CHECK_INTERVAL = 1.0  # seconds between two integrity checks that run by themselves
MEASURED_TOKENS = 64  # of a step whose time tells what a prefill costs
EMBEDDING_PARAMS = SamplingParams(temperature=0.0, max_tokens=0, shift=False)


class Engine:
    """Runs one model by one plan. `kernels` (op -> implementation) are told by `info`; `read_vocabulary` is called, in a
    thread, when the first grammar comes. `draft_model` has the same vocabulary and guesses ahead. With an `accelerator`, steps
    are recorded and overlap (`graphs`, `overlap`)."""

    def __init__(
        self,
        model: Model,
        plan: Plan,
        kernels: dict[str, str] | None = None,
        read_vocabulary: Callable[[], Vocabulary] | None = None,
        draft_model: Model | None = None,
        load_adapter: Callable[[str], RowAdapter] | None = None,
        store: PrefixStore | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.model, self._asked, self._kernels = model, plan, kernels or {}
        self.draft_model = None if draft_model is None else DraftModel(draft_model, plan)
        self.runner, plan = allocated(model, plan, accelerator)
        self.plan = plan
        self.scheduler = Scheduler(plan, not model.config.causal, store.key if store is not None else b"")
        self.prefixes = Prefixes(self.scheduler.blocks, self.runner.tensors, store) if store is not None else None
        self.max_context = self.scheduler.blocks.max_tokens(plan.max_context or plan.context_length)
        self.execution = Execution(self.runner, plan, self._kernels, accelerator)
        self.overlap = Overlap(self.execution, self.scheduler) if accelerator is not None and plan.overlap else None
        self.speculation = Speculation(plan, self.draft_model)
        self.arrivals = Arrivals(Grammars(read_vocabulary), Adapters(load_adapter))  # not yet the scheduler's
        self._pending: list[Output | Embedding] = []  # ends of requests that no step has told yet
        self._steps, self._num_step_tokens = [0] * (len(STEP_TOKENS) + 1), 0  # by their tokens
        self._integrity, self._last_check = "ok", 0.0

    @property
    def has_work(self) -> bool:
        on_disk = self.prefixes is not None and self.prefixes.has_work
        in_flight = self.overlap is not None and self.overlap.flight is not None
        return bool(self.scheduler.sequences or self._pending or self.arrivals or on_disk or in_flight)

    def add(self, request_id: int, token_ids: list[int], params: SamplingParams, caller: Caller = NOBODY) -> None:
        """Starts generating after `token_ids`. A request that cannot be run is answered by the next step. Raises EngineError
        when the id is in use."""
        seed = params.seed if params.seed >= 0 else secrets.randbits(63)
        self._begin(request_id, token_ids, params, seed, None, caller)

    def embed(self, request_id: int, token_ids: list[int], caller: Caller = NOBODY) -> None:
        """Starts computing the embedding of `token_ids`, pooled as the model's metadata says: of as many as the blocks hold.
        Answers and raises as `add`."""
        config = self.model.config
        self._begin(request_id, token_ids, EMBEDDING_PARAMS, 0, pooling_of(config.pooling_type, config.causal), caller)

    def abort(self, request_id: int) -> None:
        """Ends a request now and frees its blocks; the next step says so. Unknown ids are those that have ended already."""
        seq = self.arrivals.abort(request_id) or self.scheduler.abort(request_id)
        if seq is None and self.prefixes is not None:
            seq = self.prefixes.abort(request_id)
        if seq is None:
            return
        if seq.pooling is not None:
            self._pending.append(Embedding(request_id, b"", seq.num_prompt_tokens, "aborted"))
        else:
            self._pending.append(Output(request_id, [], finish=finish(seq, "abort", time.monotonic_ns())))
        self._check_when_idle()

    def step(self) -> list[Event]:
        """Computes one batch and tells what came of it: at most one Step, and an Embedding for each that is done."""
        if self.arrivals:
            self._add_arrived()
        if self.prefixes is not None and self.prefixes.has_work:
            self._exchange(self.prefixes)
        told, self._pending = self._pending, []
        told += self._advance() if self.overlap is None else self._advance_ahead(self.overlap)
        events: list[Event] = [Step(outputs)] if (outputs := [each for each in told if isinstance(each, Output)]) else []
        events += [each for each in told if isinstance(each, Embedding)]
        return events

    def _advance(self) -> list[Output | Embedding]:
        """Computes one step and what comes of it."""
        schedule = self._schedule()
        return self._run(schedule) if len(schedule) else []

    def _advance_ahead(self, overlap: Overlap) -> list[Output | Embedding]:
        """Ends the step that was started, if one was, and begins another: before its results are read, or at once after it."""
        told: list[Output | Embedding] = []
        if overlap.flight is not None:
            on_disk = self.prefixes is not None and self.prefixes.has_work
            schedule, results, seconds = overlap.land(may_follow=not on_disk)  # copies to and from disk wait for the device
            told = self._commit(schedule, results, seconds) if len(schedule) else []
            if overlap.flight is not None:
                return told
        schedule = self._schedule()
        if not len(schedule) or overlap.start(schedule):
            return told
        return told + self._run(schedule)

    def _schedule(self) -> Schedule:
        self.speculation.propose(self.scheduler.running)
        schedule = self.scheduler.schedule()
        if schedule.copies:
            self.runner.copy_blocks(schedule.copies)
        if self.prefixes is not None:
            self.prefixes.note(schedule.sequences)
        return schedule

    def _run(self, schedule: Schedule) -> list[Output | Embedding]:
        start = time.perf_counter()
        results = self.execution.run(schedule)
        return self._commit(schedule, results, time.perf_counter() - start)

    def _commit(self, schedule: Schedule, results: list[list[Result]], seconds: float) -> list[Output | Embedding]:
        self.speculation.observe(schedule, seconds)
        self.scheduler.pace.record(schedule.num_decode_rows, schedule.num_prompt_tokens, seconds)
        if self.prefixes is not None and sum(schedule.num_tokens) >= MEASURED_TOKENS:
            self.prefixes.costs.computed(sum(schedule.num_tokens), seconds)
        told = self.scheduler.commit(schedule, results)
        num_tokens = schedule.num_prompt_tokens + sum(map(len, results))
        self._steps[bisect_left(STEP_TOKENS, num_tokens)] += 1
        self._num_step_tokens += num_tokens
        self._check_when_idle()
        return told

    def stats(self) -> Stats:
        if not self.has_work:
            self.check_integrity()
        scheduler, blocks = self.scheduler, self.scheduler.blocks
        return Stats(
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting + len(self.arrivals) + (self.prefixes.num_waiting if self.prefixes else 0),
            free_blocks=blocks.num_free,
            cached_blocks=blocks.num_cached,
            used_blocks=blocks.num_blocks - blocks.num_available,
            total_blocks=blocks.num_blocks,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            prefix_query_tokens=scheduler.prefix_query_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_steps=sum(self._steps),
            step_tokens=tuple(self._steps),
            num_step_tokens=self._num_step_tokens,
            num_drafts=scheduler.num_drafts,
            num_draft_tokens=scheduler.num_drafted,
            num_accepted_tokens=scheduler.num_accepted,
            num_evictions=blocks.num_evictions,
            **(self.prefixes.stats() if self.prefixes is not None else {}),
            num_ahead=self.overlap.num_ahead if self.overlap is not None else 0,
            num_discarded=self.overlap.num_discarded if self.overlap is not None else 0,
            graphs=self.execution.graph_facts,
            integrity=self._integrity,
        )

    def info(self) -> EngineInfo:
        plan = self.plan
        runners = [self.runner, *([self.draft_model.runner] if self.draft_model is not None else [])]
        weight_bytes, kv_bytes = sum(r.model.weight_bytes for r in runners), sum(r.kv_bytes for r in runners)
        return EngineInfo(
            architecture=self.model.config.architecture,
            device=plan.device,
            context_length=plan.context_length,
            max_context=self.max_context,
            num_blocks=plan.num_blocks,
            block_size=plan.block_size,
            weight_bytes=weight_bytes,
            kv_bytes=kv_bytes,
            vram_bytes=sum(r.vram_bytes for r in runners),
            embedding_length=self.model.config.embedding_length,
            kv_dtype=plan.kv_dtype,
            precise=plan.precise,
            kernels=self._kernels,
            cpu_isa=ops.cpu_isa(),
            notes=shortage(self._asked, plan),
        )

    def check_integrity(self) -> str:
        """ "ok", or what is wrong with the books of blocks and sequences. Runs by itself when no request is left."""
        self._last_check = time.monotonic()
        prefixes = self.prefixes.check() if self.prefixes is not None else []
        self._integrity = "; ".join([*self.scheduler.check(), *self.speculation.check(), *prefixes]) or "ok"
        if self._integrity != "ok":
            log.error("integrity: %s", self._integrity)
        return self._integrity

    def _check_when_idle(self) -> None:
        """Not more than once in CHECK_INTERVAL: a pool of 50,000 blocks takes 15 ms."""
        if not self.scheduler.sequences and time.monotonic() - self._last_check >= CHECK_INTERVAL:
            self.check_integrity()

    # --- arrival ----------------------------------------------------------------------------------------------

    def _begin(
        self, request_id: int, token_ids: list[int], params: SamplingParams, seed: int, pooling: Pooling | None, caller: Caller
    ) -> None:
        restoring = self.prefixes is not None and self.prefixes.knows(request_id)
        if request_id in self.scheduler.sequences or request_id in self.arrivals or restoring:
            raise EngineError(f"request {request_id} is in use")
        wanted = params.context_length or (self.plan.context_length if pooling is None else self.max_context)
        limit = min(wanted, self.max_context)
        refused = refusal(token_ids, params, limit, self.model.config.vocab_size)
        if refused and pooling is not None:
            self._pending.append(Embedding(request_id, b"", len(token_ids), refused))
        elif refused:
            self._pending.append(Output(request_id, [], finish=Finish("error", len(token_ids), error=refused)))
        else:
            now = time.monotonic_ns()
            seq = Sequence(request_id, array("q", token_ids), params, limit, seed, pooling, now, caller)
            if not self.arrivals.begin(seq):
                self._enter(seq)

    def _enter(self, seq: Sequence) -> None:
        """Into the scheduler, at once or when its prefix has been read."""
        if self.prefixes is None or not self.prefixes.begin(seq):
            self.scheduler.add(seq)

    def _exchange(self, prefixes: Prefixes) -> None:
        """A part of what is to be written, and requests whose prefix has come."""
        prefixes.write_some()
        idle = not (self.scheduler.sequences or self._pending or self.arrivals)
        for seq in prefixes.restored(idle):
            self.scheduler.add(seq)

    def _add_arrived(self) -> None:
        """Lets requests in whose grammar and adapters are there. Waits for one when there is nothing else to do."""
        for seq, failed in self.arrivals.arrived(idle=not self.scheduler.sequences and not self._pending):
            if failed is None:
                self._enter(seq)
            else:
                self._pending.append(Output(seq.request_id, [], finish=failed))
