"""``hydra/launcher=local`` and ``hydra/launcher=slurm``: each job of a sweep is a process of its own.

``local.py`` and ``slurm.py`` are what Hydra sees, ``config.py`` what a user may set. ``_jobs.py`` has what both do: a
job is a command line that runs one plan alone and leaves its result in its folder; the launcher starts them, says what
becomes of each, writes a failed row for one that died, and ends them all when it is ended itself. ``_slurm_job.py`` is
what runs there.
"""
