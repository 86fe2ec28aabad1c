"""Log probabilities of prompts, for requests that ask for them: read off the passes that read the prompt.

Shapes: R requests of a pass, S rows that score one request's tokens, W wanted rows of the pass, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from draftkit.engine.outputs import PromptToken
from draftkit.engine.paged_model import ReadOut
from draftkit.engine.request import Request
from draftkit.engine.scheduler import ScheduledBatch

# a request and the flat rows of the pass [S] that tell of its next unscored tokens
Scoring = tuple[Request, np.ndarray]


def to_score(batch: ScheduledBatch, firsts_R: np.ndarray) -> list[Scoring]:
    """The rows of this pass that score tokens of prompts; `firsts_R` are the flat rows with which its
    requests begin."""
    found = []
    for index in range(batch.decoding, len(batch.requests)):
        request = batch.requests[index]
        if request.unscored:
            done, end = (
                len(request.scores),
                min(request.computed + int(batch.counts_R[index]), request.prompt_length - 1),
            )
            found.append((request, firsts_R[index] - request.computed + np.arange(done, end)))
    return found


def score(asked: Sequence[Scoring], read: ReadOut) -> ReadOut:
    """Give the requests the scores that lie in the last rows of what was read, and return the rows before
    them."""
    kept = len(read.logits_WV) - sum(len(rows_S) for _, rows_S in asked)
    first = kept
    for request, rows_S in asked:
        _score(request, read.logits_WV[first : first + len(rows_S)])
        first += len(rows_S)
    return ReadOut(
        read.logits_WV[:kept], read.features_TF, read.best_W[:kept] if read.best_W is not None else None
    )


def _score(request: Request, logits_SV: Tensor) -> None:
    first, count = len(request.scores) + 1, len(logits_SV)
    tokens = request.tokens[first : first + count]
    found_SV = torch.log_softmax(logits_SV.float(), -1)
    own_S1 = found_SV.gather(1, torch.tensor(tokens, device=found_SV.device)[:, None])
    ranks_S = (found_SV > own_S1).sum(1) + 1
    values, ids = found_SV.topk(min(request.params.prompt_logprobs or 0, found_SV.shape[1]), -1)
    request.scores += [
        PromptToken(token, own, rank, tuple(zip(best, likely, strict=True)))
        for token, own, rank, best, likely in zip(
            tokens, own_S1.squeeze(1).tolist(), ranks_S.tolist(), ids.tolist(), values.tolist(), strict=True
        )
    ]
