"""A target before it is used: what goes through draftkit's interface against the model itself.

Shapes: B batch, T new tokens, S cached + new tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from draftkit.errors import TargetError, one_line
from draftkit.target.transformers import TransformersTarget


@torch.inference_mode()
def check_target(target: TransformersTarget) -> bool:
    """Compare the seam with the model itself on four tokens: logits, reading in pieces with crops in between,
    and rows that are padded on the right. Returns whether rows padded on the left are read as alone, too
    (Gemma 2 gives no numbers): where not, nobody may pad so.

    A family that scales its logits in a way not known here, or whose memory works differently, would
    otherwise give wrong answers without a word, and so would weights that are no numbers. Raises TargetError.
    """
    vocab, dtype = target.info.vocab_size, target.head_weight().dtype
    tokens_BT = torch.tensor([[1 % vocab, vocab // 3, vocab // 2, vocab - 1]], device=target.device)
    name = f"{target.info.name} ({target.info.family})"
    try:
        wanted_BTV = target.model(tokens_BT, use_cache=False).logits
        whole_BTV = target.logits(target.forward(tokens_BT, None).last_hidden_BTH)
        cache = target.new_cache()
        target.forward(tokens_BT[:, :1], cache)
        target.forward(tokens_BT[:, [1, 0, 0]], cache)
        cache.crop(2)
        pieces_BTV = target.logits(target.forward(tokens_BT[:, 2:], cache).last_hidden_BTH)
        held = cache.length
        cache.crop(3)
        again_BTV = target.logits(target.forward(tokens_BT[:, 3:], cache).last_hidden_BTH)
        mask_BS = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], device=target.device)
        padded_BTV = target.logits(target.forward(tokens_BT.repeat(2, 1), None, (), mask_BS).last_hidden_BTH)
        left_BTV = _padded_left(target, tokens_BT) if target.pads_left else None
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
        raise TargetError(
            f"{name}: this family does not run through draftkit's target interface: {one_line(error)}"
        ) from error
    if not torch.isfinite(wanted_BTV).all():
        what = f"its logits are no finite numbers in {str(dtype).removeprefix('torch.')}"
        raise TargetError(f"{name}: {what}; copy its weights again or choose another dtype")
    scale = float(wanted_BTV.abs().max()) or 1.0
    single = 1e-3 if dtype in (torch.float32, torch.float64) else 0.03
    if not float((whole_BTV - wanted_BTV).abs().max()) <= single * scale:  # so that NaN is refused, too
        raise TargetError(
            f"{name}: logits differ from the model's own; this family scales them in a way not known here"
        )
    # Pieces of other shapes round differently, and experts may then be chosen differently: a coarse bound in
    # half precision.
    pieces_BTV = torch.cat([pieces_BTV, again_BTV], 1)
    if held != 4 or not float((pieces_BTV - wanted_BTV[:, [2, 3, 3]]).abs().max()) <= (10 * single) * scale:
        raise TargetError(
            f"{name}: reading in pieces differs from reading at once; its cache does not work in draftkit"
        )
    rows_BTV = torch.cat([padded_BTV[0], padded_BTV[1, :2]])
    if not float((rows_BTV - wanted_BTV[0, [0, 1, 2, 3, 0, 1]]).abs().max()) <= (10 * single) * scale:
        raise TargetError(
            f"{name}: rows that are padded on the right are not read as alone; choose another target"
        )
    if left_BTV is None:
        return False
    rows_BTV = torch.cat([left_BTV[0], left_BTV[1, 2:]])
    difference = float((rows_BTV - wanted_BTV[0, [0, 1, 2, 3, 0, 1]]).abs().max())
    return difference <= (10 * single) * scale


def _padded_left(target: TransformersTarget, tokens_BT: Tensor) -> Tensor:
    """Logits of the four tokens, and of the first two after padding, read in two passes as answers are."""
    rows_BT = torch.cat([tokens_BT, torch.cat([tokens_BT[:, 3:], tokens_BT[:, 3:], tokens_BT[:, :2]], 1)])
    mask_BS, cache = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]], device=target.device), target.new_cache()
    read = [
        target.forward(rows_BT[:, :3], cache, (), mask_BS[:, :3]).last_hidden_BTH,
        target.forward(rows_BT[:, 3:], cache, (), mask_BS).last_hidden_BTH,
    ]
    return target.logits(torch.cat(read, 1))
