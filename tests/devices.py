"""Where tests that compute do so: on the CPU, or where ``SELFSPEC_TEST_DEVICE`` says."""

import os

import torch

DEVICE = torch.device(os.environ.get("SELFSPEC_TEST_DEVICE", "cpu"))
CAPTURES = DEVICE.type == "cuda" and torch.version.cuda is not None
"""Whether passes can be captured as graphs there; not on a pretended GPU."""
