"""What a job that was killed carries on from, in a folder or in a bucket (``docs/checkpoints.md``).

journal.py     what the lines of a journal mean
store.py       what ``checkpoint.dir`` names, and the files beside the journals: heads, results
folder.py      lines in a file of this disk, under a file lock
segments.py    lines in a bucket, under a lease: numbered objects, each created only if it is not there yet
lease.py       one holder at a time, wherever processes run
bucket.py      objects by fsspec: retries, and errors in one line
"""

from selfspec.checkpoint.bucket import trimmed
from selfspec.checkpoint.folder import FILE, on_disk
from selfspec.checkpoint.journal import Journal, Record, begun_here, inspect
from selfspec.checkpoint.store import Store, at, finished, fit_place, map_concurrent, plan_place

__all__ = [
    "FILE",
    "Journal",
    "Record",
    "Store",
    "at",
    "begun_here",
    "finished",
    "fit_place",
    "inspect",
    "map_concurrent",
    "on_disk",
    "plan_place",
    "trimmed",
]
