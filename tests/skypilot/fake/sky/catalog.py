"""What machines there are, and what they cost an hour."""

import re
from dataclasses import dataclass


@dataclass
class Offer:
    """A kind of machine in a region."""

    accelerator_name: str
    accelerator_count: float
    region: str
    price: float
    spot_price: float


_OFFERS = {
    "gcp": [Offer("H100", 1, "us-central1", 10.0, 3.0), Offer("H100", 1, "us-east4", 12.0, 4.0)],
    "slurm": [Offer("H100", 1, "local", 0.0, float("nan"))],
}


def list_accelerators(
    gpus_only,
    name_filter=None,
    region_filter=None,
    quantity_filter=None,
    clouds=None,
    case_sensitive=True,
    all_regions=False,
):
    """Offers by accelerator; as SkyPilot's own, an error where Slurm has none."""
    if clouds is None:
        raise ConnectionError("no network")
    found = [
        offer
        for offer in _OFFERS[clouds]
        if (name_filter is None or re.search(name_filter, offer.accelerator_name))
        and region_filter in (None, offer.region)
        and quantity_filter in (None, offer.accelerator_count)
    ]
    if clouds == "slurm" and not found:
        raise ValueError("No GPUs found")
    return {offer.accelerator_name: [o for o in found if o is not None] for offer in found}
