"""An EAGLE or EAGLE-3 head that somebody trained, in vLLM's form."""

import json
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
        config = json.loads((folder / "config.json").read_text())
        named = [*(config.get("architectures") or ()), str(config.get("speculators_model_type", ""))]
        third = any("eagle3" in name.lower() for name in named)
        return {"method": "eagle3" if third else "eagle", "model": str(folder)}
