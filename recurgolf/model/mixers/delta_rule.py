"""The gated delta rule (2412.06464): a linear memory that forgets by a decay and corrects itself.

Two forms give the same numbers: `sequential` follows the definition token by token and is the
truth; `chunked` solves each chunk of tokens at once (delta_chunks.py) and is what runs. `kernel` is
the second one on a GPU (delta_kernel.py), and `auto` takes it where it can. Shapes: B batch, T
tokens, Hk key heads, Hv value heads (a multiple of Hk; value head h reads key head h // (Hv / Hk)),
K key width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recurgolf.config import ConfigError, suggestion
from recurgolf.model.mixers import delta_kernel
from recurgolf.model.mixers.delta_chunks import chunked


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None = None,
    scale: float | None = None,
    form: str = "chunked",
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Read and write an associative memory along a sequence.

    Per token and value head, with g = exp(log_decay):

        S <- g S;  S <- S + k (beta (v - S^T k))^T;  o = scale S^T q

    Half-precision inputs are computed in float32, also inside autocast; float64 stays float64.
    q and k are used as they are: normalise them before.

    Args:
        q: queries [B, T, Hk, K].
        k: keys [B, T, Hk, K]; of length at most 1, or the state can grow without bound.
        v: values [B, T, Hv, V].
        beta: writing strength [B, T, Hv], between 0 and 1.
        log_decay: natural logarithm of the decay [B, T, Hv], at most 0; -inf forgets everything.
        initial_state: S before the first token [B, Hv, K, V]; None: zeros.
        scale: factor on the output; None: 1 / sqrt(K).
        form: `chunked`, `sequential`, `kernel`, or `auto` (kernel where it can run, else chunked).
        chunk_size: tokens solved at once; affects time and memory only.

    Returns:
        The output [B, T, Hv, V] in v's dtype and the final state [B, Hv, K, V] in the dtype of
        the computation.

    Raises:
        ConfigError: shapes that do not fit each other, an unknown form, chunk_size below 1.
    """
    known = (*_FORMS, "kernel", "auto")
    if form not in known:
        raise ConfigError(f"gated delta rule: no form {form!r}{suggestion(form, known)}")
    if chunk_size < 1:
        raise ConfigError(f"gated delta rule: chunk_size={chunk_size}; at least 1")
    _check_shapes(q, k, v, beta, log_decay, initial_state)
    batch, _, key_heads, key_dim = k.shape
    heads, value_dim = v.shape[2:]
    dtype = torch.promote_types(v.dtype, torch.float32)
    factor = key_dim**-0.5 if scale is None else scale
    if form == "auto":
        form = "chunked" if delta_kernel.missing(k, v) else "kernel"
    if form == "kernel":
        return delta_kernel.run(q, k, v, beta, log_decay, initial_state, factor)

    def by_head(x: Tensor) -> Tensor:  # [B, T, H, ...] -> [B, Hk, H / Hk, T, ...]
        return x.to(dtype).unflatten(2, (key_heads, -1)).movedim(1, 3)

    if initial_state is None:
        state = v.new_zeros((batch, heads, key_dim, value_dim), dtype=dtype)
    else:
        state = initial_state.to(dtype)
    with torch.autocast(v.device.type, enabled=False):
        output, state = _FORMS[form](
            by_head(q) * factor,
            by_head(k),
            by_head(v),
            by_head(beta),
            by_head(log_decay),
            state.unflatten(1, (key_heads, -1)),
            chunk_size,
        )
    return output.movedim(3, 1).flatten(2, 3).to(v.dtype), state.flatten(1, 2)


def _sequential(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor, _: int
) -> tuple[Tensor, Tensor]:
    """The definition; heads are [B, Hk, Hv / Hk] and q, k have 1 in the third place."""
    tokens = zip(
        *(x.unbind(3) for x in (q, k, v, beta[..., None], log_decay.exp()[..., None, None])),
        strict=True,
    )
    outputs = []
    for q_t, k_t, v_t, beta_t, decay_t in tokens:
        state = decay_t * state
        error = v_t - (k_t[..., None] * state).sum(-2)
        state = state + k_t[..., None] * (beta_t * error)[..., None, :]
        outputs.append((q_t[..., None] * state).sum(-2))
    return torch.stack(outputs, 3), state


_FORMS = {"chunked": chunked, "sequential": _sequential}


def _check_shapes(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor | None
) -> None:
    if k.ndim != 4 or v.ndim != 4:
        raise ConfigError(
            f"gated delta rule: k {tuple(k.shape)} and v {tuple(v.shape)} must be "
            "[batch, tokens, heads, width]"
        )
    (batch, length, key_heads, key_dim), (heads, value_dim) = k.shape, v.shape[2:]
    if length < 1 or key_heads < 1 or heads % key_heads:
        raise ConfigError(
            f"gated delta rule: {length} tokens, {heads} value heads for {key_heads} key heads; "
            "there must be at least one token and a multiple of the key heads"
        )
    right = {
        "q": (q, (batch, length, key_heads, key_dim)),
        "v": (v, (batch, length, heads, value_dim)),
        "beta": (beta, (batch, length, heads)),
        "log_decay": (log_decay, (batch, length, heads)),
        "initial_state": (state, (batch, heads, key_dim, value_dim)),
    }
    for name, (tensor, shape) in right.items():
        if tensor is not None and tensor.shape != shape:
            raise ConfigError(
                f"gated delta rule: {name} is {tuple(tensor.shape)}, but k {tuple(k.shape)} and "
                f"v {tuple(v.shape)} ask for {shape}"
            )
