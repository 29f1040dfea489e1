"""``hydra/launcher=skypilot``: each job of a sweep is a managed job of SkyPilot's.

``launcher.py`` is what Hydra sees, ``config.py`` what a user may set. ``_task.py`` says what a job is to SkyPilot,
``_fleet.py`` which jobs are launched, attached to or left alone, and watches them, ``_table.py`` shows them.
SkyPilot itself cannot be installed beside selfspec (click <8.2 against >=8.4), so ``_sky.py`` runs in its
environment, and ``_bridge.py`` talks to it.
"""
