"""An EAGLE or EAGLE-3 head that somebody trained, in vLLM's form."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfspec.speculation.draft import vllm_medusa


@dataclass
class Options(vllm_medusa.Options):
    """Which head."""

    name: str = "vllm_eagle"

    def vllm(self, folder: Path | None) -> dict[str, Any]:
        """EAGLE-3 reads other states of the target than its forerunner, and only its checkpoint says which it is."""
        assert folder is not None, "it has a source"
        from selfspec.model.checkpoint import json_object

        config = json_object(folder / "config.json")
        third = "eagle3" in f"{config.get('architectures')} {config.get('speculators_model_type')}".lower()
        return {"method": "eagle3" if third else "eagle", "model": str(folder)}
