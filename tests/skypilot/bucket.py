"""A Google Cloud Storage emulator for ``e2e.sh``: says its address and a bucket's, and runs until stdin ends."""

import os
import sys
from pathlib import Path

os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
sys.path.insert(0, str(Path(__file__).parents[1]))

import fsspec
from gcs import emulator

with emulator() as url:
    os.environ["STORAGE_EMULATOR_HOST"] = url
    fsspec.filesystem("gs", token="anon", project="test").mkdir("selfspec")
    print(url, "gs://selfspec", flush=True)
    sys.stdin.read()
