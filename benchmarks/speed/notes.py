"""Why a row misses its target, by the profile, and what would close it: shown beside the row when (and only when) it misses."""

NOTES: dict[str, str] = {
    "P1": "The interval includes the target. The planner finds 0.7 ms for making the batch, on the same core as everything else; the rest is not "
    "profiled.",
    "P2": "What is left is mostly Python between the operations of the loss, where masks, counts, weights and schedules are looked at; then the "
    "teacher's call (a copy of its inputs, a count of its samples), making and sending the batch, and the log. The optimiser's step and the look "
    "for NaN take less than the plain loop's. The cost is per step, whatever the models: 0.2 to 0.3 ms, which was 12 % of a step on a machine "
    "without AVX-512, and is more where the operations are quicker. See the lab book, 2026-11-24 and 2026-11-26.",
    "P4": "By the profile the pass over the training rows takes what as many live steps take of the teacher; beside it are 0.1 s between the pass "
    "and the first step.",
    "P9": "The first batch of 128 rows opens as many parts as it touches, 16 of 1 GB and about 120 of 10 GB; a batch cannot touch more parts "
    "than it has rows, so the time should not grow beyond that (not measured at 100 GB).",
    "P12": "Whole commands are timed, and the formula has no start, no evaluation, no measuring of the teacher's speed and no report, of which the "
    "sweep has five of most and the five runs have five of all.",
    "P5": "The totals are one run each, so there is no interval.",
    "P7": "NumPy's memmap itself is 2.3 to 2.7 times as fast as LMDB here, so three times LMDB is beyond any checked store. The store "
    "pays for one search by id and for putting rows of several parts back into the batch's order; merging finished parts would save the second.",
}
