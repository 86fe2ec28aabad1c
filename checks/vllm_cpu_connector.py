"""Loaded by vLLM, not by draftkit: its ExampleHiddenStatesConnector for a CPU, where there are no streams, no
events and no pinned memory. Files, locks and answers are the connector's own."""

from __future__ import annotations

import fcntl
import os
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1 import example_hidden_states_connector as example


class _Done:
    """An event that has happened."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class CpuHiddenStatesConnector(example.ExampleHiddenStatesConnector):
    """Copies a finished request's states and writes them at once."""

    def _submit_async_write(self, pending: Any) -> None:
        if not self._is_tp_rank_zero:
            return
        blocks = torch.tensor(pending.block_ids, dtype=torch.long)[:, None] * self._block_size
        slots = (blocks + torch.arange(self._block_size)).flatten()
        states = example.extract_from_kv_cache(self._kv_cache, slots, len(pending.token_ids)).clone()
        os.makedirs(os.path.dirname(pending.filename), exist_ok=True)
        held = self._lock_fds.pop(pending.req_id, None)
        if held is None and self.use_lock:
            held = os.open(pending.filename + ".lock", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
            fcntl.flock(held, fcntl.LOCK_EX)
        save_file({"hidden_states": states, "token_ids": pending.token_ids.clone()}, pending.filename)
        if held is not None:
            os.close(held)
        self._req_copy_events[pending.req_id] = _Done()
