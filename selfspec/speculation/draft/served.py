"""Whatever a server drafts with: ``engine=openai`` alone has it, and does not know what it is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from selfspec.axes import DraftOptions


@dataclass
class Options(DraftOptions):
    """Nothing to set."""

    name: str = "served"

    made_elsewhere: ClassVar[bool] = True
    speculates: ClassVar[bool] = False
    engines: ClassVar[Mapping[str, tuple[str, ...]]] = {"openai": ()}
