"""Where drafted tokens' keys and values go: the slots that vLLM's scheduler has set aside for their requests.

A draft writes those of the exit's layers at the positions of the last token and of the drafted ones, which are just
the positions that verification computes next, all layers of them, before anything reads them. What is cached as
a prefix are whole blocks of tokens *before* the last one: no draft writes there.
"""

from typing import Any

import torch
from torch import Tensor


class Slots:
    """The paged KV cache as the rows of a batch see it, one new token a row.

    Args:
        runner: vLLM's model runner, after a step.
    """

    def __init__(self, runner: Any) -> None:
        from vllm.v1.attention.backend import CommonAttentionMetadata

        self._metadata = CommonAttentionMetadata
        self.groups: list[list[Any]] = runner.attn_groups
        self.tables = [runner.input_batch.block_table[number] for number in range(len(self.groups))]
        self.device = runner.device

    def room(self, row: int) -> int:
        """How many positions the row's blocks hold."""
        rooms: list[int] = [int(table.num_blocks_per_row[row]) * table.block_size for table in self.tables]
        return min(rooms)

    def look(self, rows: Tensor) -> None:
        """Fixes the rows of the batch, int64 ``[n]``, that the next steps are for."""
        self._rows = [table.block_table.gpu[rows] for table in self.tables]
        self._starts = torch.arange(len(rows) + 1, dtype=torch.int32)

    def step(self, positions: Tensor, longest: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """One token a row: attention's metadata and the slots to write to, by layer.

        Args:
            positions: int64 ``[n]``, of the new tokens.
            longest: the largest of them.
        """
        n = len(positions)
        lengths = (positions + 1).int()
        metadata, slots = dict[str, Any](), dict[str, Tensor]()
        for table, blocks, groups in zip(self.tables, self._rows, self.groups, strict=True):
            # vLLM's own mapping is of the step it has just run; these positions come after it.
            at = blocks.gather(1, (positions // table.block_size)[:, None])[:, 0].long()
            slot = at * table.block_size + positions % table.block_size
            common = self._metadata(
                query_start_loc=self._starts.to(self.device),
                query_start_loc_cpu=self._starts,
                seq_lens=lengths,
                num_reqs=n,
                num_actual_tokens=n,
                max_query_len=1,
                max_seq_len=longest + 1,
                block_table_tensor=blocks,
                slot_mapping=slot,
                positions=positions,
                is_prefilling=torch.zeros(n, dtype=torch.bool),
                seq_lens_cpu_upper_bound=lengths.cpu(),
            )
            for group in groups:
                built = group.build_metadata(common)
                metadata |= dict.fromkeys(group.layer_names, built)
                slots |= dict.fromkeys(group.layer_names, slot)
        return metadata, slots
