"""Why a row misses its target, by the profile, and what would close it: shown beside the row when (and only when) it misses."""

NOTES: dict[str, str] = {
    "P1": "The interval includes the target. The planner finds 0.7 ms for making the batch, on the same core as everything else; the rest is not "
    "profiled.",
    "P2": "About 0.26 ms of Python a step, found by leaving parts out: selecting, summing and dividing in the objective, with the nodes that "
    "this adds to backward (a third), the teacher's call and the copy of its inputs (10 %), the norm and the looks for NaN (10 %), the log (10 %), "
    "the hand-over of batches and the rest. A hand-written backward of kd would save part of the first and change the last bits. The cost is "
    "per step, whatever the models.",
    "P4": "On one thread a training is only 9 s at K = 1, and what the filling adds beyond K T (finding the directory, hashing the teacher twice, "
    "the test rows, writing with fsync) weighs the more; not profiled further.",
    "P9": "The first batch of 128 rows opens as many parts as it touches, 16 of 1 GB and about 120 of 10 GB; a batch cannot touch more parts "
    "than it has rows, so the time should not grow beyond that (not measured at 100 GB).",
    "P12": "Whole commands are timed, and the formula has no start, no evaluation, no measuring of the teacher's speed and no report, of which the "
    "sweep has five of most and the five runs have five of all.",
    "P7": "NumPy's memmap itself is 2.3 times as fast as LMDB here, so three times LMDB is beyond any checked store on this machine. The store "
    "pays for one search by id and for putting rows of several parts back into the batch's order; merging finished parts would save the second.",
}
