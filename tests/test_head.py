"""head: what is saved comes back; what is damaged, or belongs to something else, is refused in one line."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from selfspec import heads
from selfspec.errors import HeadError
from selfspec.model.llama import Llama
from selfspec.speculation.head import FittedExit, Head, RawExit, features

D, RANK = 8, 3
FACTS = {"previous": False, "exit_layer": 12, "model": "sha256:abc", "hidden": D, "agreement": 0.625}


def shapes(low_rank: bool, two: bool) -> dict[str, tuple[int, ...]]:
    p = 2 * D if two else D
    return (
        {"scale": (D,), "up": (D, RANK), "down": (RANK, p), "bias": (D,)}
        if low_rank
        else {"weight": (D, p), "bias": (D,)}
    )


def make(low_rank: bool = False, two: bool = False) -> Head:
    random = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(shape, generator=random) for n, shape in shapes(low_rank, two).items()}
    return Head(tensors | {"ids": torch.tensor([3, 2**40, 0])}, FACTS | {"previous": two})


def saved(path: Path, head: Head | None = None) -> Path:
    path.write_bytes((head or make()).to_bytes())
    return path


def refused(path: Path, message: str, wanted: dict[str, Any] | None = None) -> None:
    """By the check, before anything is loaded."""
    with pytest.raises(HeadError, match=message) as error:
        heads.check(path, wanted or {})
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return saved(tmp_path / "head.safetensors")


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("low_rank", [False, True])
class TestForms:
    def test_it_is_an_affine_map_of_unit_states(self, low_rank: bool, two: bool) -> None:
        head, (hidden, before) = make(low_rank, two), 5 * torch.randn(2, 4, D)
        unit = [x / x.square().mean(-1, keepdim=True).sqrt() for x in (hidden, before)]
        t, x = head.tensors, torch.cat(unit if two else unit[:1], -1)
        wanted = x @ t["down"].T @ t["up"].T + t["scale"] * unit[0] if low_rank else x @ t["weight"].T
        assert_close(FittedExit(t, two)(hidden, before), wanted + t["bias"], atol=1e-5, rtol=1e-4)

    def test_it_comes_back_as_it_was(self, tmp_path: Path, low_rank: bool, two: bool) -> None:
        head = make(low_rank, two)
        back = Head.load(saved(tmp_path / "head", head))
        assert back.facts == head.facts and head.facts.items() <= heads.facts(tmp_path / "head").items()
        assert back.tensors.keys() == head.tensors.keys()
        assert all(torch.equal(t, head.tensors[name]) for name, t in back.tensors.items())
        assert back.to_bytes() == head.to_bytes()

    def test_in_another_dtype(self, low_rank: bool, two: bool) -> None:
        head, hidden = make(low_rank, two), torch.randn(2, 4, D)
        half = head.to(torch.bfloat16, torch.device("cpu"))
        got = FittedExit(half.tensors, two)(*hidden.bfloat16())
        assert got.dtype == torch.bfloat16
        assert_close(got.float(), FittedExit(head.tensors, two)(*hidden), atol=0.2, rtol=0.1)
        assert torch.equal(half.tensors["ids"], head.tensors["ids"]), "whole numbers stay whole"


def test_a_head_is_kept_in_float32(tmp_path: Path) -> None:
    half = make().to(torch.bfloat16, torch.device("cpu"))
    kept = Head.load(saved(tmp_path / "head", half)).tensors
    assert {name: t.dtype for name, t in kept.items()} == {
        "weight": torch.float32,
        "bias": torch.float32,
        "ids": torch.int64,
    }


def test_features_do_not_depend_on_size() -> None:
    hidden, previous = torch.randn(2, 4, D)
    assert_close(features(1000 * hidden, previous / 50), features(hidden, previous), atol=1e-3, rtol=1e-3)
    assert features(hidden, None).shape == (4, D)


def test_the_raw_exit_is_the_models_own_norm(tiny_folder: Path) -> None:
    model = Llama.load(tiny_folder, torch.device("cpu"), torch.float32)
    hidden = torch.randn(4, 32)
    assert torch.equal(RawExit(model)(hidden, torch.full_like(hidden, math.nan)), model.norm(hidden))


def test_facts_are_read_without_torch(path: Path) -> None:
    code = f"import sys, pathlib; from selfspec import heads; heads.check(pathlib.Path({str(path)!r}), {{}}); "
    subprocess.run([sys.executable, "-c", code + "assert not {'torch', 'safetensors'} & set(sys.modules)"], check=True)


class TestRefusals:
    def test_of_something_else(self, path: Path) -> None:
        found = heads.check(path, {"model": "sha256:abc", "exit_layer": 12, "previous": False})
        assert found.items() >= FACTS.items()
        for key, value in (("model", "sha256:def"), ("exit_layer", 24), ("previous", True), ("rank", 3)):
            refused(path, f"fitted for {key}={found.get(key)}, but {key}={value} is asked for", {key: value})

    def test_missing(self, tmp_path: Path) -> None:
        refused(tmp_path / "none", "no head can be read there")
        refused(tmp_path, "no head can be read there")
        with pytest.raises(HeadError, match="no head can be read there"):
            Head.load(tmp_path / "none")

    @pytest.mark.parametrize("content", [b"", b"{}", b"\0" * 8, b"\0" * 64, b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]"])
    def test_no_head_at_all(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        refused(path, "corrupt head")

    def test_another_safetensors_file(self, path: Path) -> None:
        save_file({"weight": torch.ones(2)}, path)
        refused(path, "corrupt head, or none of selfspec's")
        save_file({"weight": torch.ones(2)}, path, metadata={"format": "pt"})
        refused(path, "corrupt head, or none of selfspec's")

    def test_cut_off_anywhere(self, path: Path) -> None:
        whole = path.read_bytes()
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            refused(path, "corrupt head")
        path.write_bytes(whole + b"\0")
        refused(path, "cut off or padded")

    def test_a_flipped_bit_of_the_header_is_refused_or_of_no_account(self, path: Path) -> None:
        """Or, inside a fact, it is another fact: then :func:`heads.check` is what notices."""
        whole = path.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        outcomes = []
        for at in range(header):
            for bit in (0, 1, 4):
                path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
                try:
                    head = Head.load(path)
                except HeadError as error:
                    outcomes.append("refused")
                    assert "\n" not in str(error)
                else:
                    outcomes.append("same" if head.facts == FACTS else "other facts")
                    assert all(torch.equal(t, make().tensors[name]) for name, t in head.tensors.items())
        assert outcomes.count("refused") > 0.8 * len(outcomes)

    def test_a_flipped_bit_of_a_tensor(self, path: Path) -> None:
        whole = path.read_bytes()
        for at in range(len(whole) - 4 * D * D, len(whole), 7):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(HeadError, match="not the ones saved"):
                Head.load(path)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("name", ["weight", "bias"])
    def test_not_finite(self, path: Path, name: str, value: float) -> None:
        head = make()
        head.tensors[name].view(-1)[5] = value
        with pytest.raises(HeadError, match=r"corrupt head \(not finite\)"):
            Head.load(saved(path, head))

    @pytest.mark.parametrize("facts", ["[]", "3", "null", '"x"', "{", "{}"])
    def test_facts_that_are_none(self, path: Path, facts: str) -> None:
        save_file(make().tensors, path, metadata={heads.FACTS: facts})
        refused(path, "corrupt head|fitted for exit_layer=None", {"exit_layer": 12})
        with pytest.raises(HeadError):
            Head.load(path)

    @pytest.mark.parametrize("entry", [[], {}, {"data_offsets": []}, {"data_offsets": [0, "1"]}, {"data_offsets": 3}])
    def test_a_header_that_makes_no_sense(self, path: Path, entry: Any) -> None:
        header = json.dumps({"__metadata__": {heads.FACTS: "{}"}, "weight": entry}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        refused(path, "corrupt head")

    def test_tensors_that_are_none_of_a_heads(self, path: Path) -> None:
        """Sound safetensors, sound facts: but of another head."""
        for tensors in ({"bias": torch.ones(D)}, make(two=True).tensors):
            save_file(tensors, path, metadata={heads.FACTS: json.dumps(heads.facts(saved(path)))})
            with pytest.raises(HeadError):
                Head.load(path)
