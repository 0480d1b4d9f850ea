"""fit: the one loop. It knows no distillation method by name."""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck import checkpoint
from limbeck._balance import pulling
from limbeck.data import Request, StagedPlan, stream
from limbeck.engine import Engine
from limbeck.errors import Interrupted, LimbeckError, NonFinite
from limbeck.models import Capture, Model, Recomputed, load_state
from limbeck.objective import Objective, Rows, StagedObjective
from limbeck.optimizer import Step, make_optimizer
from limbeck.progress import Progress, memory_bytes
from limbeck.randomness import seed_for
from limbeck.ranks import ALONE, Elsewhere, Ranks
from limbeck.recipe import Train
from limbeck.run import Log
from limbeck.teacher import Asking, Teacher
from limbeck.types import Batch, Needs, Signal

__all__ = ["Feed", "Recorder", "Trained", "asking", "fit", "learning_rate"]


@dataclass(frozen=True)
class Feed:
    """What is read: the plan of every step, what turns a request into a batch, and how.

    rounds: the numbers of steps after which the student is validated, the last step among them. They are the ends of the student's epochs for the
    baseline too, so that both are looked at equally often where the baseline reads fewer (labelled) rows for the same number of steps.
    """

    plan: StagedPlan
    builder: Callable[[Request], Batch]
    rounds: Sequence[int]
    workers: int = 0
    pin_memory: bool = False


@dataclass
class Recorder:
    """Where a fit leaves its traces. ``stop`` says whether a signal asked to leave; ``validate`` is run after every
    epoch, ``committed`` after every checkpoint, both by all ranks at once."""

    role: str
    checkpoints: Path
    log: Log
    progress: Progress
    stop: Callable[[], bool] = lambda: False
    validate: Callable[[], dict[str, float]] | None = None
    committed: Callable[[], None] = lambda: None


@dataclass
class Trained:
    """What a fit did. ``history`` has one row an epoch; ``selected_epoch`` is the epoch whose weights the student holds now."""

    steps: int
    seconds: float
    selected_epoch: int
    history: list[dict[str, Any]] = field(default_factory=list)
    resumed_from: list[int] = field(default_factory=list)


def fit(
    student: Model,
    teacher: Teacher | None,
    objective: Objective | StagedObjective,
    feed: Feed,
    engine: Engine,
    settings: Train,
    seed: int,
    recorder: Recorder,
    ranks: Ranks = ALONE,
) -> Trained:
    """Train ``student`` in place on ``objective`` over all steps of ``feed.plan``, from the newest checkpoint where there is one.

    Per optimiser step: the learning rate and every schedule are functions of the step; the items of each term are counted over the whole step;
    each microbatch adds its share of the loss (sum over items / count), so the gradient does not depend on the cut (law 2). Dropout is drawn
    from a generator seeded by (seed, step, microbatch, rank), so nothing of a global generator has to be saved (law 4).

    A step is of the stage that its request says; the stage has its objective and its learning rate.

    Each of several ranks takes its share of every step's rows; counts, gradients and the logged loss are sums over all of them. The main rank alone
    writes, and what it finds in a checkpoint is given to the others. Ranks that only teach go along with it
    (:func:`limbeck.placement.attend`).

    Raises: NonFinite at the step whose loss or gradient is not finite, before the weights are touched; Interrupted after a checkpoint when
    ``recorder.stop`` says so.
    """
    plan, module = feed.plan, student.module
    engine.place(module)
    engine.place(objective)
    optimizer = make_optimizer(settings, [module, objective])
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    scaler = engine.scaler()
    average = Average(module, settings.ema) if settings.ema is not None else None
    state = _State(module, objective, optimizer, scaler, average)
    epochs = len(feed.rounds)
    done = Trained(0, 0.0, epochs - 1)

    found = checkpoint.from_main(ranks, lambda: checkpoint.load_newest(recorder.checkpoints, recorder.progress.say))
    if found is None:
        recorder.log.cut_role(recorder.role)
    else:
        done.steps = found[0]
        state.restore(found[1], done)
        recorder.log.cut(found[1]["log_offset"])
        done.resumed_from.append(found[0])
        recorder.log.write({"role": recorder.role, "step": found[0], "resumed_from": found[0]})
        recorder.progress.say(f"{recorder.role}: resumed from step {done.steps} of {plan.total_steps}.")
    found = None  # its moments are the optimiser's, and are about to be moved
    ranks.tell(done.steps)
    touch = Step(optimizer)
    watch = _Watch(touch, scaler, engine, parameters, [module, objective], recorder.role, ranks)
    began = time.perf_counter() - done.seconds
    rate, wait = _Rate(), _Wait(feed.workers)

    def commit() -> None:
        watch.look()
        watch.refuse_spoilt(done.steps)
        recorder.log.write({"role": recorder.role, "step": done.steps, "checkpoint": True})
        if ranks.main:
            checkpoint.save(recorder.checkpoints, done.steps, {**state.capture(done), "log_offset": recorder.log.offset})
        recorder.committed()
        ranks.barrier()

    asked = asking(objective, int(settings.accumulate))  # `auto` has been replaced
    requests = (plan.request(step).share(ranks.rank, ranks.size) for step in range(done.steps, plan.total_steps))
    capture, again = Capture(module, objective.student_needs.features), Recomputed(module, settings.gradient_checkpointing)
    with torch.inference_mode(False), torch.enable_grad(), capture, again, _fork(engine):
        module.train()
        objective.train()
        remembers = bool(objective.remembering())
        objective.follow(module)
        objective.stepped(keep=False)  # it may have been asked on the way here, by what measures
        compute = _Compute(student, objective, capture, engine, ranks)
        work: Any = ranks.replicated(compute) if ranks.size > 1 else compute.forward
        pulls = pulling(objective, work, module, parameters, plan, settings.balance_every, scaler, ranks)
        how: Any = {"workers": feed.workers, "pin_memory": feed.pin_memory, "ranks": ranks.local_size, "say": recorder.progress.say}
        coming = wait.over(stream(feed.builder, requests, **how))
        if teacher is not None:
            coming = teacher.ahead(coming, asked)
        for request, whole in coming:
            goal = objective.at(request.stage)
            selection = goal.select(whole)
            items, *counted = ranks.sum([len(whole) if request.counted else 0, *selection.counts.values()])
            counts = dict(zip(selection.counts, counted, strict=True))
            progress = request.step / plan.total_steps
            lr = learning_rate(settings, request.step, plan.total_steps, request.stage)
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = engine.send(whole)
            for parameter in parameters:
                parameter.grad = None
            seen: list[_Seen] = []
            needs, parts = asked(request)
            pull = pulls(request)
            for micro, (start, stop) in enumerate(parts):
                part = batch.part(start, stop) if stop - start < len(batch) else batch
                signal = None
                if teacher is not None and needs is not None:
                    # What a teacher draws is that of the step, wherever the run was resumed; and it does not move the student's dropout.
                    engine.seed(seed_for(seed, "teacher", request.step, micro, ranks.rank))
                    signal = teacher(part, needs)
                engine.seed(seed_for(seed, "dropout", request.step, micro, ranks.rank))
                rows = selection.rows(start, stop, engine.device)
                share, values, logits = pull(micro == len(parts) - 1, part, signal, request.stage, progress, counts, rows)
                seen.append(_Seen(share, values, logits, signal.logits if signal is not None else None, part))
            pull.end()
            own, terms = _summed(seen)
            loss, *summed = ranks.total([own, *terms.values()])
            terms = dict(zip(terms, summed, strict=True))
            scaler.unscale_(optimizer)
            norms = _norms(parameters, engine.device)
            norm = torch.linalg.vector_norm(norms)
            skipped = watch.judge(_Facts(request.step, whole, seen, norms), loss, norm)
            # On a device that works behind, the norm is not known here; where it is, a gradient far below the limit would be multiplied by 1.
            if settings.clip_norm is not None and (engine.asynchronous or float(norm) > 0.999 * settings.clip_norm):
                torch.nn.utils.clip_grads_with_norm_(parameters, settings.clip_norm, norm)
            touch(skipped)
            scaler.update()
            objective.stepped(keep=not (remembers and scaler.is_enabled()) or not bool(skipped))
            if average is not None:
                average.update(done.steps)
            done.steps = request.step + 1
            done.seconds = time.perf_counter() - began
            rate.add(items)

            epoch = bisect_right(feed.rounds, request.step)
            epoch_ends = feed.rounds[epoch] == done.steps
            if done.steps % settings.log_every == 0 or epoch_ends:
                watch.look()
                shown = {name: float(value) for name, value in terms.items()}
                waited = wait.take()
                recorder.log.write(
                    {
                        "role": recorder.role,
                        "step": done.steps,
                        "steps": plan.total_steps,
                        "epoch": epoch,
                        "stage": request.stage,
                        "loss": float(loss),
                        "terms": shown,
                        "weights": goal.weights(progress),
                        "lr": lr,
                        "grad_norm": float(norm),
                        "items_per_second": rate.value or None,
                        "wait": waited,
                        "memory_bytes": memory_bytes(engine.device),
                        "machine": recorder.progress.machine(),
                        "time": time.time(),
                    }
                )
                left = (plan.total_steps - done.steps) * rate.seconds_per_step
                recorder.progress.step(
                    recorder.role,
                    epoch=epoch,
                    epochs=epochs,
                    step=done.steps,
                    steps=plan.total_steps,
                    items_per_second=rate.value,
                    values={"loss": float(loss), **shown},
                    left=left,
                )
                slow = wait.slow()
                if slow:
                    recorder.log.write({"role": recorder.role, "step": done.steps, "slow_loader": slow})
                    recorder.progress.say(f"{recorder.role}: {slow}")
            if epoch_ends:
                watch.refuse_spoilt(done.steps)
                _close_epoch(epoch, epochs, request.stage, state, done, settings, recorder)
                rate.restart()
                wait.restart()
            leaving = ranks.anywhere(recorder.stop())
            if leaving or (done.steps % settings.checkpoint_every == 0 and done.steps < plan.total_steps):
                commit()
            if leaving:
                where = f"at step {done.steps} of {plan.total_steps} ({recorder.role}), after a checkpoint."
                raise ranks.told_by_main(Interrupted(f"Stopped by a signal {where}"))
    optimizer.zero_grad(set_to_none=True)
    state.finish(done)
    module.eval()
    return done


def asking(objective: Objective | StagedObjective, accumulate: int) -> Asking:
    """What each step of a fit asks its teacher for, and how it is cut into ``accumulate`` microbatches: functions of its request alone, so that
    nobody who answers elsewhere has to be told.

    The items of a relational loss are gathered for each microbatch: all ranks then have as many.
    """

    def asked(request: Request) -> tuple[Needs | None, list[tuple[int, int]]]:
        own = objective.at(request.stage)
        return own.teacher_needs if own.needs_teacher else None, request.cuts(accumulate, alike=own.relational)

    return asked


class _Compute(nn.Module):
    """From a microbatch to its share of the loss. Student and objective are one module, so that several ranks replicate both alike."""

    def __init__(self, student: Model, objective: Objective | StagedObjective, capture: Capture, engine: Engine, ranks: Ranks) -> None:
        super().__init__()
        self.student, self.objective = student.module, objective
        self._gather = ranks.gather if ranks.size > 1 else None
        self._ask, self._capture, self._engine = student, capture, engine

    def forward(
        self, part: Batch, signal: Signal | None, stage: int, progress: float, counts: Mapping[str, int], rows: Rows
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], Tensor]:
        """The share, that of each term with ``weight: auto`` apart from it, each term's part for the log, and the student's logits."""
        with self._engine.autocast():
            outputs = self._capture.outputs(self._ask, part.student)
        goal = self.objective.at(stage)
        share, apart, values = goal.apart(outputs, signal, part, progress=progress, counts=counts, rows=rows, gather=self._gather)
        return share, apart, values, outputs.logits


def learning_rate(settings: Train, step: int, total: int, stage: int = 0) -> float:
    """The learning rate of a step, a pure function: linear warm-up over ``warmup`` of all steps, then the schedule: down to 0 (cosine, linear), times
    ``decay`` behind each of the ``milestones`` (step), or as it is.

    lr is that of the stage where it has one: such a rate is (the stage's lr / train.lr) times what it would be without, whatever the schedule.

    one_cycle (Smith and Topin, 2018, arXiv 1708.07120, as torch's OneCycleLR with cosine annealing): from lr / 25 up to lr over ``warmup``,
    down to lr / 250,000.
    """
    own = settings.stages[stage].lr if settings.stages is not None else None
    top = settings.lr if own is None else own
    warm = round(settings.warmup * total)
    if settings.schedule == "one_cycle":
        peak = max(0.0, settings.warmup * total - 1)
        if step < peak:
            return _cosine(top / 25, top, step / peak)
        return _cosine(top, top / 25e4, (step - peak) / max(1.0, total - 1 - peak))
    if step < warm:
        return top * (step + 1) / (warm + 1)
    left = (step - warm) / max(1, total - warm)
    if settings.schedule == "cosine":
        return _cosine(top, 0.0, left)
    if settings.schedule == "linear":
        return top * (1 - left)
    if settings.schedule == "step":
        return float(top * settings.decay ** sum(step >= round(part * total) for part in settings.milestones or ()))
    return top


def _cosine(start: float, end: float, part: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


class Average:
    """Exponential moving average of a student's weights and floating-point buffers (batch statistics included).

    decay is warmed up as (1 + step) / (10 + step), so that a short run does not average its initial weights in.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        self.values = {name: t.detach().clone() for name, t in module.state_dict().items() if isinstance(t, Tensor)}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        current = self.module.state_dict()
        floats = [name for name, value in self.values.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.values[n] for n in floats], [current[n].detach() for n in floats], 1 - decay)
        for name, value in self.values.items():
            if not value.is_floating_point():
                value.copy_(current[name])


class _State:
    """Everything that a step changes: captured into a checkpoint, restored from one."""

    def __init__(
        self,
        module: nn.Module,
        objective: Objective | StagedObjective,
        optimizer: torch.optim.Optimizer,
        scaler: Any,
        average: Average | None,
    ) -> None:
        self.module, self.objective, self.optimizer, self.scaler, self.average = module, objective, optimizer, scaler, average
        self.best: dict[str, Tensor] | None = None
        self.best_value = -math.inf

    def capture(self, done: Trained) -> dict[str, Any]:
        return {
            "student": dict(self.module.state_dict()),
            "objective": dict(self.objective.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.values,
            "best": self.best,
            "done": {**vars(done), "best_value": self.best_value},
        }

    def restore(self, saved: dict[str, Any], done: Trained) -> None:
        load_state(self.module, saved["student"])
        load_state(self.objective, saved["objective"])
        checkpoint.restore_optimizer(self.optimizer, saved["optimizer"])
        if saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        if self.average is not None:
            for name, value in self.average.values.items():
                value.copy_(saved["average"][name])
        self.best = saved["best"]
        values = dict(saved["done"])
        self.best_value = values.pop("best_value")
        for name, value in values.items():
            setattr(done, name, value)

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """The weights that are evaluated and exported: the average where there is one."""
        if self.average is None:
            yield
            return
        current = {name: t.detach().clone() for name, t in self.module.state_dict().items()}
        load_state(self.module, self.average.values)
        try:
            yield
        finally:
            load_state(self.module, current)

    def finish(self, done: Trained) -> None:
        """Leave the selected weights in the module."""
        if self.best is not None:
            load_state(self.module, self.best)
        elif self.average is not None:
            load_state(self.module, self.average.values)


def _close_epoch(epoch: int, epochs: int, stage: int, state: _State, done: Trained, settings: Train, recorder: Recorder) -> None:
    """Validate, remember the best where the recipe selects it, and write the epoch's line."""
    valid = None
    if recorder.validate is not None:
        with state.evaluated():
            valid = recorder.validate()
            if settings.select == "best" and valid["accuracy"] > state.best_value:
                state.best_value, done.selected_epoch = valid["accuracy"], epoch
                state.best = {name: t.detach().cpu().clone() for name, t in state.module.state_dict().items()}
        state.module.train()
    row = {"role": recorder.role, "epoch": epoch, "stage": stage, "step": done.steps, "valid": valid, "time": time.time()}
    done.history.append({k: row[k] for k in ("epoch", "step", "valid")})
    recorder.log.write(row)
    recorder.progress.epoch(recorder.role, epoch=epoch, epochs=epochs, valid=valid, seconds=done.seconds)


class _Rate:
    """Items a second since the last restart, the first step (warm-up of kernels and loaders) left out."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._steps, self._items, self._start = -1, 0, time.perf_counter()

    def add(self, items: int) -> None:
        self._steps += 1
        if self._steps == 0:
            self._start = time.perf_counter()
        else:
            self._items += items

    @property
    def value(self) -> float:
        return self._items / max(1e-9, time.perf_counter() - self._start) if self._steps > 0 else 0.0

    @property
    def seconds_per_step(self) -> float:
        return (time.perf_counter() - self._start) / self._steps if self._steps > 0 else 0.0


SLOW = 0.2
"""The share of the time that steps may wait for their batches before a person is told."""

_WINDOW = (10, 5.0)  # steps and seconds over which it is judged


class _Wait:
    """How much of the time the steps of a role wait for their batches; validation, and each batch after a restart, are left out."""

    def __init__(self, workers: int) -> None:
        self._workers, self._told = workers, False
        self._window = [0, 0.0, 0.0]  # steps, seconds that they waited, seconds in all
        self.restart()

    def restart(self) -> None:
        self._steps, self._waited, self._start = -1, 0.0, time.perf_counter()

    def over(self, batches: Iterable[tuple[Request, Batch]]) -> Iterator[tuple[Request, Batch]]:
        """The same batches; the time until each is there is counted."""
        left = iter(batches)
        while True:
            began = time.perf_counter()
            found = next(left, None)
            if found is None:
                return
            self._steps += 1
            if self._steps == 0:  # loaders and kernels are started
                self._start = time.perf_counter()
            else:
                self._waited += time.perf_counter() - began
            yield found

    def take(self) -> float | None:
        """The share since it was last taken, from 0 to 1; None before the second step."""
        if self._steps < 1:
            return None
        seconds = max(1e-9, time.perf_counter() - self._start)
        share = self._waited / seconds
        self._window = [self._window[0] + self._steps, self._window[1] + self._waited, self._window[2] + seconds]
        self._steps, self._waited, self._start = 0, 0.0, time.perf_counter()
        return share

    def slow(self) -> str:
        """Once for a role, a sentence that names a slow loader; a window of steps at a time is judged."""
        steps, waited, seconds = self._window
        if steps < _WINDOW[0] or seconds < _WINDOW[1]:
            return ""
        self._window = [0, 0.0, 0.0]
        if self._told or waited <= SLOW * seconds:
            return ""
        self._told = True
        now = f"{self._workers} loader processes" if self._workers else "this process itself"
        return (
            f"{100 * waited / seconds:.0f} % of the last {steps:.0f} steps went by waiting for batches, which {now} made. Raise train.workers, put "
            "the data on a faster disk, or store images in a smaller size (docs/scaling.md, Loaders)."
        )


@contextmanager
def _fork(engine: Engine) -> Iterator[None]:
    """The loop seeds the global generator at every microbatch; the caller's state comes back afterwards."""
    devices = [engine.device] if engine.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def _summed(seen: list[_Seen]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the terms of a step, from those of its microbatches."""
    loss, terms = seen[0].loss, seen[0].terms
    for other in seen[1:]:
        loss = loss + other.loss
        terms = {name: value + other.terms[name] for name, value in terms.items()}
    return loss, terms


def _norms(parameters: list[nn.Parameter], device: torch.device) -> Tensor:
    """``(P,)``: the norm of each parameter's gradient, 0 where it has none."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    found = torch._foreach_norm(gradients) if gradients else ()
    if len(found) == len(parameters):
        return torch.stack(found)
    each, nothing = iter(found), torch.zeros((), device=device)
    return torch.stack([next(each) if p.grad is not None else nothing for p in parameters])


@dataclass(frozen=True)
class _Seen:
    """What a message about one microbatch is made from."""

    loss: Tensor
    terms: dict[str, Tensor]
    student: Tensor
    teacher: Tensor | None
    batch: Batch


@dataclass(frozen=True)
class _Facts:
    """What a message about one step is made from. norms: of every parameter's gradient, in the optimiser's order."""

    step: int
    batch: Batch
    seen: list[_Seen]
    norms: Tensor


class _Watch:
    """Stops a fit at the step whose loss, gradient or optimiser's state is not finite, before the weights are touched; and where what a step has
    made of them is not finite, before that is validated or saved.

    On a CPU it is looked at at once. On CUDA a look makes the host wait for the device, and then the device for the host. So the optimiser is told
    there by a tensor (``found_inf`` of its kernels, made for torch's gradient scaler) and leaves the weights alone where that says so. The
    host looks one step later, when the answer has long arrived, or before anything is logged, validated or saved; what its message is made
    from is kept until then.
    """

    def __init__(
        self,
        touch: Step,
        scaler: torch.amp.GradScaler,
        engine: Engine,
        parameters: list[Tensor],
        modules: list[nn.Module],
        role: str,
        ranks: Ranks,
    ) -> None:
        self._touch, self._scaler, self._engine, self._role, self._ranks = touch, scaler, engine, role, ranks
        self._parameters = parameters
        self._name = {id(p): name for module in modules for name, p in module.named_parameters()}
        self._kept: tuple[_Facts, Tensor, torch.cuda.Event | None] | None = None

    def judge(self, facts: _Facts, loss: Tensor, norm: Tensor) -> Tensor | None:
        """Called when the gradient of a step is there and its weights are not touched yet. Returns, where only the device knows it, a float
        that is 1 where the optimiser must leave them alone.

        Raises: NonFinite for this step, or for the one before.
        """
        self.look()
        state = self._touch.total()
        if not (self._engine.asynchronous or self._scaler.is_enabled()):
            if not all(math.isfinite(float(x)) for x in (loss, norm, state)):
                raise self._error(facts)
            return None
        skipped = ~(loss.isfinite() & norm.isfinite() & state.isfinite())
        bad = skipped
        if self._scaler.is_enabled():  # it tries again with half the scale, for as long as there is one
            half = self._scaler.scale(torch.ones_like(loss)) * self._scaler.get_backoff_factor()
            bad = ~(loss.isfinite() & state.isfinite()) | (skipped & (half < 1))
        told = bad.to("cpu", non_blocking=True)  # into page-locked memory, as torch does it
        event = None
        if bad.is_cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._kept = facts, told, event
        return skipped.float()

    def look(self) -> None:
        """Raises: NonFinite if the last step that was judged was bad."""
        if self._kept is None:
            return
        facts, told, event = self._kept
        self._kept = None
        if event is not None:
            event.synchronize()
        if bool(told):
            raise self._error(facts)

    def refuse_spoilt(self, steps: int) -> None:
        """Raises: NonFinite if the weights, or the optimiser's state, are not finite after ``steps`` steps; they are the same on all ranks."""
        bad = [p for p in self._parameters if not bool(p.isfinite().all())]
        what = "weights"
        if not bad and not math.isfinite(float(self._touch.total())):
            bad, what = self._touch.spoilt(), "the optimiser's state"
        if bad:
            text = f"Step {steps} of the {self._role} left NaN or infinity in {what} of {self._names(bad)}. Nothing was saved of it"
            raise self._ranks.told_by_main(NonFinite(f"{text}, and the last checkpoint is kept. Lower train.lr or set train.clip_norm."))

    def _names(self, parameters: list[Tensor]) -> str:
        names = [self._name[id(p)] for p in parameters]
        return f"{', '.join(names[:4])}{' and more' if len(names) > 4 else ''}"

    def _error(self, facts: _Facts) -> LimbeckError:
        """Loss and norm are sums over all ranks, so all of them are here: one whose own loss is bad can say where."""
        concerned = any(not math.isfinite(float(seen.loss)) for seen in facts.seen)
        return NonFinite(self._message(facts)) if self._ranks.speaker(concerned) else Elsewhere(NonFinite.exit_code)

    def _message(self, facts: _Facts) -> str:
        start = f"Step {facts.step + 1} of the {self._role}: "
        end = "The weights were not touched, and the last checkpoint is kept. "
        for seen in facts.seen:
            if not math.isfinite(float(seen.loss)):
                return f"{start}{_bad_loss(seen)}. {end}Lower train.lr, set train.clip_norm, or look at these samples."
        spoilt = self._touch.spoilt()
        if spoilt:
            text = f"the optimiser's state of {self._names(spoilt)} has NaN or infinity since the step before. {end}"
            return f"{start}{text}Go on from it with --resume; if it comes back, lower train.lr or set train.clip_norm."
        bad = [p for p, norm in zip(self._parameters, facts.norms.tolist(), strict=True) if not math.isfinite(norm)]
        named = self._names(bad) if bad else "all parameters together"
        return (
            f"{start}the loss is finite but the gradient of {named} is not, for {_ids(facts.batch, facts.batch.mask)}. {end}"
            "Lower train.lr or use precision: float32."
        )


def _bad_loss(seen: _Seen) -> str:
    """Which terms of a microbatch are not finite, and where the first such values stand."""
    named = [name for name, value in seen.terms.items() if not math.isfinite(float(value))] or ["the weighted sum"]
    where, rows = "the loss", seen.batch.mask.new_ones(len(seen.batch))
    inputs = {f"the input {name!r}": value for name, value in seen.batch.student.items() if value.is_floating_point()}
    for what, tensor in {**inputs, "the teacher's logits": seen.teacher, "the student's logits": seen.student}.items():
        bad = None if tensor is None else tensor.isnan().flatten(1).any(1) | (tensor == math.inf).flatten(1).any(1)
        if bad is not None and bool(bad.any()):
            where, rows = what, bad
            break
    return f"the term {' and '.join(named)} is {float(seen.loss)}; {where} has NaN or infinity for {_ids(seen.batch, rows)}"


def _ids(batch: Batch, rows: Tensor) -> str:
    found = [f"{high:016x}{low:016x}" for (high, low), keep in zip(batch.ids.tolist(), rows.tolist(), strict=True) if keep]
    return f"sample{'s' if len(found) != 1 else ''} {', '.join(found[:8])}" + (f" and {len(found) - 8} more" if len(found) > 8 else "")
