"""The state of one sparsified pipeline: where the run is, which plans are in use, what was done."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn, Self

import torch
from torch import Tensor

from dit_sparse.attention import attend_routed
from dit_sparse.course import plans_after
from dit_sparse.kernels import Route, check_routed_call, dense_attention
from dit_sparse.parallel import ContextParallel
from dit_sparse.pipelines.drift import DriftMeter
from dit_sparse.pipelines.engine import Engine, OneDevice
from dit_sparse.pipelines.facts import facts_of_forward, facts_of_run
from dit_sparse.pipelines.follower import Follower
from dit_sparse.pipelines.installed import dense_transformers
from dit_sparse.pipelines.judge import Judge
from dit_sparse.pipelines.layout import Group, Layout
from dit_sparse.pipelines.statistics import CHANGED, EVERY_BLOCK, CallRecord, RunStatistics, Stopwatch
from dit_sparse.pipelines.strict import Warner, check_inside_run, check_layers, check_plan
from dit_sparse.schedule import Decision, Schedule
from dit_sparse.types import AttentionPlan, Method, PackedPlan, Previous, Site, TokenGrid, TokenOrder

DenseAttention = Callable[[], Tensor]
PlanListener = Callable[[Site, AttentionPlan], None]

_ONE_DEVICE = OneDevice()

_REMEMBERED_GRIDS = 8


class _Forward(NamedTuple):
    """The forward under way.

    Args:
        order: the one its tokens stand in, `None` for the sequence's own.
        parallel: where its sequence lies on several ranks.
    """

    layout: Layout
    model: str
    branch: str
    order: TokenOrder | None
    parallel: ContextParallel | None = None


class _Part(NamedTuple):
    """What a call does for one group of the batch."""

    site: Site
    key: tuple[Any, ...]
    previous: Previous | None
    decision: Decision


class Session:
    """Runs every self-attention call of a pipeline's transformers under one schedule.

    Args:
        schedule: when which method applies.
        backend: kernel backend of the sparse calls, as in `sparse_attention`.

    Attributes:
        on_plan: is shown every new plan and where it was made.
    """

    def __init__(self, schedule: Schedule, backend: str = "auto") -> None:
        self.schedule = schedule
        self.backend = backend
        self._start(Follower())

    def _start(self, follower: Follower) -> None:
        self._follower = follower
        self.steps = follower.steps
        self.steps.on_step = self._end_step
        self.statistics = RunStatistics()
        self.previous: dict[tuple[Any, ...], Previous] = {}
        self._drifts: dict[tuple[Any, ...], DriftMeter] = {}
        self._all_asked: set[tuple[Any, ...]] = set()
        self._last_forward = (0, 0)
        self._judge = Judge(self.schedule, self.backend)
        self._warner = Warner(self.schedule)
        self._has_order = True
        self._forward: _Forward | None = None
        self._agreed: dict[ContextParallel, int] = {}
        self.on_plan: PlanListener | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Of a pipeline that is copied as a whole: the copy has runs of its own, and begins afresh."""
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        twin._start(self._follower.copy(memo))
        return twin

    def __reduce__(self) -> NoReturn:
        raise ValueError("a sparse pipeline or transformer cannot be pickled, got one; unsparsify it first")

    def watch(self, pipe: Any) -> None:
        """Follow the steps of `pipe`'s scheduler, also after it is replaced."""
        self._follower.watch(pipe)

    def begin_forward(
        self,
        layout: Layout,
        model: str,
        branch: str | None,
        device: torch.device | None = None,
        parallel: ContextParallel | None = None,
        latents: Tensor | None = None,
        timestep: Tensor | None = None,
    ) -> TokenOrder | None:
        """Called before each forward of a transformer.

        Args:
            layout, model: layout of its sequences, and which transformer of the pipeline it is.
            branch: guidance branch, `None` where the pipeline does not name it.
            device: where the tokens lie, if the caller or `parallel` can put them into another order.
            parallel: where the sequence lies on several ranks, what runs its attention.
            latents: the whole input, its samples along the first dimension; must be the same on all ranks.
            timestep: in the scheduler's numbers, of any shape; the largest is that of the step.

        Returns:
            The order that the caller must put all tokens into for this forward; `None` for their own.
        """
        if self._follower.has_begun(branch, 0 if latents is None else len(latents), timestep):
            self._begin_run()
        if branch is not None and not self.steps.inside_run:
            self._warner.stranger(model)
        self._last_forward = (self.steps.run, self.steps.step)
        # Samples with prompts of several lengths have no order in common; no branch of such a run moves its tokens,
        # because PAB hands what one branch attended to the other.
        self._has_order &= len(layout.groups) == 1
        order = None
        if device is not None and self.steps.inside_run and self._has_order:
            order = self.schedule.shared_order(layout.groups[0].grid, device)
            order = None if order is None or order.is_identity else order
        self._forward = _Forward(layout, model, self._follower.branch(branch), order, parallel)
        if parallel is None:
            return order
        self._agree(parallel, latents)
        return None  # the exchange of heads for tokens moves them

    def _agree(self, parallel: ContextParallel, latents: Tensor | None) -> None:
        """Make sure that all ranks begin the same forward of the same run."""
        assert self._forward is not None
        facts = facts_of_forward(self.steps, *self._forward[:3])
        if self._agreed.get(parallel) != self.steps.run:
            self._agreed[parallel] = self.steps.run
            parallel.begin_run()
            facts |= facts_of_run(self.schedule, self.backend, latents)
        parallel.begin_forward(self._forward.layout.grid, facts, self._forward.order)

    def end_forward(self) -> None:
        """Called after each forward of a transformer."""
        self._forward = None

    def record_upstream_call(self, layer: int, model: str, watch: Stopwatch) -> None:
        """Called after a self-attention call that upstream made itself, because its code has changed."""
        if self._follower.has_begun():
            self._begin_run()
        self.statistics.records.append(CallRecord(layer, self.steps.step, "", model, None, CHANGED, "dense", watch))
        self._last_forward = (self.steps.run, self.steps.step)

    def _end_step(self) -> None:
        """Called when the scheduler has made a step.

        Raises:
            NotSparseError: the schedule is strict, and the step was made by a transformer that was put in the place of
                a sparse one, or the run ends with it and nothing of it was sparse.
        """
        # Another pipeline may drive the scheduler, and a cache may leave a forward out.
        if self._last_forward != (self.steps.run, self.steps.step - 1):
            for model in (model for pipe in self._follower.pipelines for model in dense_transformers(pipe)):
                self._warner.replaced(model)
        if not self.steps.inside_run and self.steps.run == self._last_forward[0]:
            dense = self.statistics.settle()
            check_layers(self.schedule, dense, any(r.density is not None for r in self.statistics.records))

    def _begin_run(self) -> None:
        self.statistics = RunStatistics()
        self._has_order = True
        # A plan of the grid alone stays right; everything else belongs to the run that made it.
        # Grids differ by the prompt's length in some families, so their number has a limit.
        if self.schedule.method.scope != "grid" or len(self.previous) > _REMEMBERED_GRIDS:
            self.previous.clear()
            self._drifts.clear()
            self._all_asked.clear()
            self._judge.forget()

    def sequence_len(self, here: int) -> int:
        """Tokens of a sequence of which `here` are on this rank."""
        forward = self._forward
        return here if forward is None or forward.parallel is None else forward.layout.grid.num_tokens

    @property
    def contexts(self) -> tuple[ContextParallel, ...]:
        """What has run attention over several ranks, one a transformer."""
        return tuple(self._agreed)

    @property
    def engine(self) -> Engine:
        """What plans and computes the attention of the forward under way."""
        parallel = None if self._forward is None else self._forward.parallel
        return _ONE_DEVICE if parallel is None else parallel

    def attend_shard(self, layer: int, q: Tensor, k: Tensor, v: Tensor, run: Callable[..., Tensor]) -> Tensor:
        """One self-attention call of the tokens that are here, perhaps only a rank's; `run` calls `attend`.

        Args:
            layer: which transformer block.
            q, k, v: `[B, H, n, D]` with all heads.
            run: takes `q, k, v`, on several ranks those of this rank's heads.
        """
        forward = self._forward
        if forward is None or forward.parallel is None:
            return run(q, k, v)
        unit = self.schedule.unit(forward.model, layer, forward.branch)
        return forward.parallel.attend(unit, self.previous, q, k, v, run)

    def attend(self, layer: int, num_layers: int, q: Tensor, k: Tensor, v: Tensor, dense: DenseAttention) -> Tensor:
        """One self-attention call.

        Args:
            layer, num_layers: which transformer block of how many.
            q, k, v: `[B, H, N, D]`, any strides.
            dense: computes the model's own attention, `[B, H, N, D]`.

        Raises:
            NotSparseError: it would run dense although the schedule, which is strict, does not say so.
        """
        if self._forward is None:
            check_inside_run(self.schedule, layer, num_layers)
            return self._dense(Decision("dense", "outside a run"), None, q, k, v, dense, layer)
        if self._forward.parallel is not None and self._forward.parallel.mesh.ring > 1:
            dense = functools.partial(self.attend_densely, q, k, v)  # the model's own would see this rank's keys alone
        if not self.steps.inside_run:
            check_inside_run(self.schedule, layer, num_layers)
            return self._dense(Decision("dense", "outside a run"), None, q, k, v, dense, layer)
        layout = self._forward.layout
        parts = [self._part(layer, num_layers, group, q) for group in layout.groups]
        if all(part.decision.action == "dense" and not part.decision.keep_lse for part in parts):
            return self._dense(parts[0].decision, None, q, k, v, dense, layer)
        if not layout.is_padded:
            return self._run_part(parts[0], q, k, v, dense)
        out = torch.zeros_like(q)
        for group, part in zip(layout.groups, parts, strict=True):
            tokens = self.engine.num_tokens(group.grid)
            own_q, own_k, own_v = (x[group.rows, :, :tokens] for x in (q, k, v))
            own_dense = functools.partial(self._engine_dense, own_q, own_k, own_v, group.grid)
            out[group.rows, :, :tokens] = self._run_part(part, own_q, own_k, own_v, own_dense)
        return out

    def _engine_dense(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid) -> Tensor:
        if self.engine is _ONE_DEVICE:
            return dense_attention(q, k, v)
        return self.engine.dense(q, k, v, grid.num_tokens)[0]

    @property
    def knows_padding(self) -> bool:
        """Whether a forward is under way, so that its prompts' lengths are known."""
        return self._forward is not None

    def attend_densely(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Dense attention of the forward under way by the fastest kernel; padding is not seen, and gives zeros.

        Args:
            q, k, v: `[B, H, N, D]`, any strides.
        """
        layout = None if self._forward is None else self._forward.layout
        if layout is None:
            return dense_attention(q, k, v)
        if not layout.is_padded:
            return self._engine_dense(q, k, v, layout.grid)
        out = torch.zeros_like(q)
        for rows, grid in layout.groups:
            tokens = self.engine.num_tokens(grid)
            own_q, own_k, own_v = (x[rows, :, :tokens] for x in (q, k, v))
            out[rows, :, :tokens] = self._engine_dense(own_q, own_k, own_v, grid)
        return out

    @property
    def _judges(self) -> bool:
        """Whether the cost model decides; on several ranks it does not: each would go by the heads that it has."""
        return self.engine is _ONE_DEVICE

    def _part(self, layer: int, num_layers: int, group: Group, q: Tensor) -> _Part:
        batch = len(group.rows) if isinstance(group.rows, list) else q.shape[0]
        site = self._site(layer, num_layers, group.grid, batch)
        if site.step == 0 and self.schedule.routes:  # not after the warm-up
            route = _route_of(self.schedule.method_for(site), site, q)
            check_routed_call(q, q, q, route, self.schedule.planned_remainder)
        key = self.schedule.key(site)
        if self.schedule.method.scope in ("sample", "call"):
            key += (q.shape[0],)  # FasterCache leaves a guidance branch out of some batches
        previous = self.previous.get(key)
        meter = self._meter(key, site)
        if previous is not None and meter is not None:
            previous = replace(previous, drift=meter.read())
        decision = self.schedule.decide(site, previous)
        judged = decision.action == "plan" or decision.reason == "search"  # a plan that is in use was found to pay
        if judged and self._judges:
            own = q[:, :, : group.grid.num_tokens]
            decision = self._judge.before(site, key, own, self._follower.forwards) or decision
        return _Part(site, key, previous, decision)

    def _run_part(self, part: _Part, q: Tensor, k: Tensor, v: Tensor, dense: DenseAttention) -> Tensor:
        site, key, previous, decision = part
        if decision.action == "dense":
            return self._dense(decision, key, q, k, v, dense, site.layer, site.grid)
        if decision.action == "plan" and self.schedule.routes:
            return self._route(part, q, k, v)
        planning = None
        if decision.action == "plan":
            method = self.schedule.method_for(site)
            planning = Stopwatch(q.device)
            plan = self.schedule.finish(self.engine.plan(key, method, q, k, v, site, previous))
            planning.stop()
            refused = self._judge.after(plan, site, key, q, self._follower.forwards) if self._judges else None
            if refused is not None:
                return self._dense(refused, key, q, k, v, dense, site.layer, planning=planning)
            self._adopt(part, method, plan, q, k)
        else:
            assert previous is not None
            assert previous.plan is not None
            plan = previous.plan.unpack()
            meter = self._meter(key, site)
            if meter is not None:
                meter.measure(q, k)
        if site.in_order:
            self._check_order(plan)
        watch = Stopwatch(q.device)
        out, backend, skipped = self.engine.sparse(self.backend, q, k, v, plan, site.in_order)
        self._record(part, plan, backend, watch.stop(), planning, skipped)
        return out

    def _route(self, part: _Part, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """A call whose kernel finds the blocks as it attends; the plan is known afterwards."""
        method = self.schedule.method_for(part.site)
        planning, watch = Stopwatch(q.device).stop(), Stopwatch(q.device)
        route = _route_of(method, part.site, q)
        out, plan = attend_routed(q, k, v, route, self.schedule.planned_remainder, part.site.in_order)
        watch.stop()
        if self._judges:
            # For the calls to come; this one is made.
            self._judge.after(plan, part.site, part.key, q, self._follower.forwards)
        self._adopt(part, method, plan, q, k)
        self._record(part, plan, "triton", watch, planning, None)
        return out

    def _adopt(self, part: _Part, method: Method, plan: AttentionPlan, q: Tensor, k: Tensor) -> None:
        """Check and show a new plan, and keep it for the steps to come."""
        site, key, previous, _ = part
        asked = check_plan(self.schedule, method, site, plan)
        (self._all_asked.add if asked else self._all_asked.discard)(key)
        if self.on_plan is not None:
            self.on_plan(site, plan)
        at_rest = plan if self.schedule.method.scope == "grid" else _at_rest(plan)  # one plan may lie about
        again = plans_after(self.schedule, site.step, site.num_steps)
        lse = previous.lse if previous is not None and again else None  # nobody would read them later
        self.previous[key] = Previous(at_rest, lse, site.step)
        if self.schedule.drift is not None:
            self._drifts[key] = DriftMeter(q, k, site.branch)

    def _meter(self, key: tuple[Any, ...], site: Site) -> DriftMeter | None:
        """The drift of the plan of `key`, where it was made by the branch of `site`."""
        meter = self._drifts.get(key)
        return meter if meter is not None and meter.branch == site.branch else None

    def _site(self, layer: int, num_layers: int, grid: TokenGrid, batch: int) -> Site:
        assert self._forward is not None
        _, model, branch, order, _ = self._forward
        at, branches = self.steps, self._follower.branches(branch, batch)
        place = (at.step, at.num_steps, at.sigma, branch, model, order is not None)
        return self.engine.site(Site(grid, layer, num_layers, *place, branches=branches))

    def _record(
        self,
        part: _Part,
        plan: AttentionPlan,
        backend: str,
        attention: Stopwatch,
        planning: Stopwatch | None,
        skipped: Tensor | None,
    ) -> None:
        """Take down a sparse call; `skipped` is `[B, H]` pairs, as the engine tells them."""
        site, full = part.site, plan.is_dense
        kept = None if full else self.engine.density(part.key, plan)
        left_out = None
        if skipped is not None:
            left_out = skipped.double() / (self.engine.num_tokens(site.grid) * plan.kv_order.num_tokens)
        self.statistics.records.append(
            CallRecord(
                layer=site.layer,
                step=site.step,
                branch=site.branch,
                model=site.model,
                # A pair that is skipped has its product of query and key, the half of its work.
                density=kept if kept is None or left_out is None else kept - left_out / 2,
                reason=EVERY_BLOCK if full else "",
                backend=backend,
                attention=attention,
                planning=planning,
                skipped=left_out,
                # The heads of one rank may keep everything where those of others do not.
                all_asked=part.key in self._all_asked or site.heads is not None,
            )
        )

    def _check_order(self, plan: AttentionPlan) -> None:
        """A plan of another order than the tokens' would give a wrong picture."""
        order = None if self._forward is None else self._forward.order
        # Its blocks may be cut otherwise, for queries as for keys.
        if order is None or plan.q_order.index is not order.index or plan.kv_order.index is not order.index:
            name = self.schedule.method.name
            raise ValueError(f"plan of {name!r} must use its shared_order for queries and keys, got another order")

    def _dense(
        self,
        decision: Decision,
        key: tuple[Any, ...] | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dense: DenseAttention,
        layer: int,
        grid: TokenGrid | None = None,
        planning: Stopwatch | None = None,
    ) -> Tensor:
        watch = Stopwatch(q.device)
        if decision.keep_lse and key is not None and grid is not None:
            out, lse = self.engine.dense(q, k, v, grid.num_tokens)
            self.previous[key] = Previous(None, lse, self.steps.step)
        else:
            out = dense()
        watch.stop()
        model, branch = ("", "") if self._forward is None else (self._forward.model, self._forward.branch)
        self.statistics.records.append(
            CallRecord(
                layer=layer,
                step=self.steps.step,
                branch=branch,
                model=model,
                density=None,
                reason=decision.reason,
                backend="dense",
                attention=watch,
                planning=planning,
                predicted=decision.predicted,
            )
        )
        return out


def _route_of(method: Method, site: Site, q: Tensor) -> Route:
    """What the kernel goes by that finds the blocks of `method`, one of a schedule that `routes`."""
    return method.route(site.grid, q.device)  # type: ignore[attr-defined]


def _at_rest(plan: AttentionPlan) -> AttentionPlan | PackedPlan:
    """How a plan waits for its next use: packed on a GPU, where the lists of all layers and branches would not fit.

    On a CPU, and for partial blocks, it stays as it is: there kernels keep what they have derived from it.
    """
    packs = plan.block_mask.device.type == "cuda" and plan.block_mask.partial_counts is None
    return plan.pack() if packs and not plan.block_mask.is_full else plan
