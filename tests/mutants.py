"""Break the code on purpose, one known way at a time: for each, a named test must go red.

    python tests/mutants.py              all of them
    python tests/mutants.py NAME ...     these

A test suite that stays green when the temperature's square is gone proves nothing about it. Each mutant is the text of one place in ``src``,
which must occur there exactly once, and what stands there instead. The tree is copied once into a temporary folder; the named tests run in
the copy, on the copy's package, first as it is (green), then with each mutant (red), each time in a fork of a process that has imported torch
and nothing of Limbeck. Exit code 1 if any mutant is not caught.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 600  # seconds, of one run of pytest


@dataclass(frozen=True)
class Mutant:
    """One way to be silently wrong. file: below ``src/limbeck``; tests: below ``tests`` (or ``src/...`` for doctests)."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


LOSSES = ("unit/test_losses.py", "reference/test_losses.py")
OBJECTIVE = ("unit/test_objective.py",)
LOOP = ("unit/test_loop.py",)
OPTIMIZER = ("unit/test_optimizer.py",)
RESUME = ("unit/test_loop.py::test_a_stop_at_every_step_ends_in_the_same_bytes",)
KILLED = ("unit/test_loop.py::test_a_killed_run_leaves_no_step_twice_in_the_log",)
TEACHER = ("unit/test_teacher.py",)
CRD = ("unit/test_crd.py",)
PEERS = ("e2e/test_peers.py",)
VERSION = ("e2e/test_resume.py::test_a_module_that_wants_to_know_its_version",)
PAIRING = ("unit/test_layers.py",)
KILLED_PEERS = ("e2e/test_peers.py::test_killed_between_the_student_and_its_peers",)
BATCHES = ("unit/test_data_batches.py",)
LENT = ("e2e/test_peers.py::test_a_sweep_lends_a_baseline_of_the_same_budget_alone",)
TWINS = ("e2e/test_ensemble.py::test_two_of_one_kind_are_two",)
STAGED_AVERAGE = ("e2e/test_peers.py::test_two_stages_move_one_average_once",)
ENSEMBLE = ("unit/test_ensemble.py",)
OF_TEACHERS = ("e2e/test_ensemble.py::test_the_teacher_of_the_report_is_what_they_say_together",)
FORGETS = ("e2e/test_ensemble.py::test_a_member_goes_on_as_it_began",)
BASELINE = ("unit/test_baseline.py",)
VIEWS = ("unit/test_data_views.py",)
SPLITS = ("unit/test_data_splits.py",)
STAGES = ("unit/test_stages.py",)
ALIKE = ("e2e/test_gathered.py::test_ranks_with_other_numbers_of_microbatches_go_together",)
GATHERED = ("e2e/test_gathered.py::test_ranks_end_in_the_weights_of_one_process",)
CHECKPOINT = ("unit/test_checkpoint.py",)
CRASHED = ("faults/test_faults.py::test_r4_a_crash_after_every_event_of_a_checkpoint",)

PLACEMENT = ("unit/test_placement.py",)
AHEAD = "                before = request, batch, future\n            if before is not None:"
DUE = "self._present = future\n                yield request, batch"
RUN = ("unit/test_run.py",)
ARTIFACT = ("unit/test_artifact.py",)
QUANTIZE = ("unit/test_quantize.py",)
SERVE = ("unit/test_serve.py",)
RECOMPUTE = ("unit/test_recompute.py",)
MEMORY = ("unit/test_memory.py",)
LOAD = ("unit/test_data_load.py",)
BALANCE = ("unit/test_balance.py",)
EXACT = ("unit/test_exact.py",)

MUTANTS = (
    # --- bad files and full disks
    Mutant("half-a-line-in-the-log", "run.py", "            self.cut(before)\n            raise", "            raise", RUN),
    Mutant("a-full-disk-of-safetensors-is-a-bug", "run.py", 'type(error).__name__ == "SafetensorError" and', "False and", RUN),
    Mutant("any-number-of-pixels", "pixels.py", "if width * height > most:", "if False:", LOAD),
    Mutant(
        "archives-unfold-without-measure", "data/arrays.py", "if member.file_size > may_unfold_to(member.compress_size):", "if False:", LOAD
    ),
    Mutant("skipped-samples-are-not-listed", "data/splits.py", "for row in part.skipped)", "for row in part.skipped if False)", LOAD),
    # --- serving
    Mutant("any-file-is-served", "serve/_folder.py", "if given != wanted:", "if False:", SERVE),
    Mutant(
        "answers-of-a-batch-are-mixed-up",
        "serve/_batching.py",
        "at += item.rows\n\n    async def _run",
        "at += 0\n\n    async def _run",
        SERVE,
    ),
    Mutant("bodies-without-end", "serve/_gate.py", "if seen.bytes_in > self._settings.max_body:", "if False:", SERVE),
    # --- artifacts
    Mutant("a-changed-artifact-is-served", "serve/_folder.py", "if found != wanted:", "if False:", ARTIFACT),
    Mutant(
        "the-test-split-decides",
        "_artifacts.py",
        'return _Deciding(data.valid, data.train, "validation")',
        'return _Deciding(data.test, data.train, "validation")',
        ARTIFACT,
    ),
    Mutant("any-drop-is-allowed", "export/_quantize.py", "if drop <= max_drop + 1e-9 and not broken:", "if not broken:", QUANTIZE),
    Mutant("the-cheapest-nodes-stay-in-float", "export/_methods.py", "key=lambda n: -errors[n]", "key=lambda n: errors[n]", QUANTIZE),
    Mutant("float16-cuts-off-what-was-left", "export/_methods.py", "        _join(made.model.graph, own)\n", "", QUANTIZE),
    # --- memory and loaders
    Mutant(
        "batch-statistics-move-twice",
        "models/_recompute.py",
        "use_reentrant=False, context_fn=lambda: (nullcontext(), _Swapped(before)))",
        "use_reentrant=False)",
        RECOMPUTE,
    ),
    Mutant(
        "other-dropout-the-second-time",
        "models/_recompute.py",
        "return checkpoint(called, *leaves, use_reentrant=False)\n",
        "return checkpoint(called, *leaves, use_reentrant=False, preserve_rng_state=False)\n",
        RECOMPUTE,
    ),
    Mutant(
        "features-of-the-second-pass",
        "models/_capture.py",
        "if not self._listening:\n                return\n            try:",
        "try:",
        RECOMPUTE,
    ),
    Mutant("a-block-stays-patched", "models/_recompute.py", "vars(m).pop(key, None)", "pass", RECOMPUTE),
    Mutant(
        "batch-statistics-are-cut", "_microbatch.py", "    if parts.batch_statistics:\n        why", "    if False:\n        why", MEMORY
    ),
    Mutant("ranks-each-take-all-memory", "memory.py", "return left // processes", "return left", MEMORY),
    Mutant(
        "shared-memory-without-measure",
        "data/loader.py",
        "fitting = min(workers, max(0, (free",
        "fitting = max(workers, max(0, (free",
        MEMORY,
    ),
    Mutant("nobody-waits", "loop.py", "self._waited += time.perf_counter() - began", "self._waited += 0.0", MEMORY),
    # --- where the teacher sits
    Mutant("asked-when-it-is-due", "placement.py", AHEAD, AHEAD.replace("before = request, batch, future", DUE), PLACEMENT),
    Mutant("asked-about-whole-steps", "placement.py", "for start, stop in parts]", "for start, stop in [(0, len(whole))]]", PLACEMENT),
    Mutant(
        "strides-not-kept", "placement.py", "sorted(range(tensor.ndim), key=lambda i: -strides[i])", "list(range(tensor.ndim))", PLACEMENT
    ),
    # --- losses
    Mutant("no-temperature-squared", "losses/logits.py", "return temperature**2 * divergence", "return divergence", LOSSES),
    Mutant(
        "student-detached",
        "losses/logits.py",
        "student, teacher = raised(student),",
        "student, teacher = raised(student).detach(),",
        LOSSES,
    ),
    Mutant(
        "kl-swapped",
        "losses/logits.py",
        "kl(log_softmax(teacher, temperature), log_softmax(student, temperature))",
        "kl(log_softmax(student, temperature), log_softmax(teacher, temperature))",
        LOSSES,
    ),
    Mutant("teacher-not-softened", "losses/logits.py", "kl(log_softmax(teacher, temperature)", "kl(log_softmax(teacher, 1.0)", LOSSES),
    Mutant(
        "teacher-gets-gradient", "losses/logits.py", "raised(student), raised(teacher).detach()", "raised(student), raised(teacher)", LOSSES
    ),
    Mutant("biased-standard-deviation", "losses/_shared.py", "(count - 1).clamp(min=1).sqrt()", "count.clamp(min=1).sqrt()", LOSSES),
    Mutant("a-masked-class-has-no-gradient-left", "losses/_shared.py", "log_q.masked_fill(none, 0.0))).sum(-1)", "log_q)).sum(-1)", LOSSES),
    Mutant(
        "dkd-masks-with-1000",
        "losses/targets.py",
        "others = logits.masked_fill(chosen, -torch.inf)",
        "others = logits - 1000.0 * chosen",
        LOSSES,
    ),
    Mutant(
        "layers-are-always-summed",
        "objective.py",
        'summed / len(each) if self.entry.layers == "mean" else summed',
        "summed",
        LOSSES,
    ),
    Mutant("attention-of-padding", "losses/transformers.py", ".square().mean(1).masked_fill(~pairs, 0.0)", ".square().mean(1)", LOSSES),
    Mutant(
        "keys-for-queries",
        "models/_capture.py",
        "torch.cat([said[i] for i in range(count)], -1)",
        "torch.cat([said[i] for i in (1, 0, 2)], -1)",
        ("unit/test_layers.py",),
    ),
    Mutant(
        "stages-from-the-first",
        "models/_pairing.py",
        "each[-min(map(len, stages)) :]",
        "each[: min(map(len, stages))]",
        ("unit/test_layers.py",),
    ),
    Mutant("stages-end-within-the-next-block", "models/_pairing.py", "return any(outer in blocks or", "return any(False and", PAIRING),
    Mutant("gates-end-the-stages", "models/_pairing.py", "if all(sizes.get(outer, (1, 1)) == (1, 1) for", "if all(True for", PAIRING),
    Mutant(
        "attention-within-a-stage-is-a-transformer", "models/_pairing.py", "inside = len(stages) > 2 and", "inside = False and", PAIRING
    ),
    Mutant(
        "a-resume-pairs-anew",
        "_folder.py",
        'update={"train": train, "objective": objective}',
        'update={"train": train}',
        ("e2e/test_losses.py",),
    ),
    Mutant(
        "nkd-at-one-temperature",
        "losses/targets.py",
        "log_softmax(teacher, 1.0).gather",
        "log_softmax(teacher, temperature).gather",
        LOSSES,
    ),
    Mutant(
        "wsld-weights-get-gradient",
        "losses/targets.py",
        "F.cross_entropy(student.detach(), labels",
        "F.cross_entropy(student, labels",
        LOSSES,
    ),
    Mutant(
        "jsd-from-the-other-side",
        "losses/divergences.py",
        "ours, theirs = math.log1p(-beta), math.log(beta)",
        "theirs, ours = math.log1p(-beta), math.log(beta)",
        LOSSES,
    ),
    Mutant("dist-clamps-instead-of-adding", "losses/relations.py", "/ (norms + eps)", "/ norms.clamp(min=eps)", LOSSES),
    Mutant(
        "dkd-with-blended-labels",
        "losses/_table.py",
        '"temperature": 4.0},\n        hard_labels=True,',
        '"temperature": 4.0},',
        ("unit/test_mistakes.py",),
    ),
    Mutant("losses-in-half", "losses/_seam.py", "return x.float() if x.dtype in", "return x if x.dtype in", LOSSES),
    Mutant(
        "label-smoothing-ignored",
        "losses/logits.py",
        'weight, label_smoothing=label_smoothing, reduction="none"',
        'weight, reduction="none"',
        LOSSES,
    ),
    Mutant(
        "class-weights-ignored-after-mixup",
        "losses/logits.py",
        "    if weight is not None:\n        target = target * weight\n",
        "",
        LOSSES,
    ),
    Mutant("hint-not-projected", "losses/features.py", "student = self.projection(student)", "pass", LOSSES),
    Mutant(
        "rows-of-length-1-by-l1",
        "losses/relations.py",
        "(unit(s @ s.T) - unit(t @ t.T))",
        "(F.normalize(s @ s.T, 1) - F.normalize(t @ t.T, 1))",
        LOSSES,
    ),
    Mutant(
        "rkd-distances-not-in-units",
        "losses/relations.py",
        "return distances / (distances.sum() / pairs if len(x) > 1 else 1.0)",
        "return distances",
        LOSSES,
    ),
    Mutant("rkd-mean-over-the-diagonal", "losses/relations.py", "max(len(x) * (len(x) - 1), 1)", "max(len(x) * len(x), 1)", LOSSES),
    Mutant("cka-not-centred", "losses/relations.py", "s, t = s - s.mean(0), t - t.mean(0)", "", LOSSES),
    Mutant(
        "zero-vectors-explode",
        "losses/_shared.py",
        "return (x / length.masked_fill(short, 1.0)).masked_fill(short, 0.0)",
        "return F.normalize(x, dim=-1, eps=eps)",
        LOSSES,
    ),
    Mutant("attention-of-signed-features", "losses/maps.py", "unit(x.abs().pow(p).mean(1)", "unit(x.mean(1)", LOSSES),
    Mutant("nst-of-first-degree", "losses/maps.py", "(a @ b.transpose(1, 2)).square()", "(a @ b.transpose(1, 2))", LOSSES),
    Mutant("nst-of-places-not-divided", "losses/maps.py", "@ s / s.shape[1] -", "@ s -", LOSSES),
    Mutant("vid-without-its-variance", "losses/maps.py", " + variance.log())", " )", LOSSES),
    Mutant("ofd-whole-l2", "losses/maps.py", " * ((student > target) | (target > 0))", "", LOSSES),
    Mutant(
        "padded-keys-count", "losses/transformers.py", "_scores(a, b).masked_fill(padded & ~nobody, -torch.inf)", "_scores(a, b)", LOSSES
    ),
    Mutant("patient-with-every-token", "losses/transformers.py", "x[:, 0] if x.ndim == 3", "x.mean(1) if x.ndim == 3", LOSSES),
    Mutant(
        "hcl-halves-for-sizes-left-out",
        "losses/maps.py",
        "        if size < student.shape[2]:\n            weight /= 2\n",
        "        weight /= 2\n        if size < student.shape[2]:\n",
        LOSSES,
    ),
    Mutant("a-loss-of-maps-takes-vectors", "objective.py", "if advice:", "if False:", LOSSES),
    # --- the objective
    Mutant(
        "mask-dropped",
        "objective.py",
        "batch.labelled if self.of_labels else batch.mask.numpy(force=True)",
        "batch.labelled if self.of_labels else np.ones_like(batch.mask.numpy(force=True))",
        OBJECTIVE,
    ),
    Mutant("mask-dropped-for-labels", "types.py", "known & self.mask.numpy(force=True)", "known", OBJECTIVE),
    Mutant(
        "padding-counted",
        "objective.py",
        '["attention_mask"].numpy(force=True) != 0',
        '["attention_mask"].numpy(force=True) >= 0',
        OBJECTIVE,
    ),
    Mutant("divided-by-the-microbatch", "objective.py", "count = max(counts[term.name], 1)", "count = max(len(batch), 1)", OBJECTIVE),
    Mutant("divided-by-all-rows", "objective.py", "int(np.count_nonzero(found))", "found.size", OBJECTIVE),
    Mutant("mixed-unlabelled-as-labelled", "types.py", "labels.sum(-1) > 0", "labels.sum(-1) >= 0", OBJECTIVE),
    Mutant("unlabelled-as-labelled", "types.py", "known = labels >= 0 if", "known = labels >= -1 if", OBJECTIVE),
    Mutant("schedules-ignored", "objective.py", "return value.start * (1 - done) + value.end * done", "return value.start", OBJECTIVE),
    Mutant(
        "losses-under-autocast",
        "objective.py",
        "student.logits.device.type, enabled=False",
        "student.logits.device.type, enabled=True",
        OBJECTIVE,
    ),
    Mutant("baseline-with-the-students-weight", "objective.py", 'model_copy(update={"weight": 1.0})', "model_copy(update={})", OBJECTIVE),
    Mutant(
        "class-weights-not-balanced", "objective.py", "counts.sum() / (occurring * counts.clamp(min=1))", "1.0 * (counts > 0)", OBJECTIVE
    ),
    Mutant(
        "balance-averages-the-first-gradient",
        "objective.py",
        "before == 1, ratio, before**KEPT",
        "before == 0, ratio, before**KEPT",
        BALANCE,
    ),
    Mutant("lone-request-goes-to-the-thread", "serve/_batching.py", "self._waiting else ALONE)", "self._waiting else INLINE)", SERVE),
    Mutant("a-refused-batch-holds-the-loop-up", "serve/_batching.py", "[item], again=True", "[item]", SERVE),
    Mutant("long-texts-are-taken-for-short-ones", "serve/_batching.py", "0 < _size(batch) * self._cost", "0 < self._cost", SERVE),
    # --- the same bits on CUDA
    Mutant("ordered-kernels-not-asked-for", "_exact.py", "cudnn.benchmark = True, False", "cudnn.benchmark = False, False", EXACT),
    Mutant("unordered-operation-not-refused", "_exact.py", 'warn_only=wanted == "auto"', "warn_only=True", EXACT),
    Mutant("word-on-an-unordered-operation-hidden", "_exact.py", 'filterwarnings("always"', 'filterwarnings("ignore"', EXACT),
    Mutant("ordered-kernels-for-ever", "_exact.py", "torch.use_deterministic_algorithms(enabled, warn_only=lenient)", "pass", EXACT),
    # --- the teacher
    Mutant("teacher-in-train-mode", "teacher.py", "self.model.module.eval()", "self.model.module.train()", (*LOOP, *TEACHER)),
    Mutant("class-map-not-applied", "teacher.py", "logits = logits.index_select(-1, self._columns)", "pass", TEACHER),
    Mutant(
        "class-map-not-evaluated",
        "teacher.py",
        "return logits if self._columns is None else logits[:, self._columns.cpu().numpy()]",
        "return logits",
        TEACHER,
    ),
    Mutant(
        "class-map-inverted",
        "models/_labels.py",
        "found = np.array([position[name] for name in data_names], dtype=np.int64)",
        "found = np.argsort([position[name] for name in data_names])",
        ("unit/test_models_python.py",),
    ),
    Mutant(
        "teacher-sees-the-students-inputs",
        "teacher.py",
        "(batch.teacher or {}).items()",
        "batch.student.items()",
        TEACHER,
    ),
    Mutant("teacher-change-not-noticed", "teacher.py", "if state_hash(self.model.module) != self._before:", "if False:", LOOP),
    # --- the teacher's cache
    Mutant(
        "recalled-whatever-it-imports",
        "models/_identity.py",
        'if about["kind"] == "python" and not _stands_alone(about["build"], folder):',
        'if about["kind"] == "python" and not about["build"].get("file"):',
        ("e2e/test_cache.py::test_a_teacher_whose_file_imports_its_neighbour_is_loaded",),
    ),
    Mutant(
        "adopted-with-the-old-names",
        "cache/_directory.py",
        "manifest = replace(manifest, about=about)",
        'manifest = replace(manifest, about={**manifest.about, "sources": about["sources"]})',
        ("unit/test_cache_store.py::test_who_adopts_a_directory_brings_its_own_names",),
    ),
    Mutant(
        "told-apart-by-address",
        "models/_identity.py",
        '_PLACE.sub("", said)',
        "said",
        ("unit/test_cache_identity.py::test_tables_of_functions_are_the_same_in_every_process",),
    ),
    Mutant(
        "graphs-walked-again-and-again",
        "models/_identity.py",
        "number = numbers[id(value)] = len(numbers)",
        "number = len(met)",
        ("unit/test_cache_identity.py::test_each_object_of_a_graph_that_leads_back_is_looked_at_once",),
    ),
    Mutant(
        "arrays-in-settings-not-told-apart",
        "models/_identity.py",
        "return _array(value) or _LEFT_OUT\n\n\ndef _array",
        "return _LEFT_OUT\n\n\ndef _array",
        ("unit/test_cache_identity.py::test_settings_that_hold_values_are_told_apart",),
    ),
    Mutant(
        "closures-not-told-apart",
        "models/_identity.py",
        "if held or function.__defaults__ or function.__kwdefaults__:",
        "if False:",
        ("unit/test_cache_identity.py::test_tables_of_other_functions_are_another_teacher",),
    ),
    Mutant(
        "draws-not-compared",
        "cache/_codec.py",
        "(np.where(rest > np.exp(_NOTHING), beside, 0.0).max(1), log_bound)",
        "(np.zeros(rows), log_bound)",
        ("unit/test_cache_codec.py",),
    ),
    Mutant(
        "whole-answers-not-read",
        "_begin.py",
        "(wanted or not job.ranks.any(not answers.begun()))",
        "wanted",
        ("e2e/test_cache.py::test_what_is_there_is_read_although_each_answer_is_used_once",),
    ),
    Mutant(
        "resumed-otherwise-than-begun",
        "_begin.py",
        "if before is False and wanted is not False:",
        "if False:",
        ("e2e/test_cache.py::test_a_resumed_run_goes_on_with_or_without_answers_as_it_began",),
    ),
    Mutant(
        "lost-rows-are-the-last-ones",
        "cache/_store.py",
        "if (parts < 0).any():  # or",
        "if False:  # or",
        ("unit/test_cache_store.py::test_rows_that_were_taken_out_meanwhile",),
    ),
    Mutant(
        "repair-removes-what-came-since",
        "cache/_manage.py",
        "named = {p.name for p in now.parts}  # some may",
        "pass  # some may",
        ("unit/test_cache_damage.py::test_a_part_that_is_committed_while_another_process_repairs_is_kept",),
    ),
    # --- order, views, batches
    Mutant("view-without-seed", "data/views.py", 'uniform(ids, 2, data_seed, "crop", view)', 'uniform(ids, 2, 0, "crop", view)', VIEWS),
    Mutant("view-without-number", "data/views.py", 'uniform(ids, 2, data_seed, "crop", view)', 'uniform(ids, 2, data_seed, "crop")', VIEWS),
    Mutant(
        "view-by-place-in-the-batch",
        "data/views.py",
        'uniform(ids, 1, data_seed, "flip", view)',
        'uniform(np.arange(len(ids), dtype=np.uint64), 1, data_seed, "flip", view)',
        VIEWS,
    ),
    Mutant(
        "mixup-labels-swapped", "data/batches.py", "((rows, share), (other, 1.0 - share))", "((other, share), (rows, 1.0 - share))", VIEWS
    ),
    Mutant(
        "mixup-share-without-view",
        "data/batches.py",
        'self._augment.mixup, self._seed, "mixup", request.view)',
        'self._augment.mixup, self._seed, "mixup")',
        VIEWS,
    ),
    Mutant(
        "order-without-epoch",
        "data/batches.py",
        'order(self.count, self.seed, "order", self.first_epoch + epoch)',
        'order(self.count, self.seed, "order")',
        BATCHES,
    ),
    Mutant("view-never-changes", "data/batches.py", "epoch if self.views is None else epoch % self.views", "0", BATCHES),
    Mutant("mean-not-subtracted", "pixels.py", "out[:, channel] -= kind(mean / std)", "pass", BATCHES),
    Mutant(
        "teacher-gets-the-students-preparation",
        "data/batches.py",
        'number: student if self._shared(wanted) else prepare(f"teacher {number}", wanted, shown)',
        "number: student",
        BATCHES,
    ),
    # --- crd and review
    Mutant("crd-draws-the-same-in-every-step", "objective.py", ", number, float(progress).hex())", ", number)", CRD),
    Mutant(
        "crd-at-half-momentum",
        "losses/contrast.py",
        "memory[places] * self._momentum + mean * (1 - self._momentum)",
        "memory[places] * 0.5 + mean * 0.5",
        CRD,
    ),
    Mutant("crd-takes-one-of-equal-samples", "losses/contrast.py", "/ counts[:, None]", "/ 1", CRD),
    Mutant("crd-told-from-its-own-class", "losses/_population.py", "others + width * (others >= start)", "others", CRD),
    Mutant("crd-without-noise", "losses/contrast.py", "(samples.shape[1] - 1) / len(self.of_student)", "1 / len(self.of_student)", LOSSES),
    Mutant("review-without-the-deeper-levels", "losses/maps.py", "            deeper = x\n            total", "            total", LOSSES),
    Mutant("review-weighs-both-by-one", "losses/maps.py", "x = a * x + b * y", "x = a * x + a * y", LOSSES),
    Mutant(
        "review-resizes-before-it-fuses",
        "losses/maps.py",
        "total = total + hcl(self.then[i](x), theirs[i])",
        "total = total + hcl(x, theirs[i])",
        LOSSES,
    ),
    # --- exits
    Mutant("ofa-counts-the-label-twice", "losses/exits.py", "** gamma - chosen", "** gamma", LOSSES),
    Mutant("ofa-enhances-every-class", "losses/exits.py", "(p + chosen) ** gamma", "(p + 1) ** gamma", LOSSES),
    Mutant(
        "exits-read-padding",
        "losses/exits.py",
        "there = mask.to(x.dtype)[..., None]",
        "there = mask.to(x.dtype)[..., None] * 0 + 1",
        LOSSES,
    ),
    Mutant(
        "byot-teaches-the-last-layer",
        "losses/exits.py",
        "log_softmax(raised(logits).detach(), t)",
        "log_softmax(raised(logits), t)",
        LOSSES,
    ),
    # --- students that learn together
    Mutant("peers-are-pulled-to-what-they-teach", "losses/peers.py", "log_p, count = log_q.detach()", "log_p, count = log_q", LOSSES),
    Mutant(
        "mutual-not-divided-by-the-others",
        "losses/peers.py",
        "torch.stack(pairs).sum(0) / (count - 1)",
        "torch.stack(pairs).sum(0)",
        LOSSES,
    ),
    Mutant("the-worst-student-teaches", "losses/peers.py", "wrong.argmin(1)", "wrong.argmax(1)", LOSSES),
    Mutant("min-logit-of-raw-logits", "losses/peers.py", "(told - told.gather(2, at)).amin(1)", "told.amin(1)", LOSSES),
    Mutant("a-baseline-lent-to-another-budget", "_sweep_share.py", "recipe.views, whole])", "recipe.views])", LENT),
    Mutant("twins-are-one-teacher", "_begin.py", "return recipe.seed if number == 0 else", "return recipe.seed if True else", TWINS),
    Mutant(
        "the-average-moves-twice",
        "objective.py",
        "for loss in dict.fromkeys(self.remembering()):",
        "for loss in self.remembering():",
        STAGED_AVERAGE,
    ),
    Mutant("the-average-is-not-warmed-up", "losses/peers.py", ".clamp(min=1 - self._decay)", "* 0 + (1 - self._decay)", LOSSES),
    Mutant("the-average-trains", "losses/peers.py", "        self.average.eval()\n        return self", "        return self", LOSSES),
    Mutant(
        "a-mean-teacher-without-unlabelled-rows",
        "_parts.py",
        "if with_teacher or self.unlabelled_too else self.labelled\n        plans",
        "if with_teacher else self.labelled\n        plans",
        PEERS,
    ),
    Mutant("peers-begin-as-the-student", "_begin.py", 'own = seed_for(seed, "peer", number)', "own = seed", PEERS),
    Mutant(
        "a-finished-peer-is-not-read-back",
        "_roles.py",
        "zip([student, *peers], states, strict=True)",
        "zip([student], states)",
        KILLED_PEERS,
    ),
    Mutant("each-term-takes-the-first-view", "objective.py", "batch.others[self.first_view :]", "batch.others", LOSSES),
    Mutant("a-version-that-is-not-told", "models/_files.py", "placed._metadata = ", "_ = ", VERSION),
    Mutant("further-views-beyond-the-shared-memory", "data/loader.py", "[batch.student, *batch.others]", "[batch.student]", MEMORY),
    Mutant("peers-of-one-seed-are-told", "_results.py", "_over_seeds(list(peer), best)", "peer[best]", PEERS),
    Mutant("all-have-views-of-their-own", "objective.py", " if self.entry.own_views else ()", "", LOSSES),
    Mutant(
        "nobody-has-a-view-of-its-own",
        "objective.py",
        "own[: self.beside] or (batch.student,) * self.beside",
        "(batch.student,) * self.beside",
        LOSSES,
    ),
    Mutant("a-view-of-its-own-that-is-not", "data/batches.py", 'seed_for(data_seed, "another view", number)', "data_seed", BATCHES),
    Mutant("a-baseline-of-its-own-feed", "_parts.py", "if taught and self.labelled is not", "if self.labelled is not", PEERS),
    # --- several teachers
    Mutant("probabilities-averaged-at-one", "ensemble.py", "(each / self.temperature).log_softmax(-1)", "each.log_softmax(-1)", ENSEMBLE),
    Mutant("averaged-probabilities-not-softened-back", "ensemble.py", ".logsumexp(0) * self.temperature", ".logsumexp(0)", ENSEMBLE),
    Mutant(
        "weights-of-teachers-left-out", "ensemble.py", "(spread + shares[..., None].log())", "(spread + 0 * shares[..., None])", ENSEMBLE
    ),
    Mutant("the-unsure-teacher-counts-more", "ensemble.py", "(-entropy).softmax(0)", "entropy.softmax(0)", ENSEMBLE),
    Mutant("confidence-by-the-logit", "ensemble.py", "spread.amax(-1).softmax(0)", "logits.amax(-1).softmax(0)", ENSEMBLE),
    Mutant("all-teachers-see-the-first-ones-inputs", "types.py", 'own = member_input(number, "")', 'own = member_input(0, "")', ENSEMBLE),
    Mutant("a-resumed-member-forgets-its-cache", "_begin.py", 'job.role.replace("teacher", "teacher_cache")', '"teacher_cache"', FORGETS),
    Mutant("evaluated-at-the-temperature", "ensemble.py", "return replace(self, temperature=1.0)", "return self", OF_TEACHERS),
    Mutant(
        "padding-attended",
        "data/text.py",
        "torch.from_numpy(mask.astype(np.int64))",
        "torch.from_numpy(np.ones_like(mask, dtype=np.int64))",
        BATCHES,
    ),
    Mutant("duplicates-on-both-sides", "data/splits.py", "first, group = groups(ids)", "first = group = np.arange(len(ids))", SPLITS),
    Mutant(
        "all-labels-kept",
        "data/splits.py",
        "labels[labelled[ranked[spec.labelled_limit :]]] = UNLABELLED",
        "pass",
        SPLITS,
    ),
    # --- the loop
    Mutant(
        "dropout-seed-forgotten",
        "loop.py",
        'engine.seed(seed_for(seed, "dropout", request.step, micro, ranks.rank))',
        "pass",
        LOOP,
    ),
    Mutant(
        "dropout-without-microbatch",
        "loop.py",
        '"dropout", request.step, micro, ranks.rank)',
        '"dropout", request.step, 0, ranks.rank)',
        LOOP,
    ),
    Mutant("student-left-in-eval", "loop.py", "        state.module.train()\n", "", LOOP),
    Mutant("warm-up-ignored", "loop.py", "warm = round(settings.warmup * total)", "warm = 0", LOOP),
    Mutant("bad-step-taken", "loop.py", "return skipped.float()", "return None", LOOP),
    Mutant("bad-step-seen-too-late", "loop.py", "        self.look()\n        state = ", "        state = ", LOOP),
    Mutant(
        "left-in-a-complete-cache",
        "spine.py",
        "            tidy(folder)\n",
        "            pass\n",
        ("faults/test_faults.py::test_r4_a_crash_between_the_last_answers_and_the_end_of_their_filling",),
    ),
    Mutant(
        "spoilt-state-used",
        "loop.py",
        "for x in (loss, norm, state))",
        "for x in (loss, norm))",
        ("faults/test_r08_to_r12.py::test_r9_not_finite",),
    ),
    Mutant(
        "spoilt-state-saved",
        "loop.py",
        "        watch.refuse_spoilt(done.steps)\n        recorder",
        "        recorder",
        ("faults/test_r08_to_r12.py::test_r9_not_finite",),
    ),
    Mutant("bad-step-saved", "loop.py", "    def commit() -> None:\n        watch.look()\n", "    def commit() -> None:\n", LOOP),
    Mutant(
        "decoded-image-believed",
        "data/decoded.py",
        "or slot[:_SUM] != _checksum(of, memoryview(slot)[_SUM:])",
        "or not any(slot[:_SUM])",
        ("unit/test_data_load.py::test_what_is_damaged_is_decoded_again",),
    ),
    Mutant("left-out-step-counted", "optimizer.py", "else 1.0 - skipped", "else 1.0", OPTIMIZER),
    Mutant("momentum-begun-anew", "optimizer.py", "is_first_step=False", "is_first_step=True", OPTIMIZER),
    Mutant("left-out-step-taken", "optimizer.py", '"found_inf": skipped}', '"found_inf": None}', OPTIMIZER),
    Mutant("learning-rate-not-set", "loop.py", 'group["lr"] = lr', "pass", LOOP),
    Mutant("weight-decay-on-biases", "optimizer.py", '"weight_decay": 0.0}', '"weight_decay": weight_decay}', LOOP),
    Mutant("gradient-not-clipped", "loop.py", "torch.nn.utils.clip_grads_with_norm_(parameters, settings.clip_norm, norm)", "pass", LOOP),
    Mutant(
        "average-without-buffers",
        "loop.py",
        "floats = [name for name, value in self.values.items() if value.is_floating_point()]",
        "floats = [name for name, _ in self.module.named_parameters()]",
        ("unit/test_loop.py::test_the_average_covers_batch_statistics",),
    ),
    Mutant(
        "average-not-validated",
        "loop.py",
        "        load_state(self.module, self.average.values)\n        try:",
        "        try:",
        LOOP,
    ),
    Mutant(
        "average-not-exported",
        "loop.py",
        "        elif self.average is not None:\n            load_state(self.module, self.average.values)",
        "",
        LOOP,
    ),
    Mutant("last-epoch-instead-of-best", "loop.py", "        if self.best is not None:\n", "        if False:\n", LOOP),
    Mutant(
        "objective-not-trained",
        "loop.py",
        "optimizer = make_optimizer(settings, [module, objective])",
        "optimizer = make_optimizer(settings, [module])",
        ("unit/test_loop.py::test_a_hint_trains_its_projection_and_leaves_no_hook",),
    ),
    # --- stages
    Mutant("subsets-are-not-nested", "data/batches.py", 'data_seed, "fraction")', 'data_seed, "fraction", fraction)', STAGES),
    Mutant("every-stage-begins-with-view-0", "data/batches.py", "        epoch = self.first_epoch + (", "        epoch = (", STAGES),
    Mutant("a-rate-of-a-stage-is-forgotten", "loop.py", "top = settings.lr if own is None else own", "top = settings.lr", STAGES),
    Mutant("one-objective-for-all-stages", "loop.py", "goal = objective.at(request.stage)", "goal = objective.at(0)", STAGES),
    Mutant("every-stage-asks-what-the-first-one-does", "loop.py", "own = objective.at(request.stage)", "own = objective.at(0)", STAGES),
    Mutant(
        "a-teacher-is-tried-when-nobody-asks", "placement.py", "trial = needs is not None and not tried", "trial = before is None", STAGES
    ),
    Mutant("a-projection-begins-again", "objective.py", "kept.setdefault((term.name, own, shapes), term.loss)", "term.loss", STAGES),
    Mutant(
        "the-baseline-reads-all-rows",
        "_parts.py",
        "rows = self._labelled_of(stage)\n                plans",
        "rows = None\n                plans",
        STAGES,
    ),
    Mutant(
        "all-rows-are-asked-of-the-teacher",
        "_teaching.py",
        "Request(view, keys) if rows is None else",
        "Request(view, keys) if True else",
        STAGES,
    ),
    # --- relational losses on several ranks
    Mutant("shares-are-cut-as-they-like", "loop.py", "alike=own.relational", "alike=False", ALIKE),
    Mutant(
        "gathered-without-the-others-gradient",
        "ranks.py",
        "        if summed.numel():\n            dist.all_reduce(summed, group=group)\n",
        "",
        GATHERED,
    ),
    Mutant("each-rank-counts-all-values", "objective.py", "return found[own]", "return found", GATHERED),
    # --- resume
    Mutant("resume-without-optimiser", "loop.py", 'checkpoint.restore_optimizer(self.optimizer, saved["optimizer"])', "pass", RESUME),
    Mutant("resume-without-average", "loop.py", 'value.copy_(saved["average"][name])', "pass", RESUME),
    Mutant("resume-without-best", "loop.py", 'self.best = saved["best"]', "pass", RESUME),
    Mutant("resume-without-projection", "loop.py", 'load_state(self.objective, saved["objective"])', "pass", RESUME),
    Mutant("resume-without-log-cut", "loop.py", 'recorder.log.cut(found[1]["log_offset"])', "pass", KILLED),
    Mutant("restart-without-log-cut", "loop.py", "recorder.log.cut_role(recorder.role)", "pass", KILLED),
    Mutant(
        "checkpoint-not-checked", "checkpoint.py", 'if file_sha256(candidate / name) != manifest["files"][name]:', "if False:", CHECKPOINT
    ),
    Mutant("half-removed-under-its-name", "checkpoint.py", "        discard(old)", "        shutil.rmtree(old)", CRASHED),
    Mutant("moments-lose-their-strides", "checkpoint.py", "value.stride() != parameter.stride()", "False", CHECKPOINT),
    Mutant("resume-on-other-data", "_folder.py", "if before is not None and before != now:", "if False:", BASELINE),
    # --- the spine: fair baseline, honest numbers, the right file
    Mutant(
        "baseline-from-trained-weights",
        "spine.py",
        "baseline = replace(student, module=copy.deepcopy(student.module)) if",
        "baseline = student if",
        BASELINE,
    ),
    Mutant(
        "baseline-with-fewer-steps",
        "_parts.py",
        "batch_size=size, seed=recipe.seed, total_steps=steps",
        "batch_size=size, seed=recipe.seed",
        BASELINE,
    ),
    Mutant(
        "a-layout-that-is-varied-is-overwritten",
        "_sweep_share.py",
        '_NO_WEIGHT = {"workers",',
        '_NO_WEIGHT = {"layout", "workers",',
        ("e2e/test_sweep.py::test_what_is_varied_is_what_runs_where_the_rest_is_measured",),
    ),
    Mutant(
        "a-teacher-of-another-training",
        "_sweep_share.py",
        "_text([model, train, data, recipe.task, recipe.seed, number, _cross_entropy(recipe.objective)])",
        "_text([model, train, data, recipe.task, recipe.seed])",
        ("e2e/test_sweep.py::test_a_teacher_is_trained_again_where_its_own_training_is_varied",),
    ),
    Mutant("chosen-on-the-test-split", "_parts.py", "split = self.data.valid\n", "split = self.data.test\n", BASELINE),
    Mutant("student-evaluated-as-baseline", "spine.py", "load_state(student.module, trained[role][1])", "pass", BASELINE),
    Mutant(
        "agreement-with-oneself",
        "_results.py",
        'agreement(logits[role], logits["teacher"])',
        "agreement(logits[role], logits[role])",
        BASELINE,
    ),
    Mutant(
        "best-seed-is-the-first", "_results.py", "best = max(range(len(results)), key=", "best = min(range(len(results)), key=", BASELINE
    ),
    Mutant(
        "gap-of-the-student",
        "verdict.py",
        "round((student - baseline) / (teacher - baseline), 12)",
        "round((student - baseline) / teacher, 12)",
        ("../src/limbeck/verdict.py",),
    ),
    Mutant(
        "saved-weights-not-checked",
        "models/_saved.py",
        "elif file_sha256(folder / name) != recorded:",
        "elif False:",
        ("unit/test_models_python.py::test_code_that_changed_in_a_saved_folder_is_not_run",),
    ),
    Mutant(
        "parity-of-any-file",
        "export/parity.py",
        "RELATIVE_TOLERANCE = 1e-4",
        'RELATIVE_TOLERANCE = float("inf")',
        (
            "unit/test_export.py::test_the_tolerance_grows_with_the_largest_logit",
            "unit/test_export.py::test_a_spoiled_export_is_refused_with_the_figures",
        ),
    ),
    Mutant(
        "parity-at-the-traced-size",
        "export/_job.py",
        "(slice(0, 1), slice(1, 2), slice(0, 3), slice(0, None))",
        "(slice(0, TRACE_BATCH),)",
        ("unit/test_export.py::test_the_cases_avoid_what_is_traced",),
    ),
    Mutant("interpreter-taken-down", "cli.py", "    os._exit(code or 0)", "    sys.exit(code or 0)", ("unit/test_cli.py::TestTheEnd",)),
)


def main(names: list[str]) -> int:
    unknown = sorted(set(names) - {m.name for m in MUTANTS})
    if unknown:
        print(f"There is no mutant {', '.join(unknown)}; there are: {', '.join(m.name for m in MUTANTS)}.")
        return 2
    chosen = [m for m in MUTANTS if m.name in names] if names else list(MUTANTS)
    with tempfile.TemporaryDirectory(prefix="limbeck-mutants-") as folder:
        copy = Path(folder).resolve()
        os.environ |= {"PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        sys.dont_write_bytecode = True
        import torch  # noqa: F401 (once for all the forks)

        _copy_tree(copy)
        print(f"{len(chosen)} mutants in a copy of the tree", flush=True)
        print(f"{'mutant':<40} {'tests':<6} {'seconds':>7}  first failing test", flush=True)
        started = time.perf_counter()
        alive = _show("(none)", "green", *_run(copy, dict.fromkeys(t for m in chosen for t in m.tests), stop=False))
        for mutant in chosen:
            path = copy / "src/limbeck" / mutant.file
            text = path.read_text(encoding="utf-8")
            if text.count(mutant.old) != 1:
                alive += _show(mutant.name, "red", f"the old text occurs {text.count(mutant.old)} times in {mutant.file}", "", 0.0)
                continue
            path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
            try:
                alive += _show(mutant.name, "red", *_run(copy, mutant.tests))
            finally:
                path.write_text(text, encoding="utf-8")
        print(f"{alive} not as expected; {time.perf_counter() - started:.0f} s in all")
    return 1 if alive else 0


def _show(name: str, expected: str, colour: str, first: str, seconds: float) -> int:
    """Print a row; 1 where the outcome is not the expected one."""
    good = colour == expected
    print(f"{name:<40} {colour if good else colour.upper():<6} {seconds:>7.1f}  {first}", flush=True)
    return int(not good)


def _copy_tree(copy: Path) -> None:
    """What git tracks or would track (no environments, data or runs), with byte code that is checked by hash: a mutant made within a second
    of another, of the same length, must not be run from the other's byte code."""
    listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in listed.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    command = [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash", "src"]
    subprocess.run(command, cwd=copy, check=True)


def _run(copy: Path, tests: Iterable[str], *, stop: bool = True) -> tuple[str, str, float]:
    """``green``, ``red``, or what else happened; the first failing test; seconds."""
    paths = [os.path.normpath(f"tests/{t}") for t in tests]
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if not child:
            _test([*paths, "-rfE", "--tb=no", *(["-x"] if stop else [])], copy, output.fileno())
        _, status = os.waitpid(child, 0)
        output.seek(0)
        said = output.read()
    seconds, code = time.perf_counter() - started, os.waitstatus_to_exitcode(status)
    if code == 0:
        return "green", "", seconds
    failed = re.search(r"^FAILED (.+?)(?: - .*)?$", said, re.MULTILINE)
    if code == 1 and failed is not None:
        return "red", failed[1].removeprefix("tests/"), seconds
    # a mutant that cannot be imported or collected, or that hangs, shows nothing about the tests
    return "broken", f"exit {code}: {' '.join(said.split())[-300:]}", seconds


def _test(arguments: list[str], copy: Path, output: int) -> NoReturn:
    """The life of a child: run pytest in the copy, on the copy's package, and leave with its exit code."""
    code = 3
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        signal.alarm(TIMEOUT)
        os.chdir(copy)
        sys.path[:1] = [str(copy), str(copy / "src")]  # as `python -m pytest` there; not this script's own folder
        import limbeck

        # the installed package points to the original tree, and must not be the one that is tested
        found = Path(str(limbeck.__file__)).resolve()
        assert found.is_relative_to(copy / "src"), f"{found} would be tested, not the copy"
        code = int(pytest.main(arguments))
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
