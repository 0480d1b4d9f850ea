"""Why a row misses its target, by the profile, and what would close it: shown beside the row when (and only when) it misses."""

NOTES: dict[str, str] = {}
